import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from datagen.config import ScanConfig, SourceConfig
from datagen.scan.row import row_of
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import (
    SourceError,
    list_pictures,
    open_source,
    read_picture,
    require_apart,
    require_folders,
)
from infra.storage import StorageError, open_store

ROOT = Path(__file__).parents[3]


def test_listing_is_sorted_within_each_source_and_passes_over_other_files(tmp_path: Path) -> None:
    for name in ("one/b.PNG", "one/a/z.jpg", "one/notes.txt", "two/a.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    sources = (
        SourceConfig(uri=str(tmp_path / "two"), name="late"),
        SourceConfig(uri=str(tmp_path / "one"), licence="CC0"),
    )
    pictures, others = list_pictures(sources)
    assert [picture.source for picture in pictures] == ["late/a.webp", "source-1/a/z.jpg", "source-1/b.PNG"]
    assert others == 1
    assert pictures[1].uri == str(tmp_path / "one" / "a" / "z.jpg")
    assert (pictures[1].size, pictures[1].licence) == (5, "CC0")
    assert open_source(pictures[1].root).read(pictures[1].key) == b"12345"


def test_missing_folder_and_folder_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"leak_guard.*no such folder"):
        require_folders((SourceConfig(uri=str(tmp_path / "nowhere")),), "leak_guard")
    with pytest.raises(SourceError, match="no picture there"):
        list_pictures((SourceConfig(uri=str(tmp_path)),))


@pytest.mark.parametrize(
    ("source", "out", "apart"),
    [
        ("{here}/raw", "{here}/raw/out", False),
        ("{here}/raw/", "{here}/raw", False),
        ("{here}/link", "{here}/raw/out", False),
        ("s3://bucket", "s3://bucket/out", False),
        ("{here}/raw", "{here}/raw-out", True),
        ("s3://bucket/raw", "s3://bucket/out", True),
        ("embedded:pictures", "{here}/out", True),
    ],
)
def test_an_output_inside_a_source_is_refused(tmp_path: Path, source: str, out: str, apart: bool) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    sources = (SourceConfig(uri=source.format(here=tmp_path)),)
    with contextlib.nullcontext() if apart else pytest.raises(SourceError, match=r"out .* lies in leak_guard"):
        require_apart(sources, "leak_guard", out.format(here=tmp_path))


def test_the_embedded_corpus_is_a_source() -> None:
    pictures, _ = list_pictures((SourceConfig(uri="embedded:held_out"),), "guard")
    assert [picture.source for picture in pictures] == [
        "guard-0/chelsea.png",
        "guard-0/coffee.png",
        "guard-0/flower.jpg",
    ]


def keys(folder: Path) -> list[str]:
    return [picture.key for picture in list_pictures((SourceConfig(uri=str(folder)),))[0]]


def test_odd_names_survive_the_listing_and_the_record_of_it(tmp_path: Path) -> None:
    names = [
        "A.jpg",
        "a.JPG",
        "a.jpg",
        "line\nbreak.jpg",
        "tab\t.jpg",
        " space .jpg",
        "quote\"'.jpg",
        "日本.jpg",
        "#2.jpg",
    ]
    names += ["e\u0301.jpg", "\u00e9.jpg", "100%25.jpg", "-rf.jpg", "x" * 250 + ".jpg", ".hidden.jpg", "a.tar.jpg"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    pictures, _ = list_pictures((SourceConfig(uri=str(tmp_path / "in")),))
    assert [picture.key for picture in pictures] == sorted(names, key=str.encode)
    assert all(read_picture(picture) == picture.key.encode() for picture in pictures)
    store = open_store(tmp_path / "out")
    write_batches(store, [pictures, pictures[:2]])
    assert read_batches(store) == [pictures, pictures[:2]]
    write_batches(store, [pictures])
    assert read_batches(store) == [pictures]


def test_a_name_that_is_not_utf8_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(StorageError, match="convmv"):
        keys(tmp_path)


def test_links_are_followed_and_loops_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    (folder / "deep" / "a.jpg").write_bytes(b"a")
    (outside / "b.jpg").write_bytes(b"b")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "broken.jpg").symlink_to("nowhere")
    (folder / "linked").symlink_to(outside)
    os.mkfifo(folder / "pipe.jpg")
    assert keys(folder) == ["deep/a.jpg", "linked/b.jpg"]
    assert "not followed" in caplog.text and "broken symbolic link" in caplog.text


def test_a_file_that_goes_after_the_listing_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (picture,), _ = list_pictures((SourceConfig(uri=str(tmp_path)),))
    (tmp_path / "a.jpg").unlink()
    row = row_of(picture, ScanConfig(), 0)
    assert (row["verdict"], row["reason"]) == ("failed", "missing")


def test_files_that_come_and_go_while_they_are_listed_break_nothing(tmp_path: Path) -> None:
    for index in range(200):
        (tmp_path / f"{index % 20}").mkdir(exist_ok=True)
        (tmp_path / f"{index % 20}" / f"stays-{index}.jpg").write_bytes(b"x")
    churn = (
        "import itertools, pathlib, shutil, sys; root = pathlib.Path(sys.argv[1])\n"
        "for i in itertools.count():\n"
        "    folder = root / f'goes-{i % 50}'; folder.mkdir(exist_ok=True); (folder / 'x.jpg').write_bytes(b'')\n"
        "    shutil.rmtree(root / f'goes-{(i + 25) % 50}', ignore_errors=True)\n"
        "    if i == 50: print('busy', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", churn, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"busy\n"
            for _ in range(30):
                assert sum("stays" in key for key in keys(tmp_path)) == 200
        finally:
            process.kill()


_UNREADABLE = """
import os, sys
from datagen.config import SourceConfig
from datagen.source.listing import list_pictures
from infra.storage import StorageError
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    print(list_pictures((SourceConfig(uri=sys.argv[1]),)))
except StorageError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("name", ["closed", "a.tar"])
def test_what_may_not_be_read_is_refused_before_any_work(name: str) -> None:
    """As nobody, where the tests run as root: root may read everything."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "open.jpg").write_bytes(b"x")
        (Path(folder) / "closed").mkdir()
        (Path(folder) / "a.tar").write_bytes(bytes(10240))
        (Path(folder) / name).chmod(0)
        command = [sys.executable, "-c", _UNREADABLE, folder]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.stdout.startswith("refused:") and f"{folder}/{name}" in run.stdout, run.stdout + run.stderr


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(SourceError, match="is a file; give the folder"):
        require_folders((SourceConfig(uri=str(tmp_path / "a.tar")),), "source")
