"""Read samples of a dataset or of tars from elsewhere, local or remote, each checked against its sha256.

How a remote store is read: ``shard`` fetches whole shards into a cache on local disk that all processes of a node
share. Every node fetches nearly every shard in every epoch that does not fit its cache, so it is right for one or few
nodes, for shards that fit, and for stores that answer slowly or charge by the request. ``sample`` fetches the bytes of
each sample and no more, over many connections at once, and keeps nothing: right for many nodes, where a node needs
only its share of a shard. ``auto`` is ``shard``. A local folder is read in place, whatever was chosen.
"""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datagen.dataset import DATASET, DatasetError, read_dataset_json
from infra.errors import Refusal
from infra.storage import NotFoundError, StorageError, Store, open_store
from training.data.cache import TRIES, CacheError, DamagedShardError, ShardCache, pause
from training.data.index import Index, open_index

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 64
_CONNECTIONS = 16
# A gap that costs less to read than another request.
_GAP = 64 * 1024
# How often a cached shard that stays open is marked as in use.
_TOUCH_SECONDS = 10.0


class DamagedSampleError(Refusal, RuntimeError):
    """A sample's bytes are not those that were packed, or are gone. The message names shard, sample and repair."""


class Sample(NamedTuple):
    """A sample as it is stored; ``json`` and ``depth`` are empty where it has none or they were not asked for."""

    key: str
    image: bytes
    json: bytes = b""
    depth: bytes = b""


@dataclass(frozen=True, slots=True)
class LostSample:
    """A sample that cannot be read. ``reason`` is a sentence that names the shard, the sample and the repair."""

    index: int
    key: str
    shard: str
    reason: str


class _DamageError(Exception):
    """What is wrong with the bytes that came, to be said of a sample."""


class _GoneError(_DamageError):
    """No sample of the shard will come."""


