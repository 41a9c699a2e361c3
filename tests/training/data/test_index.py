import collections
import hashlib
import json
import logging
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from datagen.dataset import SAMPLES, DatasetError, read_dataset_json, read_samples, read_shards, shard_key
from infra.storage import Store, open_store
from tests.support.dataset import REPOSITORY
from tests.support.s3 import S3Server
from tests.training.data.tars import content, like_img2dataset, write_tar
from training.data.cache import CacheError
from training.data.index import Index, Lost, open_index


class CountingStore:
    """A real store that notes what is read of it."""

    def __init__(self, store: Store) -> None:
        self.store, self.reads = store, collections.Counter[str]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    def read(self, key: str) -> bytes:
        self.reads[key] += 1
        return self.store.read(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.reads[key] += 1
        return self.store.read_range(key, start, length)


def index_of(folder: Path, cache: Path, **settings: str) -> Index:
    return open_index(open_store(folder), cache, **settings)  # type: ignore[arg-type]


def listed(index: Index) -> list[tuple[str, str, int, int]]:
    return [
        (index.key(i), index.shards[index.shard_of(i)].key, int(index.offset[i]), int(index.size[i]))
        for i in range(len(index))
    ]


def test_a_dataset_is_indexed_as_its_tables_say(small_dataset: Path, tmp_path: Path) -> None:
    store = open_store(small_dataset)
    rows, shards = read_samples(store).to_pylist(), read_shards(store).to_pylist()
    index = open_index(store, tmp_path)
    assert index.dataset_id == read_dataset_json(store)["id"]
    assert listed(index) == [(r["key"], shard_key(r["shard"]), r["offset"], r["size"]) for r in rows]
    assert [(s.key, s.bytes, s.sha256) for s in index.shards] == [
        (shard_key(s["name"]), s["bytes"], s["sha256"]) for s in shards
    ]
    assert np.diff(index.first).tolist() == [s["samples"] for s in shards] and index.first[0] == 0
    assert index.json_offset.tolist() == [r["json_offset"] for r in rows]
    assert index.json_size.tolist() == [r["json_size"] for r in rows]
    assert index.sha256 is not None and [bytes(d).hex() for d in index.sha256] == [r["sha256"] for r in rows]
    assert not index.depth_size.any() and not index.lost
    for values in (index.offset, index.size, index.json_offset, index.json_size, index.depth_size, index.first):
        assert values.dtype == np.int64
    (file,) = (tmp_path / index.dataset_id).glob("*.arrow")
    assert index.path == file


def test_the_tables_of_a_dataset_are_read_once(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(small_dataset, folder)
    first = index_of(folder, tmp_path / "cache")
    for table in folder.glob("*.parquet"):
        table.unlink()
    again = index_of(folder, tmp_path / "cache")
    assert listed(again) == listed(first) and again.path == first.path
    with pytest.raises(OSError, match="parquet"):
        index_of(folder, tmp_path / "other")


def test_an_index_pickles_as_its_path_and_maps_one_file(small_dataset: Path, tmp_path: Path) -> None:
    index = index_of(small_dataset, tmp_path)
    data = pickle.dumps(index)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert listed(copy) == listed(index)
    assert not index.offset.flags.owndata and not index.offset.flags.writeable
    maps = Path("/proc/self/smaps").read_text()
    assert str(index.path) in maps


def test_a_dataset_of_a_bucket_gives_the_same_index(
    small_dataset: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    shutil.copytree(small_dataset, tmp_path / "dataset")
    near = index_of(small_dataset, tmp_path / "near")
    far = open_index(open_store(f"s3://{s3_server.bucket_from(tmp_path / 'dataset')}"), tmp_path / "far")
    assert far.path.read_bytes() == near.path.read_bytes()
    assert {path.name for path in far.path.parent.iterdir()} == {"index.lock", far.path.name}


def test_tables_that_do_not_belong_together_are_refused(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(small_dataset, folder)
    table = pq.read_table(folder / SAMPLES)

    def rewrite(samples: object) -> None:
        pq.write_table(samples, folder / SAMPLES)

    rewrite(table.slice(1))
    with pytest.raises(DatasetError, match=r"not the table dataset\.json describes"):
        index_of(folder, tmp_path / "cache")
    description = json.loads((folder / "dataset.json").read_text())

    def describe() -> None:
        description["files"][SAMPLES] = hashlib.sha256((folder / SAMPLES).read_bytes()).hexdigest()
        (folder / "dataset.json").write_text(json.dumps(description))

    describe()
    with pytest.raises(DatasetError, match="not as many samples"):
        index_of(folder, tmp_path / "cache")
    rewrite(table.take([1, 0, *range(2, len(table))]))
    describe()
    with pytest.raises(DatasetError, match="not in order"):
        index_of(folder, tmp_path / "cache")
    rewrite(table.slice(0, 0))
    describe()
    with pytest.raises(DatasetError, match="not as many samples"):
        index_of(folder, tmp_path / "cache")
    description["id"] = "../../elsewhere"
    describe()
    with pytest.raises(DatasetError, match="64 hex digits"):
        index_of(folder, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*.arrow"))


def test_tars_of_img2dataset_are_indexed_with_their_json(tmp_path: Path) -> None:
    for number in range(3):
        like_img2dataset(tmp_path / "web" / f"{number:05d}.tar", number * 100, 4)
    (tmp_path / "web" / "00000_stats.json").write_text("{}")
    index = index_of(tmp_path / "web", tmp_path / "cache")
    assert [index.key(i) for i in range(5)] == [*(f"00000/{i:09d}" for i in range(4)), "00001/000000100"]
    assert index.first.tolist() == [0, 4, 8, 12] and index.sha256 is None
    assert [shard.key for shard in index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    for sample, number in ((0, 0), (5, 101), (11, 203)):
        tar = (tmp_path / "web" / index.shards[index.shard_of(sample)].key).read_bytes()
        assert tar[index.offset[sample] :][: index.size[sample]] == content(number)
        text = tar[index.json_offset[sample] :][: index.json_size[sample]]
        assert json.loads(text) == {"number": number}


def test_tars_of_webdataset_are_indexed_and_depth_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    with webdataset.TarWriter(str(tmp_path / "web" / "a.tar")) as tar:
        tar.write({"__key__": "one", "jpg": b"first", "depth.png": b"far away", "json": {"n": 1}})
        tar.write({"__key__": "two", "webp": b"second"})
        tar.write({"__key__": "three", "depth.png": b"without a picture"})
    index = index_of(tmp_path / "web", tmp_path / "cache")
    data = (tmp_path / "web" / "a.tar").read_bytes()
    assert [index.key(i) for i in range(len(index))] == ["a/one", "a/two"]
    assert data[index.offset[0] :][: index.size[0]] == b"first"
    assert data[index.depth_offset[0] :][: index.depth_size[0]] == b"far away"
    assert index.depth_size.tolist() == [8, 0] and index.json_size[1] == 0


def test_headers_are_followed_once_until_a_tar_changes(tmp_path: Path) -> None:
    for number in range(2):
        like_img2dataset(tmp_path / "web" / f"{number}.tar", number * 100, 3)
    store = CountingStore(open_store(tmp_path / "web"))
    first = open_index(store, tmp_path / "cache")  # type: ignore[arg-type]
    assert store.reads.keys() == {"0.tar", "1.tar"}
    store.reads.clear()
    again = open_index(store, tmp_path / "cache")  # type: ignore[arg-type]
    assert not store.reads and again.dataset_id == first.dataset_id and listed(again) == listed(first)
    like_img2dataset(tmp_path / "web" / "1.tar", 100, 3)
    touched = open_index(store, tmp_path / "cache")  # type: ignore[arg-type]
    assert store.reads and touched.dataset_id == first.dataset_id
    like_img2dataset(tmp_path / "web" / "1.tar", 100, 4)
    changed = index_of(tmp_path / "web", tmp_path / "cache")
    assert changed.dataset_id != first.dataset_id and len(changed) == 7
    moved = tmp_path / "moved"
    (tmp_path / "web").rename(moved)
    assert index_of(moved, tmp_path / "cache").dataset_id == changed.dataset_id


def test_same_names_in_a_tar_count_once_and_in_two_tars_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.tar", "b/a.tar"):
        write_tar(
            tmp_path / "web" / name, [("x.jpg", b"first"), ("x.png", b"second"), ("x.jpg", b"third"), ("y.jpg", b"y")]
        )
    with caplog.at_level(logging.WARNING):
        index = index_of(tmp_path / "web", tmp_path / "cache")
    assert [index.key(i) for i in range(len(index))] == ["a/x", "a/y", "b/a/x", "b/a/y"]
    assert index.size.tolist() == [5, 1, 5, 1]
    assert "4 pictures have the name of an earlier one" in caplog.text


def test_what_cannot_be_read_is_refused_by_name_or_listed(tmp_path: Path) -> None:
    web = tmp_path / "web"
    like_img2dataset(web / "0.tar", 0, 3)
    cut = like_img2dataset(web / "1.tar", 10, 3)
    cut.write_bytes(cut.read_bytes()[:5000])
    (web / "2.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    (web / "3.tar.gz").write_bytes(b"\x1f\x8b" + bytes(2000))
    with tarfile.open(web / "4.tar", "w") as tar:
        link = tarfile.TarInfo("soft.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    expected = {
        Lost("1.tar", "damaged_tar"),
        Lost("2.tar", "compressed_tar"),
        Lost("3.tar.gz", "compressed_tar"),
        Lost("4.tar/soft.jpg", "special_member"),
    }
    with pytest.raises(DatasetError, match=r"3\.tar\.gz: compressed_tar .* and 1 more; .*data\.on_damage=skip"):
        index_of(web, tmp_path / "cache")
    index = index_of(web, tmp_path / "cache", on_damage="skip")
    assert set(index.lost) == expected and len(index.lost) == 4
    assert [index.key(i) for i in range(len(index))] == [*(f"0/{i:09d}" for i in range(3)), "1/000000010"]
    assert [shard.key for shard in index.shards] == ["0.tar", "1.tar"]
    with pytest.raises(DatasetError, match="damaged_tar"):
        index_of(web, tmp_path / "cache")


def test_an_empty_or_unfinished_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(DatasetError, match=r"expected a dataset \(dataset.json.* or WebDataset tars"):
            index_of(folder, tmp_path / "cache")
    write_tar(tmp_path / "text" / "a.tar", [("a.txt", b"no picture"), ("b.depth.png", b"far")])
    with pytest.raises(DatasetError, match="1 tars without a picture"):
        index_of(tmp_path / "text", tmp_path / "cache")
    write_tar(tmp_path / "half" / "shards" / "ird-000000.tar", [("a.jpg", b"picture")])
    (tmp_path / "half" / "curation").mkdir()
    (tmp_path / "half" / "curation" / "config.yaml").write_text("out: half\n")
    with pytest.raises(DatasetError, match="unfinished dataset"):
        index_of(tmp_path / "half", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*.arrow"))


def test_a_cut_index_file_and_a_killed_build_are_built_anew(small_dataset: Path, tmp_path: Path) -> None:
    index = index_of(small_dataset, tmp_path)
    whole, path = index.path.read_bytes(), index.path
    del index
    for keep in (0, 100, len(whole) - 100):
        path.unlink()  # Whoever has the old file mapped keeps it.
        path.write_bytes(whole[:keep])
        (path.parent / ".tmp-killed").mkdir()
        (path.parent / ".tmp-killed" / "size").write_bytes(b"part")
        assert len(index_of(small_dataset, tmp_path)) > 20
        assert path.read_bytes() == whole
        assert not list(path.parent.glob(".tmp-*"))


_BUILD = """
import sys, pathlib
from infra.storage import open_store
from training.data.index import open_index
index = open_index(open_store(sys.argv[1]), pathlib.Path(sys.argv[2]))
print(index.path.stat().st_ino, index.dataset_id)
"""


def test_many_processes_build_it_once(tmp_path: Path) -> None:
    for number in range(3):
        like_img2dataset(tmp_path / "web" / f"{number}.tar", number * 100, 3)
    command = [sys.executable, "-c", _BUILD, str(tmp_path / "web"), str(tmp_path / "cache")]
    processes = [
        subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in "abc"
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert len({out for out, _ in answers}) == 1 and answers[0][0]
    assert sum(b"[index] 0/3 tars" in error for _, error in answers) == 1


def test_a_folder_that_cannot_be_written_is_named(small_dataset: Path) -> None:
    # Root may write anywhere, but not below /proc.
    with pytest.raises((CacheError, FileNotFoundError), match="/proc/none"):
        index_of(small_dataset, Path("/proc/none"))


_NAMES = st.from_regex(r"(folder/)?[a-zé]{1,3}(\.v1)?\.(jpg|JPG|png|webp|json|txt|depth\.png|cls)", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    tars=st.lists(st.lists(st.tuples(_NAMES, st.binary(max_size=1200)), max_size=12), min_size=1, max_size=3),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_index_agrees_with_tarfile(
    tmp_path_factory: pytest.TempPathFactory, tars: list[list[tuple[str, bytes]]], format: int
) -> None:
    folder = tmp_path_factory.mktemp("tars")
    expected: dict[str, tuple[bytes, bytes, bytes]] = {}
    for number, members in enumerate(tars):
        path = write_tar(folder / "web" / f"{number}.tar", members, format)
        with tarfile.open(path) as tar:
            by_stem: dict[str, dict[str, bytes]] = {}
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                depth = info.name.endswith(".depth.png")
                stem = info.name.removesuffix(".depth.png") if depth else info.name.rpartition(".")[0]
                suffix = info.name.rpartition(".")[2].lower()
                kind = "depth" if depth else "image" if suffix in ("jpg", "png", "webp") else suffix
                by_stem.setdefault(stem, {}).setdefault(kind, file.read())
        for stem, parts in by_stem.items():
            if "image" in parts:
                expected[f"{number}/{stem}"] = (parts["image"], parts.get("json", b""), parts.get("depth", b""))
    if not expected:
        with pytest.raises(DatasetError, match="without a picture"):
            index_of(folder / "web", folder / "cache")
        return
    index = index_of(folder / "web", folder / "cache")
    found = {}
    for i in range(len(index)):
        data = (folder / "web" / index.shards[index.shard_of(i)].key).read_bytes()
        places = (
            (index.offset, index.size),
            (index.json_offset, index.json_size),
            (index.depth_offset, index.depth_size),
        )
        found[index.key(i)] = tuple(data[offset[i] : offset[i] + size[i]] for offset, size in places)
    assert found == expected
    shards = np.array([index.shard_of(i) for i in range(len(index))])
    assert np.all((np.diff(shards) > 0) | (np.diff(index.offset) > 0))
