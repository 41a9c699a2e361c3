"""Whole shards of a remote store on local disk: fetched once a node, shared by its processes, bounded.

::

    <sha256 of the shard>.tar      whole and checked; its modification time says when it was last used
    partial/<name>-<bytes>/        a fetch under way, or what a killed one left
    locks/<name>                   held while a shard is fetched or opened; the kernel frees it when its holder dies

A name says what the bytes are, so datasets that have shards in common share their copies, and the limit holds for all
that lie in the folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.errors import Refusal
from infra.files import sha256_of_file
from infra.storage import NotFoundError, Store

logger = logging.getLogger(__name__)

# How often damage is doubted: it may have come about on the way, or be under repair.
TRIES = 3
_POLL_SECONDS = 0.1
_SAY_AFTER_SECONDS = 30.0


class CacheError(Refusal, OSError):
    """The cache cannot hold what it must. The message names the folder, what is needed and the setting."""


class DamagedShardError(Refusal, RuntimeError):
    """A shard at its store is not the one that the index describes, or is gone."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard as the index knows it: store key, size, and hex sha256 (empty for tars from elsewhere).

    ``version`` tells contents apart where no sha256 does: the store's ETag or modification time.
    """

    key: str
    bytes: int
    sha256: str = ""
    version: str = ""


def pause(attempt: int) -> None:
    """Wait before the next try: twice as long each time, with jitter; ``attempt`` counts from 0."""
    time.sleep(random.uniform(0.5, 1) * 0.1 * 2**attempt)


class ShardCache:
    """Shards of ``store`` below ``folder``, which any number of processes of this node may share.

    Safe between threads and after a fork.
    """

    def __init__(self, store: Store, folder: Path, limit_bytes: int, shards: Sequence[ShardFile] = ()) -> None:
        """``limit_bytes`` must hold any two of ``shards``: one that is read, and the next.

        Raises:
            CacheError: the limit is too small.
        """
        self._store, self._folder, self._limit = store, Path(folder), limit_bytes
        two = sum(sorted((shard.bytes for shard in shards), reverse=True)[:2])
        if two > limit_bytes:
            raise CacheError(
                f"{folder}: a shard cache of {_gib(limit_bytes)} cannot hold two shards of {store.uri}; "
                f"it needs {_gib(two)} or more (data.cache_gib)"
            )
        self._begin()

    def __getstate__(self) -> tuple[Store, Path, int]:
        return self._store, self._folder, self._limit

    def __setstate__(self, state: tuple[Store, Path, int]) -> None:
        self._store, self._folder, self._limit = state
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._wanted: list[ShardFile] = []
        self._fetching = False

    def open(self, shard: ShardFile) -> int:
        """A file descriptor to read the shard from, fetched first where it is not here. It outlives an eviction.

        Raises:
            DamagedShardError: the store's copy differs from the index, or is gone, however often it is asked.
            CacheError: no room on the disk.
            StorageError: the store is away.
        """
        path = self._path(shard)
        try:
            return _opened(path)
        except FileNotFoundError:
            pass
        # Whoever makes room passes over locked shards, so this one cannot go before it is open.
        with _locked(self._lock(path.name)):
            self._ensure(shard)
            return _opened(path)

    def fetch(self, shard: ShardFile) -> Path:
        """The path of the shard, fetched where it is not here. Others may evict it at any time: ``open`` is safe."""
        os.close(self.open(shard))
        return self._path(shard)

    def prefetch(self, shards: Sequence[ShardFile]) -> None:
        """Fetch ``shards`` in the background, in this order; those that another process is fetching are left to it.

        Of one call no more is taken than fills half of the cache, so that what is in use stays.
        """
        if self._pid != os.getpid():
            self._begin()
        size = 0
        with self._turn:
            for shard in shards:
                size += shard.bytes
                if size * 2 <= self._limit and shard not in self._wanted and not self._path(shard).exists():
                    self._wanted.append(shard)
            if self._wanted and not self._fetching:
                self._fetching = True
                threading.Thread(target=self._fetch_wanted, name="shard-prefetch", daemon=True).start()

    def drop(self, shard: ShardFile, descriptor: int) -> None:
        """Forget the copy that ``descriptor`` is open on, found to be damaged; one fetched anew since then stays."""
        path = self._path(shard)
        with _locked(self._lock(path.name)), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                path.unlink()

    def _path(self, shard: ShardFile) -> Path:
        said = "\n".join((self._store.uri, shard.key, str(shard.bytes), shard.version))
        return self._folder / f"{shard.sha256 or hashlib.sha256(said.encode()).hexdigest()}.tar"

    def _lock(self, name: str) -> Path:
        return self._folder / "locks" / name

    def _fetch_wanted(self) -> None:
        while True:
            with self._turn:
                if not self._wanted:
                    self._fetching = False
                    return
                shard = self._wanted.pop(0)
            try:
                with _locked(self._lock(self._path(shard).name), wait=False):
                    self._ensure(shard)
            except BlockingIOError:
                pass
            except Exception as error:  # Whoever reads the shard meets the same, and can raise it.
                logger.warning("prefetch: %s; tried again when it is read", error)

    def _ensure(self, shard: ShardFile) -> None:
        """Have the shard here. Its lock is held."""
        path = self._path(shard)
        if path.exists():
            return
        # Under the lock, so what lies there was left by a process that is dead.
        partial = self._folder / "partial" / f"{path.name}-{shard.bytes}"
        with cache_faults_explained(self._folder, f"a shard of {_gib(shard.bytes)}"):
            self._make_room(shard, partial)
            try:
                self._download(shard, partial / path.name)
                os.utime(partial / path.name)
                (partial / path.name).replace(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _download(self, shard: ShardFile, path: Path) -> None:
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                logger.warning("%s/%s: %s; fetching it again", self._store.uri, shard.key, reason)
                pause(attempt)
            try:
                self._store.download(shard.key, path)
            except NotFoundError:
                reason = "is gone from its store"
                continue
            size = path.stat().st_size
            if size != shard.bytes:
                reason = f"has {size} bytes, the index says {shard.bytes}"
            elif shard.sha256 and sha256_of_file(path) != shard.sha256:
                reason = "does not have the sha256 of shards.parquet"
            else:
                return
        raise DamagedShardError(f"{self._store.uri}/{shard.key}: {reason}, {TRIES} tries")

    def _make_room(self, shard: ShardFile, partial: Path) -> None:
        """Evict down to the limit, this shard and all that are on their way counted; reserve its bytes."""
        waited = 0.0
        while True:
            with _locked(self._folder / "room.lock"):
                shutil.rmtree(partial, ignore_errors=True)
                over = self._on_their_way() + shard.bytes - self._limit
                if self._evict(over):
                    partial.mkdir(parents=True)
                    return
            # What others fetch will be there in a moment, and can be evicted then.
            time.sleep(_POLL_SECONDS)
            waited += _POLL_SECONDS
            if waited >= _SAY_AFTER_SECONDS:
                waited = 0.0
                logger.warning(
                    "%s: %s waits for room: others are being fetched, and data.cache_gib allows %s",
                    *(self._folder, shard.key, _gib(self._limit)),
                )

    def _on_their_way(self) -> int:
        """Bytes that fetches under way will take; what dead processes left is removed."""
        total = 0
        for folder in (self._folder / "partial").glob("*"):
            name, _, size = folder.name.rpartition("-")
            try:
                with _locked(self._lock(name), wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                total += int(size)
        return total

    def _evict(self, over: int) -> bool:
        """Remove the least recently used shards until what is here is at most -``over`` bytes; False if it cannot."""
        here = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(".tar"):
                    status = entry.stat()
                    here.append((status.st_mtime_ns, status.st_size, entry.path))
        over += sum(size for _, size, _ in here)
        for _, size, path in sorted(here):
            if over <= 0:
                break
            with contextlib.suppress(BlockingIOError), _locked(self._lock(Path(path).name), wait=False):
                Path(path).unlink(missing_ok=True)
                over -= size
        return over <= 0


@contextlib.contextmanager
def cache_faults_explained(folder: Path, what: str) -> Iterator[None]:
    """Within it, a disk below ``folder`` that is full or refuses to be written is a CacheError that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, Refusal):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{folder}: the disk is full, {what} does not fit; free some of it, lower data.cache_gib, "
                "or put data.cache on another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CacheError(f"{folder}: cannot be written ({error}); choose another folder with data.cache") from error
        raise


def file_lock(path: Path) -> contextlib.AbstractContextManager[None]:
    """Hold a lock between the processes of this node; the kernel frees it when its holder dies."""
    return _locked(path)


# A forked child inherits descriptors of locks, and would keep them locked beyond the death of its parent.
_held: set[int] = set()


def _close_inherited_locks() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Raises BlockingIOError where another holds it and ``wait`` is off."""
    pid = os.getpid()
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if pid == os.getpid():
            _held.discard(handle)
            # Said aloud: a child that was forked meanwhile may not have closed its copy yet.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _opened(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY)
    os.utime(handle)
    return handle


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
