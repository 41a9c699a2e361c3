"""Where every sample lies: one memory-mapped file, built once a machine, that all processes of it share.

Two kinds of source, told apart by ``dataset.json``: the layout of ``datagen/dataset.py``, and WebDataset tars from
elsewhere (img2dataset and the like), whose headers are followed once. The file is Arrow IPC with one uncompressed
record batch, so its columns are numpy views of the page cache: 8 million samples take some 0.8 GB of disk and of
memory that the kernel may drop, but next to none that is private to a process.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datagen.dataset import (
    DATASET,
    SAMPLES,
    DatasetError,
    read_dataset_json,
    read_shards,
    shard_key,
)
from datagen.progress import Progress
from datagen.source.tar import COMPRESSED_SUFFIXES, FAULTS, TarPicture, index_tar
from infra.files import publish_atomically, sha256_of_file
from infra.storage import Entry, Store
from training.data.cache import ShardFile, cache_faults_explained, file_lock

logger = logging.getLogger(__name__)

# Part of the name of the file: another layout makes another file.
_FILE = "index-1.arrow"
_DEPTH_SUFFIX = ".depth.png"
_BATCH_ROWS = 65536
# Following the headers of a tar is waiting for answers of the store.
_THREADS = 8
# What the last columns of an index without them would say.
_PLACES = ("offset", "size", "json_offset", "json_size", "depth_offset", "depth_size")
_READ = ("key", "shard", "offset", "size", "json_offset", "json_size", "sha256")


class Lost(NamedTuple):
    """A tar, or a member of one, that no sample can be read from, or not all; ``fault`` is a key of FAULTS."""

    name: str
    fault: str


class Index:
    """The samples of a dataset, in order of shard, then of their place in it. Pickles as the path of its file.

    Attributes:
        path: of the file.
        dataset_id: 64 hex digits: the dataset's id; for tars from elsewhere a hash over their names, sizes and ETags,
            and the names and places of the members.
        shards: the shards that hold samples.
        first: int64 [shards + 1], shard s holds the samples first[s] … first[s + 1] - 1.
        offset, size: int64 [N], where the picture's bytes lie in its shard.
        json_offset, json_size: int64 [N], of its json; size 0: it has none.
        depth_offset, depth_size: int64 [N], of ``<stem>.depth.png``; size 0: it has none.
        sha256: uint8 [N, 32], of the picture's bytes; None for tars from elsewhere.
        lost: what of the source cannot be read.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that ``open_index`` made.

        Raises:
            pyarrow.ArrowInvalid, FileNotFoundError: it is not there, or not whole.
        """
        self.path = Path(path)
        with pa.ipc.open_file(pa.memory_map(str(path))) as file:
            self._table = file.read_all()
        facts = json.loads(self._table.schema.metadata[b"ird"])
        self.dataset_id: str = facts["dataset_id"]
        self.shards = tuple(ShardFile(*shard) for shard in facts["shards"])
        self.first = np.concatenate([[0], np.cumsum(facts["samples"], dtype=np.int64)])
        self.lost = tuple(Lost(*lost) for lost in facts["lost"])
        self._key = self._column("key")
        rows = self._table.num_rows
        for name in _PLACES:
            known = name in self._table.column_names
            setattr(self, name, self._values(name, np.int64)[:rows] if known else np.broadcast_to(np.int64(0), rows))
        self.sha256: np.ndarray | None = None
        if "sha256" in self._table.column_names:
            self.sha256 = self._values("sha256", np.uint8)[: rows * 32].reshape(rows, 32)

    offset: np.ndarray
    size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    depth_offset: np.ndarray
    depth_size: np.ndarray

    def __len__(self) -> int:
        return self._table.num_rows

    def __reduce__(self) -> tuple[type["Index"], tuple[Path]]:
        return Index, (self.path,)

    def key(self, sample: int) -> str:
        """The name of a sample, unique in the dataset; in tars from elsewhere ``<tar>/<member>``, without suffixes."""
        return str(self._key[sample].as_py())

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def _values(self, name: str, kind: type[np.generic]) -> np.ndarray:
        # What to_numpy gives, which would import pandas: 20 MB in every process.
        return np.frombuffer(self._column(name).buffers()[1], kind)

    def _column(self, name: str) -> pa.Array:
        (chunk,) = self._table.column(name).chunks
        return chunk


def open_index(store: Store, cache: Path, on_damage: Literal["stop", "skip"] = "stop") -> Index:
    """The index of the dataset or of the tars at ``store``, built below ``cache`` unless it is there.

    It is found again by the dataset's id, or by a hash of the listing of the tars. Several processes may ask at the
    same time: one builds it, the others wait for it. Building takes memory for a batch of rows, and disk for twice
    the file.

    Args:
        on_damage: what to do about tars and members that cannot be read: ``stop`` refuses the source, ``skip`` leaves
            them out and lists them in ``Index.lost``. Of a damaged tar, the members before the damage count.

    Raises:
        DatasetError: there is no dataset and no tar with pictures, the tables are not those of dataset.json, or
            ``on_damage`` is ``stop`` and something cannot be read.
        CacheError: no room for the file.
        StorageError: the store is away.
    """
    if store.exists(DATASET):
        description = read_dataset_json(store)
        identity = str(description["id"])
        if not re.fullmatch("[0-9a-f]{64}", identity):
            raise DatasetError(f"{store.uri}/{DATASET}: id={identity!r} is not 64 hex digits; pack the dataset again")
        return _open_or_build(cache / identity, lambda path: _build_from_dataset(store, description, path))
    tars, lost = _list_tars(store)
    index = _open_or_build(
        cache / _hash_of_listing(store, tars, lost), lambda path: _build_from_tars(store, tars, lost, path)
    )
    if index.lost:
        told = "; ".join(f"{name}: {fault} ({FAULTS[fault]})" for name, fault in index.lost[:3])
        more = f"; and {len(index.lost) - 3} more" if len(index.lost) > 3 else ""
        if on_damage == "stop":
            raise DatasetError(f"{store.uri}: {told}{more}; or go on without: data.on_damage=skip")
        logger.warning("%s: going on without %d tars or members: %s%s", store.uri, len(index.lost), told, more)
    return index


def _open_or_build(folder: Path, build: Callable[[Path], None]) -> Index:
    path = folder / _FILE
    with contextlib.suppress(FileNotFoundError, pa.ArrowInvalid):
        return Index(path)
    with cache_faults_explained(folder, "the index"), file_lock(folder / "index.lock"):
        with contextlib.suppress(FileNotFoundError, pa.ArrowInvalid):
            return Index(path)
        # Under the lock, so what lies there was left by a process that is dead.
        for left in folder.glob(".tmp-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        build(path)
    return Index(path)


def _build_from_dataset(store: Store, description: dict[str, Any], path: Path) -> None:
    shards = read_shards(store)
    expected = shards["samples"].to_numpy()
    counts = np.zeros(len(expected), np.int64)
    last = (-1, -1)
    with _Columns(path) as columns, _local_copy(store, SAMPLES, path.parent) as tables:
        if sha256_of_file(tables) != description["files"][SAMPLES]:
            raise DatasetError(
                f"{store.uri}/{SAMPLES}: not the table {DATASET} describes; `python -m datagen pack` rewrites it"
            )
        # What is buffered ahead would be held until the last row group is read.
        for batch in pq.ParquetFile(tables, pre_buffer=False).iter_batches(_BATCH_ROWS, columns=list(_READ)):
            shard = pc.index_in(batch["shard"], value_set=shards["name"]).fill_null(-1).to_numpy()
            places = {name: batch[name].to_numpy() for name in _PLACES if name in _READ}
            if not len(shard):
                continue
            before = np.array([last], np.int64).T
            row = np.concatenate([before, [shard, places["offset"]]], axis=1)
            step = np.diff(row, axis=1)
            if shard.min() < 0 or not np.all((step[0] > 0) | ((step[0] == 0) & (step[1] > 0))):
                raise DatasetError(f"{store.uri}/{SAMPLES}: not in order of shard and offset; pack the dataset again")
            last = (int(shard[-1]), int(places["offset"][-1]))
            counts += np.bincount(shard, minlength=len(counts))
            digests = np.frombuffer(bytes.fromhex("".join(batch["sha256"].to_pylist())), np.uint8)
            columns.add(batch["key"], {**places, "sha256": digests})
        if not np.array_equal(counts, expected):
            raise DatasetError(f"{store.uri}/{SAMPLES}: not as many samples as shards.parquet says; pack it again")
        if not columns.rows:
            raise DatasetError(f"{store.uri}: a dataset without samples; its curation/summary.json says why")
        files = zip(shards["name"].to_pylist(), shards["bytes"].to_pylist(), shards["sha256"].to_pylist())
        described = [ShardFile(shard_key(name), size, sha256) for name, size, sha256 in files]
        columns.publish(str(description["id"]), described, counts, ())


@contextlib.contextmanager
def _local_copy(store: Store, key: str, folder: Path) -> Iterator[Path]:
    if "://" not in store.uri:
        yield Path(store.uri, key)
        return
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        path = Path(temporary) / "table"
        store.download(key, path)
        yield path


def _list_tars(store: Store) -> tuple[list[Entry], list[Lost]]:
    """The tars at a place without dataset.json, and those that are compressed."""
    expected = "a dataset (dataset.json, of `python -m datagen build`), or WebDataset tars of pictures (*.tar)"
    tars, lost = [], []
    for entry in store.list():
        name = entry.key.lower()
        if name.startswith("curation/"):
            raise DatasetError(f"{store.uri}: an unfinished dataset, without {DATASET}; run `python -m datagen build`")
        if name.endswith(".tar"):
            tars.append(entry)
        elif name.endswith(COMPRESSED_SUFFIXES):
            lost.append(Lost(entry.key, "compressed_tar"))
    if not tars and not lost:
        raise DatasetError(f"{store.uri}: nothing to read here; expected {expected}")
    return tars, lost


def _hash_of_listing(store: Store, tars: Sequence[Entry], lost: Sequence[Lost]) -> str:
    listed = [store.uri, [(tar.key, tar.size, tar.version) for tar in tars], lost]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class _TarRows(NamedTuple):
    shard: ShardFile
    keys: pa.Array
    places: np.ndarray  # little-endian int64 [6, members], the rows being _PLACES
    lost: list[Lost]
    duplicates: int


def _build_from_tars(store: Store, tars: Sequence[Entry], lost: Sequence[Lost], path: Path) -> None:
    # It imports Ray, which takes a second and 100 MB, and processes that find the index built never need it.
    from datagen.source.listing import SUFFIXES

    progress = Progress("index", len(tars), "tars")
    identity = hashlib.sha256()
    faults = list(lost)
    shards, counts, duplicates = [], [], 0
    with _Columns(path) as columns:
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for rows in pool.map(lambda tar: _rows_of_tar(store, tar, SUFFIXES), tars):
                identity.update(
                    json.dumps([rows.shard.key, rows.shard.bytes, rows.shard.version, rows.keys.to_pylist()]).encode()
                )
                identity.update(rows.places.tobytes())
                faults += rows.lost
                duplicates += rows.duplicates
                if len(rows.keys):
                    shards.append(rows.shard)
                    counts.append(len(rows.keys))
                    columns.add(rows.keys, dict(zip(_PLACES, rows.places)))
                progress.advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
        progress.finish()
        if duplicates:
            logger.warning(
                "%s: %d pictures have the name of an earlier one in their tar, which counts", store.uri, duplicates
            )
        if not columns.rows:
            told = "".join(f"; {name}: {fault} ({FAULTS[fault]})" for name, fault in faults[:3])
            raise DatasetError(f"{store.uri}: {len(tars)} tars without a picture ({', '.join(SUFFIXES)}){told}")
        columns.publish(identity.hexdigest(), shards, counts, faults)


def _rows_of_tar(store: Store, tar: Entry, suffixes: tuple[str, ...]) -> _TarRows:
    index = index_tar(store, tar, suffixes)
    lost = [Lost(tar.key, index.fault)] if index.fault else []
    pictures: dict[str, TarPicture] = {}
    depths: dict[str, tuple[int, int]] = {}
    duplicates = 0
    for picture in index.pictures:
        depth = picture.name.lower().endswith(_DEPTH_SUFFIX)
        stem = picture.name[: -len(_DEPTH_SUFFIX)] if depth else picture.name.rpartition(".")[0]
        if picture.fault:
            lost.append(Lost(f"{tar.key}/{picture.name}", picture.fault))
        elif depth:
            depths.setdefault(stem, (picture.member.offset, picture.size))
        elif stem in pictures:
            duplicates += 1
        else:
            pictures[stem] = picture
    nothing = (0, 0)
    places = [
        (picture.member.offset, picture.size, *(picture.member.json or nothing), *depths.get(stem, nothing))
        for stem, picture in pictures.items()
    ]
    folder = tar.key.removesuffix(".tar")
    keys = pa.array([f"{folder}/{stem}" for stem in pictures], pa.string())
    # A file's time of modification is no part of what it holds; an ETag is.
    shard = ShardFile(tar.key, tar.size, version=tar.version if "://" in store.uri else "")
    return _TarRows(shard, keys, np.array(places, "<i8").reshape(-1, len(_PLACES)).T.copy(), lost, duplicates)


class _Columns:
    """Columns that grow on disk, piece by piece, until they are published as one record batch."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._key_bytes = 0
        self._files: dict[str, BinaryIO] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "_Columns":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".tmp-", dir=self._path.parent)
        self._folder = Path(self._open.enter_context(temporary))
        self._file("key_ends").write(np.int64(0).tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, keys: pa.Array, columns: dict[str, np.ndarray]) -> None:
        """Append rows: their keys, int64 [n] arrays, and ``sha256`` uint8 [n * 32]."""
        ends = self._key_bytes + np.cumsum(pc.binary_length(keys).to_numpy(), dtype=np.int64)
        self._file("key_ends").write(ends.tobytes())
        self._file("key_bytes").write("".join(keys.to_pylist()).encode())
        self._key_bytes = int(ends[-1])
        self.rows += len(keys)
        for name, values in columns.items():
            self._file(name).write(np.ascontiguousarray(values).tobytes())

    def publish(self, identity: str, shards: Sequence[ShardFile], counts: Any, lost: Sequence[Lost]) -> None:
        """Write the index file in one step. ``counts``: how many samples each shard holds."""
        facts = {
            "dataset_id": identity,
            "shards": [(shard.key, shard.bytes, shard.sha256, shard.version) for shard in shards],
            "samples": [int(count) for count in counts],
            "lost": list(lost),
        }
        for file in self._files.values():
            file.close()
        mapped = {name: pa.py_buffer(np.memmap(file.name, np.uint8, "r")) for name, file in self._files.items()}
        arrays = {"key": pa.LargeStringArray.from_buffers(self.rows, mapped.pop("key_ends"), mapped.pop("key_bytes"))}
        for name, buffer in mapped.items():
            kind = pa.binary(32) if name == "sha256" else pa.int64()
            arrays[name] = pa.Array.from_buffers(kind, self.rows, [None, buffer])
        batch = pa.record_batch(arrays)
        schema = batch.schema.with_metadata({"ird": json.dumps(facts)})
        with publish_atomically(self._path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self._open.enter_context(open(self._folder / name, "wb"))  # noqa: SIM115
        return self._files[name]
