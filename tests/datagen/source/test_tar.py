import gzip
import io
import os
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from datagen.config import ScanConfig, SourceConfig
from datagen.scan.row import row_of
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import SUFFIXES, Picture, SourceError, list_pictures, read_picture
from datagen.source.tar import FAULTS, index_tar
from infra.storage import Entry, StorageError, Store, open_store
from tests.support.bad_pictures import encode, photo
from tests.support.s3 import S3Server


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def like_img2dataset(first: int, count: int, size: int = 3000) -> bytes:
    """<key>.jpg, <key>.json and <key>.txt a sample, as its WebDataset writer leaves them."""
    members = []
    for index in range(first, first + count):
        key = f"{index:09d}"
        members.append(member(f"{key}.jpg", random.Random(index).randbytes(size + index)))
        members.append(member(f"{key}.json", b'{"key": "%d"}' % index))
        members.append(member(f"{key}.txt", b"caption %d" % index))
    return tar_of(*members)


def listed(folder: Path | str) -> list[Picture]:
    return list_pictures((SourceConfig(uri=str(folder), name="web", licence="CC0"),))[0]


def listed_tar(tmp_path: Path, data: bytes) -> list[Picture]:
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "loose.jpg").write_bytes(b"loose")
    *inside, loose = listed(tmp_path)
    assert loose.key == "loose.jpg"
    return inside


def names(pictures: list[Picture]) -> list[tuple[str, str]]:
    return [(picture.key.removeprefix("a.tar").removeprefix("/"), picture.fault) for picture in pictures]


@dataclass(frozen=True)
class CountingStore:
    """A real store that notes the ranges read of it."""

    store: Store
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((start, length))
        return self.store.read_range(key, start, length)


def test_members_and_loose_pictures_make_one_sorted_listing(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00001.tar").write_bytes(like_img2dataset(10, 3))
    (tmp_path / "shards" / "00000.tar").write_bytes(like_img2dataset(0, 3))
    (tmp_path / "shards" / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "shards" / "00000_stats.json").write_bytes(b"{}")
    (tmp_path / "shards" / "00000.tar-before.jpg").write_bytes(b"loose")
    pictures, others = list_pictures((SourceConfig(uri=str(tmp_path), name="web", licence="CC0"),))
    assert [picture.key for picture in pictures] == [
        "shards/00000.tar-before.jpg",
        *(f"shards/00000.tar/{index:09d}.jpg" for index in range(3)),
        *(f"shards/00001.tar/{index:09d}.jpg" for index in range(10, 13)),
    ]
    assert others == 2
    for index, picture in zip((0, 1, 2, 10, 11, 12), pictures[1:]):
        assert picture.source == f"web/{picture.key}"
        assert picture.licence == "CC0" and not picture.fault
        assert read_picture(picture) == random.Random(index).randbytes(3000 + index)
        assert picture.member is not None and picture.member.text and picture.member.json
        tar = (tmp_path / picture.member.container).read_bytes()
        text, json = (tar[start : start + size] for start, size in (picture.member.text, picture.member.json))
        assert (text, json) == (b"caption %d" % index, b'{"key": "%d"}' % index)
        assert picture.version == str((tmp_path / picture.member.container).stat().st_mtime_ns)
    store = open_store(tmp_path / "out")
    write_batches(store, [pictures])
    assert read_batches(store) == [pictures]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_is_read(tmp_path: Path, format: int) -> None:
    long = "folder/" * 12 + "p" * 90 + ".jpg" if format != tarfile.USTAR_FORMAT else "folder/" * 12 + "p.jpg"
    data = tar_of(member(long, b"long"), member("grün/日本.png", b"wide"), member("b.webp", b"last"), format=format)
    pictures = listed_tar(tmp_path, data)
    assert names(pictures) == [("b.webp", ""), (long, ""), ("grün/日本.png", "")]
    assert [read_picture(picture) for picture in pictures] == [b"last", b"long", b"wide"]


def test_names_are_labels_and_only_plain_files_are_read(tmp_path: Path) -> None:
    data = tar_of(
        member("/etc/absolute.jpg", b"1"),
        member("../../up.jpg", b"2"),
        member("./dot.jpg", b"3"),
        member("photo.v1.0001.jpg", b"4"),
        member("photo.v1.0001.txt", b"dots"),
        member("photo.v2.0001.jpg", b"5"),
        member("line\nbreak.jpg", b"6"),
        member("Case.JPG", b"7"),
        member("case.jpg", b"8"),
        member("latin-\udce9.jpg", b"9"),
        member("empty.jpg"),
        member("folder.jpg", type=tarfile.DIRTYPE),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname="case.jpg"),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("notes.md", b"no picture"),
    )
    pictures = listed_tar(tmp_path, data)
    found = dict(names(pictures))
    assert found == {
        "../../up.jpg": "",
        "./dot.jpg": "",
        "/etc/absolute.jpg": "",
        "Case.JPG": "",
        "case.jpg": "",
        "empty.jpg": "",
        "hard.jpg": "special_member",
        "latin-\\xe9.jpg": "",
        "line\nbreak.jpg": "",
        "photo.v1.0001.jpg": "",
        "photo.v2.0001.jpg": "",
        "pipe.jpg": "special_member",
        "soft.jpg": "special_member",
    }
    read = {picture.key: read_picture(picture) for picture in pictures if not picture.fault}
    assert sorted(read.values()) == [b"", *(b"%d" % digit for digit in range(1, 10))]
    dotted = {picture.key: picture.member for picture in pictures if "photo" in picture.key}
    assert dotted["a.tar/photo.v1.0001.jpg"].text and not dotted["a.tar/photo.v2.0001.jpg"].text


