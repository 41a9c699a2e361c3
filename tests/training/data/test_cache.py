import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import training.data.cache as cache_module
from infra.files import sha256_of_file
from infra.storage import NotFoundError, StorageError, Store, open_store
from tests.support.dataset import REPOSITORY
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.s3 import S3Server
from training.data.cache import CacheError, DamagedShardError, ShardCache, ShardFile

SIZE = 100_000


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardFile]:
    """Six shards in the folder ``store``, each of SIZE bytes."""
    (tmp_path / "store").mkdir()
    made = []
    for number in range(6):
        path = tmp_path / "store" / f"{number}.tar"
        path.write_bytes(np.random.default_rng(number).bytes(SIZE))
        made.append(ShardFile(path.name, SIZE, sha256_of_file(path)))
    return made


def bytes_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def whole(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def reading(cache: ShardCache, shard: ShardFile) -> Iterator[int]:
    handle = cache.open(shard)
    try:
        yield handle
    finally:
        os.close(handle)


class HookedStore:
    """A real store; ``before_download`` is called with the number of the download first."""

    def __init__(self, store: Store, before_download: Callable[[int], None] = lambda number: None) -> None:
        self.store, self.before, self.downloads = store, before_download, 0

    uri = "hooked"

    def download(self, key: str, path: Path) -> None:
        self.downloads += 1
        self.before(self.downloads)
        self.store.download(key, path)


def test_shards_are_fetched_once_and_shared_by_content(tmp_path: Path, shards: list[ShardFile]) -> None:
    store = HookedStore(open_store(tmp_path / "store"))
    cache = ShardCache(store, tmp_path / "cache", 10 * SIZE)  # type: ignore[arg-type]
    for _ in range(2):
        for number, shard in enumerate(shards):
            assert cache.fetch(shard).read_bytes() == bytes_of(number)
    assert store.downloads == 6
    other = ShardCache(store, tmp_path / "cache", 10 * SIZE)  # type: ignore[arg-type]
    other.fetch(ShardFile("elsewhere/renamed.tar", SIZE, shards[0].sha256))
    assert store.downloads == 6


def test_without_a_sha256_another_version_is_another_shard(tmp_path: Path, shards: list[ShardFile]) -> None:
    cache = ShardCache(open_store(tmp_path / "store"), tmp_path / "cache", 10 * SIZE)
    old = cache.fetch(ShardFile("0.tar", SIZE, version="old"))
    (tmp_path / "store" / "0.tar").write_bytes(bytes_of(7))
    assert cache.fetch(ShardFile("0.tar", SIZE, version="old")).read_bytes() == bytes_of(0)
    new = cache.fetch(ShardFile("0.tar", SIZE, version="new"))
    assert new.read_bytes() == bytes_of(7) and new != old


def test_the_least_recently_used_goes_first_and_open_files_survive(tmp_path: Path, shards: list[ShardFile]) -> None:
    cache = ShardCache(open_store(tmp_path / "store"), tmp_path / "cache", 3 * SIZE + 1)
    with reading(cache, shards[0]) as handle:
        for number in (1, 2, 0, 3):  # 0 is used again, so 1 is the oldest.
            cache.fetch(shards[number])
        assert whole(tmp_path / "cache") == {shards[number].sha256 for number in (0, 2, 3)}
        for number in (4, 5):
            cache.fetch(shards[number])
        assert whole(tmp_path / "cache") == {shards[number].sha256 for number in (3, 4, 5)}
        assert os.pread(handle, SIZE, 0) == bytes_of(0)
        assert os.fstat(handle).st_nlink == 0


def test_a_limit_below_two_shards_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    shards = [ShardFile("a", 2**30), ShardFile("b", 3 * 2**30), ShardFile("c", 5 * 2**30)]
    with pytest.raises(CacheError, match=r"7 GiB cannot hold two shards .* needs 8 GiB or more \(data\.cache_gib\)"):
        ShardCache(open_store(tmp_path), tmp_path / "cache", 7 * 2**30, shards)
    ShardCache(open_store(tmp_path), tmp_path / "cache", 8 * 2**30, shards)


def test_damage_is_fetched_again_and_then_named(
    tmp_path: Path, shards: list[ShardFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "pause", lambda attempt: None)
    path = tmp_path / "store" / "0.tar"
    good = path.read_bytes()
    damages = {
        "does not have the sha256 of shards.parquet": good[:-1] + bytes([good[-1] ^ 1]),
        "has 999 bytes, the index says 100000": good[:999],
        "is gone from its store": None,
    }
    for said, data in damages.items():

        def damage(data: bytes | None = data) -> None:
            path.unlink(missing_ok=True)
            if data is not None:
                path.write_bytes(data)

        def repair(number: int) -> None:
            if number == 3:
                path.write_bytes(good)

        damage()
        store = HookedStore(open_store(tmp_path / "store"))
        cache = ShardCache(store, tmp_path / "cache", 3 * SIZE)  # type: ignore[arg-type]
        with pytest.raises(DamagedShardError, match=f"0.tar: {said}, 3 tries"):
            cache.open(shards[0])
        assert store.downloads == 3
        assert not whole(tmp_path / "cache") and not list((tmp_path / "cache" / "partial").iterdir())
        store = HookedStore(open_store(tmp_path / "store"), repair)
        cache = ShardCache(store, tmp_path / "cache", 3 * SIZE)  # type: ignore[arg-type]
        cache.fetch(shards[0]).unlink()
        assert store.downloads == 3


def test_dropping_spares_a_copy_that_was_fetched_since(tmp_path: Path, shards: list[ShardFile]) -> None:
    store = HookedStore(open_store(tmp_path / "store"))
    cache = ShardCache(store, tmp_path / "cache", 3 * SIZE)  # type: ignore[arg-type]
    with reading(cache, shards[0]) as first:
        cache.drop(shards[0], first)
        assert not whole(tmp_path / "cache")
        with reading(cache, shards[0]):
            cache.drop(shards[0], first)
            assert len(whole(tmp_path / "cache")) == 1 and store.downloads == 2


def test_prefetch_fetches_in_the_background_and_fills_half_at_most(tmp_path: Path, shards: list[ShardFile]) -> None:
    cache = ShardCache(open_store(tmp_path / "store"), tmp_path / "cache", 6 * SIZE)
    cache.prefetch(shards)
    expected = {shard.sha256 for shard in shards[:3]}
    wait_until(lambda: whole(tmp_path / "cache") == expected, "prefetched")
    cache.prefetch([shards[5]])
    wait_until(lambda: whole(tmp_path / "cache") == expected | {shards[5].sha256}, "prefetched again")
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_prefetch_leaves_damage_to_the_reader(tmp_path: Path, shards: list[ShardFile]) -> None:
    (tmp_path / "store" / "0.tar").unlink()
    cache = ShardCache(open_store(tmp_path / "store"), tmp_path / "cache", 6 * SIZE)
    cache.prefetch(shards[:2])
    wait_until(lambda: whole(tmp_path / "cache") == {shards[1].sha256}, "the next one comes all the same")


def test_a_prefetch_passes_over_what_another_fetches(tmp_path: Path, shards: list[ShardFile]) -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def wait(number: int) -> None:
        under_way.set()
        assert go_on.wait(60)

    slow = HookedStore(open_store(tmp_path / "store"), wait)
    quick = HookedStore(open_store(tmp_path / "store"))
    thread = threading.Thread(
        target=ShardCache(slow, tmp_path / "cache", 6 * SIZE).fetch, args=[shards[0]], daemon=True
    )  # type: ignore[arg-type]
    thread.start()
    assert under_way.wait(60)
    ShardCache(quick, tmp_path / "cache", 6 * SIZE).prefetch(shards[:2])  # type: ignore[arg-type]
    wait_until(lambda: whole(tmp_path / "cache") == {shards[1].sha256}, "the other one")
    go_on.set()
    thread.join(60)
    assert (slow.downloads, quick.downloads) == (1, 1)


def test_the_limit_holds_while_many_threads_fetch(tmp_path: Path, shards: list[ShardFile]) -> None:
    limit = 2 * SIZE + 1
    cache = ShardCache(open_store(tmp_path / "store"), tmp_path / "cache", limit, shards)
    wrong: list[object] = []
    most = 0

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(6, size=15):
            with reading(cache, shards[number]) as handle:
                if os.pread(handle, SIZE, 0) != bytes_of(number):
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=[seed], daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < deadline
        most = max(most, disk_used(tmp_path / "cache"))
        time.sleep(0.001)
    assert not wrong and 0 < most <= limit and disk_used(tmp_path / "cache") <= limit


def disk_used(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


# What follows needs a server and processes that die.

_FETCH = """
import os, sys, time
from pathlib import Path
from infra.storage import open_store
from training.data.cache import ShardCache, ShardFile
uri, folder, limit, *wanted = sys.argv[1:]
cache = ShardCache(open_store(uri), Path(folder), int(limit))
shards = [ShardFile(key, int(size), sha256) for key, size, sha256 in (word.split(",") for word in wanted)]
"""
_READ_ALL = """
for shard in shards:
    os.close(cache.open(shard))
    print(shard.key, flush=True)
"""
_PREFETCH_AND_FORK = """
cache.prefetch(shards)
while not list(Path(folder, "partial").glob("*/.tmp-*")):
    time.sleep(0.01)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(120)
"""


@pytest.fixture
def far(
    s3_server: S3Server, tmp_path: Path, shards: list[ShardFile], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyProxy, str]]:
    """A proxy before the server, and the uri of a bucket with the shards."""
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(tmp_path / "store")
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy, f"s3://{bucket}"


@contextmanager
def process(uri: str, folder: Path, shards: list[ShardFile], code: str = _READ_ALL) -> Iterator[subprocess.Popen[str]]:
    words = [f"{shard.key},{shard.bytes},{shard.sha256}" for shard in shards]
    command = [sys.executable, "-c", _FETCH + code, uri, str(folder), str(10 * SIZE), *words]
    started = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate(timeout=60)


def test_processes_that_want_the_same_shards_fetch_each_once(
    far: tuple[FaultyProxy, str], tmp_path: Path, shards: list[ShardFile]
) -> None:
    proxy, uri = far
    orders = [shards, shards[::-1], shards]
    with (
        process(uri, tmp_path / "cache", orders[0]) as a,
        process(uri, tmp_path / "cache", orders[1]) as b,
        process(uri, tmp_path / "cache", orders[2]) as c,
    ):
        for started in (a, b, c):
            assert started.wait(120) == 0
    for shard in shards:
        assert len(proxy.seen("GET", shard.key)) == 1
    assert len(whole(tmp_path / "cache")) == 6


def test_a_killed_fetch_leaves_nothing_that_counts_and_who_waits_takes_over(
    far: tuple[FaultyProxy, str], tmp_path: Path, shards: list[ShardFile]
) -> None:
    proxy, uri = far
    cache = tmp_path / "cache"
    proxy.inject("stall_body", path="0.tar", after=50_000, seconds=120)
    with process(uri, cache, shards[:1]) as first:
        wait_until(lambda: proxy.seen("GET", "0.tar"), "the fetch is under way")
        assert len(list(cache.glob("partial/*"))) == 1
        with process(uri, cache, shards[:1]) as second:
            time.sleep(0.5)
            assert second.poll() is None and not whole(cache)
            first.kill()
            assert second.wait(60) == 0
    assert whole(cache) == {shards[0].sha256} and not list(cache.glob("partial/*"))
    assert (cache / f"{shards[0].sha256}.tar").read_bytes() == bytes_of(0)


def test_what_a_killed_fetch_left_is_swept_by_the_next_of_any_shard(
    far: tuple[FaultyProxy, str], tmp_path: Path, shards: list[ShardFile]
) -> None:
    proxy, uri = far
    cache = tmp_path / "cache"
    proxy.inject("stall_body", path="0.tar", after=50_000, seconds=120)
    with process(uri, cache, shards[:1]) as first:
        wait_until(lambda: proxy.seen("GET", "0.tar") and list(cache.glob("partial/*/.tmp-*")), "it is under way")
        first.send_signal(signal.SIGKILL)
        first.wait(60)
    assert list(cache.glob("partial/*/.tmp-*"))
    # Without the sweep the dead fetch would keep its place, and two shards would not fit.
    ShardCache(open_store(uri), cache, 2 * SIZE).fetch(shards[1])
    assert not list(cache.glob("partial/*"))
    ShardCache(open_store(uri), cache, 2 * SIZE).fetch(shards[2])
    assert whole(cache) == {shards[1].sha256, shards[2].sha256}


def test_a_child_forked_during_a_fetch_keeps_no_lock(
    far: tuple[FaultyProxy, str], tmp_path: Path, shards: list[ShardFile]
) -> None:
    proxy, uri = far
    proxy.inject("stall_body", path="0.tar", after=50_000, seconds=120)
    with process(uri, tmp_path / "cache", shards[:1], _PREFETCH_AND_FORK) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: proxy.seen("GET", "0.tar"), "the fetch is under way")
        parent.kill()
        parent.wait(60)
        try:
            os.kill(child, 0)
            got = ShardCache(open_store(uri), tmp_path / "cache", 10 * SIZE).fetch(shards[0])
            assert got.read_bytes() == bytes_of(0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_cut_connections_are_made_up_for(far: tuple[FaultyProxy, str], tmp_path: Path, shards: list[ShardFile]) -> None:
    proxy, uri = far
    proxy.inject("cut_body", path="0.tar", after=1000, times=2)
    assert ShardCache(open_store(uri), tmp_path / "cache", 10 * SIZE).fetch(shards[0]).read_bytes() == bytes_of(0)
    assert [request.outcome for request in proxy.seen("GET", "0.tar")] == ["cut_body", "cut_body", "ok"]


def test_a_store_that_is_away_is_no_damage(far: tuple[FaultyProxy, str], tmp_path: Path) -> None:
    _, uri = far
    cache = ShardCache(open_store(f"{uri}-missing"), tmp_path / "cache", 10 * SIZE)
    with pytest.raises(StorageError, match="does not exist") as caught:
        cache.open(ShardFile("0.tar", SIZE))
    assert not isinstance(caught.value, NotFoundError)


def test_a_full_disk_is_named(tmp_path: Path, shards: list[ShardFile]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        # As an S3 download would: the bytes are written by this process.
        class Writing(HookedStore):
            def download(self, key: str, path: Path) -> None:
                path.write_bytes(self.store.read(key))

        cache = ShardCache(Writing(open_store(tmp_path / "store")), small / "cache", 10 * SIZE)  # type: ignore[arg-type]
        cache.fetch(shards[0])
        cache.fetch(shards[1])
        with pytest.raises(CacheError, match=r"small/cache: the disk is full.*lower data\.cache_gib"):
            cache.fetch(shards[2])
        assert len(whole(small / "cache")) == 2 and not list((small / "cache" / "partial").iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
