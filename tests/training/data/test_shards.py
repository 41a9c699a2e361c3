import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import training.data.shards as shards_module
from datagen.dataset import DatasetError, read_samples, shard_key
from infra.storage import StorageError, open_store
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.s3 import S3Server
from tests.training.data.tars import content, like_img2dataset, write_tar
from training.data.cache import CacheError
from training.data.shards import DamagedSampleError, LostSample, Sample, ShardReader

Mode = Literal["shard", "sample"]


@pytest.fixture
def copy(small_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(small_dataset, tmp_path / "dataset"))


@pytest.fixture
def far(s3_server: S3Server, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyProxy, str, Path]]:
    """A proxy before the server, the uri of a bucket with the dataset, and the folder that is the bucket."""
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(copy)
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy, f"s3://{bucket}", s3_server.root / bucket


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("shards", "cache"):
        monkeypatch.setattr(f"training.data.{module}.pause", lambda attempt: None)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_samples(open_store(folder)).to_pylist()


def stored(folder: Path, row: dict[str, Any]) -> Sample:
    tar = (folder / shard_key(row["shard"])).read_bytes()
    image = tar[row["offset"] :][: row["size"]]
    return Sample(row["key"], image, tar[row["json_offset"] :][: row["json_size"]])


def change(path: Path, offset: int) -> None:
    """Turn a bit, as a rebuilt file would bring it: under a new inode."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_every_sample_comes_as_it_was_packed(small_dataset: Path, tmp_path: Path) -> None:
    reader = ShardReader(str(small_dataset), str(tmp_path))
    rows = rows_of(small_dataset)
    assert len(rows) == len(reader.index) and reader.dataset_id == reader.index.dataset_id
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    expected = [stored(small_dataset, rows[i]) for i in order]
    assert reader.read_many(order, json=True, depth=True) == expected
    assert reader.read_many(order) == [sample._replace(json=b"") for sample in expected]
    assert reader.read(3) == stored(small_dataset, rows[3])._replace(json=b"")
    assert "quality_map" in json.loads(reader.read(3, json=True).json)
    assert reader.read_many([]) == []
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"sample {outside} of {len(rows)}"):
            reader.read(outside)


@pytest.mark.parametrize("fetch", ["shard", "sample"])
def test_a_bucket_reads_as_the_folder_does(
    far: tuple[FaultyProxy, str, Path], small_dataset: Path, tmp_path: Path, fetch: Mode
) -> None:
    proxy, uri, _ = far
    near, there = (
        ShardReader(str(small_dataset), str(tmp_path / "a")),
        ShardReader(uri, str(tmp_path / "b"), 1.0, fetch),
    )
    assert there.dataset_id == near.dataset_id
    proxy.clear()
    order = np.random.default_rng(0).permutation(len(near.index)).tolist()
    for wanted in ({}, {"json": True}):
        assert there.read_many(order, **wanted) == near.read_many(order, **wanted)
    gets = proxy.seen("GET", "/shards/")
    # In one go the picture and its json come in one range.
    assert len(gets) == (len(near.index.shards) if fetch == "shard" else 2 * len(order))
    assert len(list((tmp_path / "b").glob("shards/*.tar"))) == (len(near.index.shards) if fetch == "shard" else 0)


def test_auto_is_shard_and_its_cache_must_hold_two(far: tuple[FaultyProxy, str, Path], tmp_path: Path) -> None:
    _, uri, _ = far
    reader = ShardReader(uri, str(tmp_path / "cache"))
    reader.read(0)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 1
    largest = sorted(shard.bytes for shard in reader.index.shards)[-2:]
    with pytest.raises(CacheError, match="cannot hold two shards"):
        ShardReader(uri, str(tmp_path / "cache"), (sum(largest) - 1) / 2**30)
    ShardReader(uri, str(tmp_path / "cache"), (sum(largest) - 1) / 2**30, "sample")


def test_evicted_shards_are_let_go(far: tuple[FaultyProxy, str, Path], tmp_path: Path) -> None:
    _, uri, _ = far
    reader = ShardReader(uri, str(tmp_path / "cache"))
    size = max(shard.bytes for shard in reader.index.shards)
    reader = ShardReader(uri, str(tmp_path / "cache"), 2 * size / 2**30)
    for _ in range(2):
        for first in reader.index.first[:-1]:
            reader.read(int(first))
            held = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
            cached = [name for name in held if str(tmp_path / "cache" / "shards") in name]
            assert 1 <= len(cached) <= 3 and sum("(deleted)" in name for name in cached) == 0
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) <= 2


def test_prefetched_shards_are_not_fetched_again(far: tuple[FaultyProxy, str, Path], tmp_path: Path) -> None:
    proxy, uri, _ = far
    reader = ShardReader(uri, str(tmp_path / "cache"))
    reader.prefetch([0, 1])
    reader.prefetch([1])
    samples = [int(reader.index.first[shard]) for shard in (0, 1)]
    assert all(isinstance(sample, Sample) for sample in reader.read_many(samples))
    assert len(proxy.seen("GET", "/shards/")) == 2


def test_damage_is_named_and_lost_alone(copy: Path, tmp_path: Path, no_pauses: None) -> None:
    rows = rows_of(copy)
    whole = ShardReader(str(copy), str(tmp_path / "cache")).read_many(range(len(rows)))
    change(copy / shard_key(rows[2]["shard"]), rows[2]["offset"] + 10)
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    with pytest.raises(DamagedSampleError) as caught:
        reader.read(2)
    shard = shard_key(rows[2]["shard"])
    for said in (f"{copy}/{shard}", rows[2]["key"], "sha256", f"python -m datagen verify out={copy}"):
        assert said in str(caught.value)
    found = reader.read_many(range(len(rows)))
    assert found[2] == LostSample(2, rows[2]["key"], shard, str(caught.value))
    assert found[:2] + found[3:] == whole[:2] + whole[3:]
    unchecked = ShardReader(str(copy), str(tmp_path / "cache"), verify=False).read(2)
    assert len(unchecked.image) == rows[2]["size"] and unchecked != whole[2]


def test_a_cut_or_vanished_shard_loses_its_samples_only(copy: Path, tmp_path: Path, no_pauses: None) -> None:
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    first, index = reader.index.first, reader.index
    cut, gone = copy / index.shards[0].key, copy / index.shards[1].key
    cut.write_bytes(cut.read_bytes()[: index.offset[first[1] - 1] + 5])
    gone.unlink()
    found = reader.read_many(range(len(index)))
    lost = [sample.index for sample in found if isinstance(sample, LostSample)]
    assert lost == list(range(first[1] - 1, first[2]))
    reasons = [sample.reason for sample in found if isinstance(sample, LostSample)]
    assert "is cut short" in reasons[0] and all("is gone with its shard" in reason for reason in reasons[1:])


def test_damage_that_is_repaired_meanwhile_is_read(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(copy)
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    expected = reader.read_many([0, 1])
    path = copy / shard_key(rows[0]["shard"])
    good = path.read_bytes()

    def repair(attempt: int) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(good)

    monkeypatch.setattr(shards_module, "pause", repair)
    change(path, rows[0]["offset"])
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    assert reader.read_many([0, 1]) == expected
    path.unlink()
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    assert reader.read_many([0, 1]) == expected


@pytest.mark.parametrize("fetch", ["shard", "sample"])
def test_damage_in_a_bucket_loses_that_sample_alone(
    far: tuple[FaultyProxy, str, Path], tmp_path: Path, no_pauses: None, fetch: Mode
) -> None:
    _, uri, folder = far
    reader = ShardReader(uri, str(tmp_path / "cache"), fetch=fetch)
    index = reader.index
    change(folder / index.shards[0].key, int(index.offset[2]))
    (folder / index.shards[1].key).unlink()
    found = reader.read_many(range(len(index)))
    expected = [2, *range(index.first[1], index.first[2])]
    assert [sample.index for sample in found if isinstance(sample, LostSample)] == expected
    with pytest.raises(DamagedSampleError, match=f"{uri}/{index.shards[1].key}: sample .* is gone with its shard"):
        reader.read(int(index.first[1]))
    reader.prefetch(range(len(index.shards)))  # Those known to be damaged are not tried again.


def test_a_copy_that_is_damaged_in_the_cache_is_fetched_anew(
    far: tuple[FaultyProxy, str, Path], tmp_path: Path, no_pauses: None
) -> None:
    proxy, uri, _ = far
    expected = ShardReader(uri, str(tmp_path / "cache")).read(0)
    (cached,) = (tmp_path / "cache" / "shards").glob("*.tar")
    with open(cached, "r+b") as file:
        file.seek(512)
        file.write(b"\0\0\0\0")
    assert ShardReader(uri, str(tmp_path / "cache")).read(0) == expected
    os.truncate(cached, 600)
    assert ShardReader(uri, str(tmp_path / "cache")).read(0) == expected
    assert len(proxy.seen("GET", "/shards/")) == 3


@pytest.mark.parametrize("fetch", ["shard", "sample"])
def test_cut_connections_are_made_up_for(far: tuple[FaultyProxy, str, Path], tmp_path: Path, fetch: Mode) -> None:
    proxy, uri, folder = far
    reader = ShardReader(uri, str(tmp_path / "cache"), fetch=fetch)
    proxy.inject("cut_body", path="/shards/", after=100, times=2)
    rows = rows_of(folder)
    assert reader.read_many([0, 1, 2], json=True) == [stored(folder, row) for row in rows[:3]]
    assert [request.outcome for request in proxy.seen("GET", "/shards/")].count("cut_body") == 2


def test_a_store_that_is_away_is_no_damage(
    far: tuple[FaultyProxy, str, Path], small_dataset: Path, tmp_path: Path, no_pauses: None
) -> None:
    _, uri, folder = far
    readers = [ShardReader(uri, str(tmp_path / "cache"), fetch=fetch) for fetch in ("shard", "sample")]
    mounted = tmp_path / "mounted"
    shutil.copytree(small_dataset, mounted)
    readers.append(ShardReader(str(mounted), str(tmp_path / "cache")))
    shutil.rmtree(mounted)
    mounted.mkdir()
    folder.rename(tmp_path / "away")
    for reader in readers:
        with pytest.raises(StorageError, match=r"does not exist|nothing is there any more"):
            reader.read_many([0, 1])


def test_a_dataset_that_was_rebuilt_meanwhile_is_no_damage(copy: Path, tmp_path: Path, no_pauses: None) -> None:
    reader = ShardReader(str(copy), str(tmp_path / "cache"))
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**description, "id": "0" * 64}))
    assert isinstance(reader.read(0), Sample)
    (copy / reader.index.shards[0].key).unlink()
    reader = pickle.loads(pickle.dumps(reader))
    with pytest.raises(DatasetError, match="was rebuilt while it was read"):
        reader.read(0)


def test_forked_and_pickled_readers_open_files_of_their_own(far: tuple[FaultyProxy, str, Path], tmp_path: Path) -> None:
    _, uri, folder = far
    readers = {
        "local": ShardReader(str(folder), str(tmp_path / "cache")),
        "shard": ShardReader(uri, str(tmp_path / "cache")),
        "sample": ShardReader(uri, str(tmp_path / "cache"), fetch="sample"),
    }
    expected = [stored(folder, row)._replace(json=b"") for row in rows_of(folder)]
    context = multiprocessing.get_context("fork")
    for reader in readers.values():
        assert reader.read_many(range(4)) == expected[:4]
        reader.prefetch([1, 2])
        assert pickle.loads(pickle.dumps(reader)).read_many(range(4)) == expected[:4]
        with reader._turn:  # As if another thread held it when the process is forked.
            children = [context.Process(target=_read_all, args=(reader, expected), daemon=True) for _ in range(2)]
            for child in children:
                child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0


def _read_all(reader: ShardReader, expected: list[Sample]) -> None:
    assert reader.read_many(range(len(expected))) == expected
    reader.prefetch([0])


def test_threads_share_a_reader(small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_OPEN_SHARDS", 1)
    reader = ShardReader(str(small_dataset), str(tmp_path))
    order = [int(i) for i in np.random.default_rng(0).integers(len(reader.index), size=2000)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.read, order))
    assert [sample.key for sample in found] == [reader.index.key(i) for i in order]
    opened = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert sum(str(small_dataset) in name for name in opened) <= 1


@pytest.mark.parametrize("place", ["folder", "shard", "sample"])
def test_tars_from_elsewhere_are_read(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None, place: str
) -> None:
    like_img2dataset(tmp_path / "web" / "00000.tar", 0, 4)
    far_apart = [("x.jpg", b"picture"), ("y.jpg", bytes(200_000)), ("x.depth.png", b"depth"), ("x.json", b"{}")]
    write_tar(tmp_path / "web" / "00001.tar", far_apart)
    uri, root, fetch = str(tmp_path / "web"), tmp_path / "web", "auto"
    if place != "folder":
        s3_server.take_over(monkeypatch)
        bucket = s3_server.bucket_from(tmp_path / "web")
        uri, root, fetch = f"s3://{bucket}", s3_server.root / bucket, place
    reader = ShardReader(uri, str(tmp_path / "cache"), fetch=fetch)  # type: ignore[arg-type]
    assert reader.read_many([1, 4], json=True, depth=True) == [
        Sample("00000/000000001", content(1), b'{"number": 1}'),
        Sample("00001/x", b"picture", b"{}", b"depth"),
    ]
    (root / "00000.tar").unlink()
    with pytest.raises(DamagedSampleError, match=r"00000\.tar: sample 00000/000000002 .* fetch the tar again"):
        _fresh(reader, tmp_path).read(2)


def _fresh(reader: ShardReader, tmp_path: Path) -> ShardReader:
    """The reader of another process on another machine: nothing open, nothing cached."""
    shutil.rmtree(tmp_path / "cache" / "shards", ignore_errors=True)
    return pickle.loads(pickle.dumps(reader))


def test_on_damage_skip_leaves_out_what_was_damaged_from_the_start(tmp_path: Path) -> None:
    cut = like_img2dataset(tmp_path / "web" / "0.tar", 0, 4)
    cut.write_bytes(cut.read_bytes()[:6000])
    with pytest.raises(DatasetError, match=r"0\.tar: damaged_tar"):
        ShardReader(str(tmp_path / "web"), str(tmp_path / "cache"))
    reader = ShardReader(str(tmp_path / "web"), str(tmp_path / "cache"), on_damage="skip")
    assert reader.read(0).image == content(0) and reader.index.lost


def test_the_folder_of_this_user_is_private(
    small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader = ShardReader(str(small_dataset))
    (folder,) = tmp_path.iterdir()
    assert reader.index.path.is_relative_to(folder) and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", _another(os.getuid()))
    folder.rename(tmp_path / f"ird-shards-{os.getuid()}")
    with pytest.raises(CacheError, match="belongs to another user"):
        ShardReader(str(small_dataset))


def _another(user: int) -> Callable[[], int]:
    return lambda: user + 1