def test_sparse_member_is_a_fault(tmp_path: Path) -> None:
    """A GNU sparse file of PAX format 1.0: its data begin with a map, and are not what the file holds."""
    info, content = member("thin.jpg", b"1\n0\n5\n".ljust(512, b"\0") + b"bytes")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "thin.jpg",
        "GNU.sparse.realsize": "5",
    }
    data = tar_of((info, content), member("after.jpg", b"after"), format=tarfile.PAX_FORMAT)
    assert names(listed_tar(tmp_path, data)) == [("after.jpg", ""), ("thin.jpg", "special_member")]


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    twice = [member("x.jpg", b"first"), member("y.jpg", b"other"), member("x.jpg", b"second"), member("x.jpg", b"3rd")]
    pictures = listed_tar(tmp_path, tar_of(*twice))
    duplicate = "duplicate_member"
    assert names(pictures) == [("x.jpg", ""), ("x.jpg#2", duplicate), ("x.jpg#3", duplicate), ("y.jpg", "")]
    assert read_picture(pictures[0]) == b"first"
    assert len({picture.source for picture in pictures}) == 4


@pytest.mark.parametrize("keep", ["header", "data", "boundary", "long name", "marker"])
def test_what_lies_before_a_cut_is_listed_and_the_loss_is_a_row(tmp_path: Path, keep: str) -> None:
    members = [member("a.jpg", b"a" * 1000), member("b.jpg", b"b" * 1000), member("c" * 200 + ".jpg", b"c" * 1000)]
    data = tar_of(*members)
    # Each of a and b takes a header and two blocks; the third a header and a block for its name more.
    whole, cut = {
        "header": (1, 1536 + 100),
        "data": (1, 1536 + 512 + 999),
        "boundary": (2, 3072),
        "long name": (2, 3072 + 512 + 100),
        "marker": (3, len(data.rstrip(b"\0")) // 512 * 512 + 512),
    }[keep]
    (tmp_path / "a.tar").write_bytes(data[:cut])
    pictures = listed(tmp_path)
    assert [picture.key[:7] for picture in pictures] == ["a.tar", *("a.tar/a", "a.tar/b", "a.tar/c")[:whole]]
    assert (pictures[0].fault, pictures[0].size, pictures[0].member) == ("damaged_tar", cut, None)
    assert [read_picture(picture)[:1] for picture in pictures[1:]] == [b"a", b"b", b"c"][:whole]


@pytest.mark.parametrize("damage", ["checksum", "zeroed", "joined", "negative size"])
def test_damage_in_the_middle_hides_nothing(tmp_path: Path, damage: str) -> None:
    """tarfile by itself ends at each of these as if the tar did."""
    data = bytearray(tar_of(*[member(f"{name}.jpg", name.encode() * 1000) for name in "abcd"]))
    header = slice(2 * 1536, 2 * 1536 + 512)
    if damage == "checksum":
        data[header.start] ^= 1
    elif damage == "zeroed":
        data[header.start : header.start + 1024] = bytes(1024)
    elif damage == "joined":
        data = bytearray(tar_of(member("a.jpg", b"a"), member("b.jpg", b"b"))) + data
    else:
        info = tarfile.TarInfo("c.jpg")
        info.size = -4096
        data[header] = info.tobuf(tarfile.GNU_FORMAT)
    pictures = listed_tar(tmp_path, bytes(data))
    assert names(pictures) == [("", "damaged_tar"), ("a.jpg", ""), ("b.jpg", "")]


def test_every_cut_and_many_mutations_are_noticed_or_harmless(tmp_path: Path) -> None:
    data = tar_of(*[member(f"{i}.jpg", b"x" * 300) for i in range(3)], member("n" * 150 + ".png", b"y"))
    store, path = open_store(tmp_path), tmp_path / "a.tar"
    for cut in range(0, len(data.rstrip(b"\0")) + 1, 37):
        path.write_bytes(data[:cut])
        index = index_tar(store, Entry("a.tar", cut, ""), SUFFIXES)
        assert index.fault == "damaged_tar"
        assert all(picture.member.offset + picture.size <= cut for picture in index.pictures)
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(len(data.rstrip(b"\0")))] = rng.choice((0, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(changed)
        for picture in index_tar(store, Entry("a.tar", len(changed), ""), SUFFIXES).pictures:
            assert 0 <= picture.member.offset <= picture.member.offset + picture.size <= len(changed)


def test_faulty_tars_do_not_hide_good_pictures(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(b"good")
    (tmp_path / "empty.tar").write_bytes(tar_of())
    (tmp_path / "zipped.tar").write_bytes(gzip.compress(like_img2dataset(0, 2)))
    (tmp_path / "nothing.tar").write_bytes(b"")
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    (tmp_path / "shard.tar.gz").write_bytes(gzip.compress(like_img2dataset(0, 2)))
    pictures, others = list_pictures((SourceConfig(uri=str(tmp_path)),))
    assert [(picture.key, picture.fault) for picture in pictures] == [
        ("good.jpg", ""),
        ("nothing.tar", "damaged_tar"),
        ("page.tar", "damaged_tar"),
        ("zipped.tar", "compressed_tar"),
    ]
    assert others == 1
    assert {picture.fault for picture in pictures} - {""} <= set(FAULTS)
    row = row_of(pictures[3], ScanConfig(), 0)
    assert (row["verdict"], row["reason"]) == ("failed", "compressed_tar")


def test_compressed_tars_are_named_when_there_is_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"inside \.tar.*passed over a\.tar\.gz: decompress it"):
        listed(tmp_path)
    assert "1 compressed tars are passed over" in caplog.text
    (tmp_path / "b.tar").write_bytes(gzip.compress(like_img2dataset(0, 2)))
    with pytest.raises(SourceError, match=r"b\.tar: compressed_tar: .*decompress it"):
        listed(tmp_path)


def test_a_tar_that_goes_or_shrinks_after_the_listing_gives_no_wrong_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(like_img2dataset(0, 3))
    store = open_store(tmp_path)
    entry = store.stat("a.tar")
    last = listed(tmp_path)[-1]
    os.truncate(tmp_path / "a.tar", 8000)
    with pytest.raises(StorageError, match="was cut since it was listed"):
        read_picture(last)
    assert index_tar(store, entry, SUFFIXES).fault == "damaged_tar"
    (tmp_path / "a.tar").unlink()
    assert index_tar(store, entry, SUFFIXES).fault == "missing"


def test_only_headers_are_read(tmp_path: Path) -> None:
    """Members above the window cost a read each, those below share one; this is what the listing of a bucket costs."""
    (tmp_path / "large.tar").write_bytes(like_img2dataset(0, 20, size=1_000_000))
    (tmp_path / "small.tar").write_bytes(like_img2dataset(0, 500, size=500))
    for name, pictures, reads, share in (("large.tar", 20, 22, 0.1), ("small.tar", 500, 30, 1.05)):
        size = (tmp_path / name).stat().st_size
        store = CountingStore(open_store(tmp_path))
        index = index_tar(store, Entry(name, size, ""), SUFFIXES)  # type: ignore[arg-type]
        assert len(index.pictures) == pictures and not index.fault
        assert len(store.ranges) <= reads
        assert sum(length for _, length in store.ranges) < share * size


def test_tars_are_indexed_by_the_cluster_in_order(ray_cluster: None, tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number:05d}.tar").write_bytes(like_img2dataset(number * 10, 4, size=100))
    (tmp_path / "00003.tar").write_bytes((tmp_path / "00003.tar").read_bytes()[:2048])
    pictures = listed(tmp_path)
    assert [picture.key for picture in pictures if picture.fault] == ["00003.tar"]
    assert [picture.key for picture in pictures] == sorted(picture.key for picture in pictures)
    assert len(pictures) == 10 * 4 + 2


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    s3_server.take_over(monkeypatch)
    folder, twin = tmp_path / "folder", tmp_path / "twin"
    for place in (folder, twin):
        (place / "shards").mkdir(parents=True)
        (place / "shards" / "00000.tar").write_bytes(like_img2dataset(0, 12, size=300_000))
        (place / "shards" / "00001.tar").write_bytes(like_img2dataset(20, 3)[:9000])
        (place / "loose.jpg").write_bytes(encode(photo(), "JPEG"))
    yield folder, f"s3://{s3_server.bucket_from(twin)}"


def test_a_bucket_lists_and_reads_as_the_folder_does(bucket: tuple[Path, str]) -> None:
    folder, uri = bucket
    local, remote = listed(folder), listed(uri)
    assert [(p.source, p.key, p.size, p.member, p.fault) for p in remote] == [
        (p.source, p.key, p.size, p.member, p.fault) for p in local
    ]
    assert [picture.fault for picture in remote].count("damaged_tar") == 1
    for there, here in zip(remote, local):
        if not there.fault:
            assert read_picture(there) == read_picture(here)
    store = CountingStore(open_store(uri))
    (entry,) = [entry for entry in store.store.list("shards/") if entry.key.endswith("00000.tar")]
    assert len(index_tar(store, entry, SUFFIXES).pictures) == 12  # type: ignore[arg-type]
    assert sum(length for _, length in store.ranges) < entry.size / 3