class ShardReader:
    """Random access to samples. Pickles without its open files; safe after a fork and between threads."""

    def __init__(
        self,
        dataset_uri: str,
        cache: str = "",
        cache_gib: float = 50.0,
        fetch: Literal["auto", "shard", "sample"] = "auto",
        *,
        verify: bool = True,
        on_damage: Literal["stop", "skip"] = "stop",
    ) -> None:
        """Open the index, or build it where this machine has none yet.

        Args:
            dataset_uri: a folder or ``s3://bucket/prefix`` with dataset.json, or with WebDataset tars.
            cache: folder for the index and remote shards, on a local disk, shared by the processes of this node;
                empty: one of this user below the system's temporary folder.
            cache_gib: limit of the shards in ``cache``; the index comes on top (see ``training.data.index``).
            fetch: see the module.
            verify: compare every picture with its sha256, where the index has it.
            on_damage: what to do about damage that shows when tars are first indexed, see ``open_index``.

        Raises:
            DatasetError, CacheError, StorageError: see ``open_index``; and the cache must hold two shards.
        """
        self.store: Store = open_store(dataset_uri)
        folder = Path(cache).expanduser() if cache else _folder_of_this_user()
        self.index: Index = open_index(self.store, folder, on_damage)
        self._verify = verify
        self._remote = "://" in self.store.uri
        self._cache: ShardCache | None = None
        if self._remote and fetch != "sample":
            self._cache = ShardCache(self.store, folder / "shards", int(cache_gib * 2**30), self.index.shards)
        self._begin()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.store, self.index, self._verify, self._remote, self._cache

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.store, self.index, self._verify, self._remote, self._cache = state
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._files: OrderedDict[int, _OpenShard] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        # Shards found to be damaged or gone, so that not each of their samples is a wait for what does not come.
        self._damaged: dict[int, str] = {}

    @property
    def dataset_id(self) -> str:
        """64 hex digits that change with the content, see ``Index.dataset_id``."""
        return self.index.dataset_id

    def read(self, sample: int, *, json: bool = False, depth: bool = False) -> Sample:
        """Sample number ``sample`` of the index.

        Raises:
            DamagedSampleError: it cannot be read as it was packed, however often it is tried.
            StorageError: the store is away.
            CacheError: no room for its shard.
        """
        (found,) = self.read_many([sample], json=json, depth=depth)
        if isinstance(found, LostSample):
            raise DamagedSampleError(found.reason)
        return found

    def read_many(
        self, samples: Sequence[int], *, json: bool = False, depth: bool = False
    ) -> list[Sample | LostSample]:
        """The samples of these numbers, in order, or a LostSample in place of one that ``read`` would raise for.

        Raises:
            StorageError: the store is away. That is no damage.
            CacheError: no room for a shard.
        """
        self._own_process()

        def read(sample: int) -> Sample | LostSample:
            return self._read_or_lose(int(sample), json, depth)

        if not self._remote or self._cache or len(samples) == 1:
            return [read(sample) for sample in samples]
        with self._turn:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_CONNECTIONS, "sample-fetch")
        return list(self._pool.map(read, samples))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch shards of these numbers into the cache in the background; nothing to do where there is no cache."""
        self._own_process()
        if self._cache:
            self._cache.prefetch([self.index.shards[shard] for shard in shards if shard not in self._damaged])

    def _own_process(self) -> None:
        # What a fork brought along is the parent's: its threads are not here, its locks may be held for ever.
        if self._pid != os.getpid():
            self._begin()

    def _read_or_lose(self, sample: int, json: bool, depth: bool) -> Sample | LostSample:
        if not 0 <= sample < len(self.index):
            raise IndexError(f"sample {sample} of {len(self.index)}")
        shard = self.index.shard_of(sample)
        gone = False
        reason = self._damaged.get(shard, "")
        # Of a shard whose checksum fails, most samples may be good; the store is asked for each.
        tries = 1 if reason else TRIES
        for attempt in range(tries):
            if attempt:
                logger.warning("%s/%s: sample %s: %s; reading it again", *self._names(shard, sample), reason)
                pause(attempt)
            try:
                return self._read_once(sample, shard, json, depth)
            except _DamageError as damage:
                reason, gone = str(damage), isinstance(damage, _GoneError)
        if gone:
            self._damaged[shard] = reason
        return self._lost(sample, shard, reason)

    def _read_once(self, sample: int, shard: int, json: bool, depth: bool) -> Sample:
        index = self.index
        wanted = [(int(index.offset[sample]), int(index.size[sample]))]
        wanted.append((int(index.json_offset[sample]), int(index.json_size[sample])) if json else (0, 0))
        wanted.append((int(index.depth_offset[sample]), int(index.depth_size[sample])) if depth else (0, 0))
        read, damaged = self._source(shard)
        parts = _read_parts(read, wanted)
        if any(len(part) != size for part, (_, size) in zip(parts, wanted)):
            damaged()
            raise _DamageError("is cut short")
        if (
            self._verify
            and index.sha256 is not None
            and hashlib.sha256(parts[0]).digest() != index.sha256[sample].tobytes()
        ):
            damaged()
            raise _DamageError("does not have the sha256 of samples.parquet")
        return Sample(index.key(sample), *parts)

    def _source(self, shard: int) -> tuple[Callable[[int, int], bytes], Callable[[], None]]:
        """A function (start, length) → bytes of a shard, and what to do when those bytes are damaged."""
        if self._remote and (not self._cache or shard in self._damaged):
            return lambda start, length: self._read_range(shard, start, length), lambda: None
        try:
            opened = self._opened(shard)
        except DamagedShardError as damage:
            logger.warning("%s; its samples are now read one by one", damage)
            self._damaged[shard] = str(damage)
            return self._source(shard)

        def damaged() -> None:
            if self._cache:
                self._cache.drop(self.index.shards[shard], opened.handle)
            with self._turn:
                self._files.pop(shard, None)

        return opened.read, damaged

    def _read_range(self, shard: int, start: int, length: int) -> bytes:
        try:
            return self.store.read_range(self.index.shards[shard].key, start, length)
        except NotFoundError:
            raise _GoneError("is gone with its shard") from None

    def _opened(self, shard: int) -> "_OpenShard":
        with self._turn:
            opened = self._files.get(shard)
            if opened:
                self._files.move_to_end(shard)
        if opened:
            if self._cache:
                opened.touch()
            return opened
        opened = _OpenShard(self._descriptor(shard))
        with self._turn:
            # The disk of an evicted shard is free only when nobody has it open.
            for number in [number for number, file in self._files.items() if self._cache and file.is_evicted()]:
                del self._files[number]
            while len(self._files) >= _OPEN_SHARDS:
                self._files.popitem(last=False)
            self._files[shard] = opened
        return opened

    def _descriptor(self, shard: int) -> int:
        file = self.index.shards[shard]
        if self._cache:
            return self._cache.open(file)
        try:
            return os.open(Path(self.store.uri, file.key), os.O_RDONLY)
        except FileNotFoundError:
            raise _GoneError("is gone with its shard") from None
        except OSError as error:
            raise StorageError(f"{self.store.uri}/{file.key}: {error}") from error

    def _lost(self, sample: int, shard: int, reason: str) -> LostSample:
        """What is known of a sample that cannot be read, once it is sure that the dataset itself is still there."""
        uri, name, key = self._names(shard, sample)
        ours = self.index.sha256 is not None
        if ours and self.store.exists(DATASET):
            now = read_dataset_json(self.store)["id"]
            if now != self.dataset_id:
                raise DatasetError(
                    f"{uri}: was rebuilt while it was read: dataset {self.dataset_id} is now {now}; start again with it"
                )
        elif ours or next(iter(self.store.list()), None) is None:
            raise StorageError(f"{uri}: nothing is there any more; is it mounted?")
        repair = f"run: python -m datagen verify out={uri}" if ours else "fetch the tar again"
        return LostSample(sample, key, name, f"{uri}/{name}: sample {key} {reason}; {repair}")

    def _names(self, shard: int, sample: int) -> tuple[str, str, str]:
        return self.store.uri, self.index.shards[shard].key, self.index.key(sample)


class _OpenShard:
    """An open shard, closed when the last thread that reads it lets go of it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._touched = time.monotonic()

    def __del__(self) -> None:
        os.close(self.handle)

    def read(self, start: int, length: int) -> bytes:
        try:
            return os.pread(self.handle, length, start)
        except OSError as error:
            raise StorageError(f"a shard that was open: {error}") from error

    def touch(self) -> None:
        """Mark it as in use, for those who evict what was not used for longest."""
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            os.utime(self.handle)

    def is_evicted(self) -> bool:
        return os.fstat(self.handle).st_nlink == 0


def _read_parts(read: Callable[[int, int], bytes], wanted: Sequence[tuple[int, int]]) -> list[bytes]:
    """The byte ranges (offset, size), shorter where the shard ends; those that lie together in one read."""
    runs: list[tuple[int, int]] = []
    for offset, size in sorted(part for part in wanted if part[1]):
        if runs and offset - runs[-1][1] <= _GAP:
            runs[-1] = (runs[-1][0], max(runs[-1][1], offset + size))
        else:
            runs.append((offset, offset + size))
    pieces = [(start, read(start, end - start)) for start, end in runs]
    parts = []
    for offset, size in wanted:
        start, piece = next(((s, p) for (s, p), (_, end) in zip(pieces, runs) if s <= offset < end), (offset, b""))
        parts.append(piece[offset - start : offset - start + size] if size else b"")
    return parts


def _folder_of_this_user() -> Path:
    folder = Path(tempfile.gettempdir()) / f"ird-shards-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CacheError(f"{folder}: belongs to another user; choose a folder with data.cache")
    return folder
