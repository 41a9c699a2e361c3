"""The dataset on disk or in a bucket: names, tables, identity, and reading it.

::

    dataset.json               id, totals, config, code version, sources, sha256 of the tables
    shards.parquet             one row a shard
    samples.parquet            one row a sample
    shards/ird-000000.tar      plain WebDataset: <key>.png|jpg + <key>.json
    curation/                  how it came about: inventory, selection, summary

The id is a hash of what the shards hold and where, so equal ids mean equal bytes; paths, dates, host names and the
number of workers have no part in it.
"""

import hashlib
import importlib.metadata
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import Refusal
from infra.storage import NotFoundError, Store

DATASET = "dataset.json"
SHARDS = "shards.parquet"
SAMPLES = "samples.parquet"
SHARD_FOLDER = "shards"

CONFIG = "curation/config.yaml"
LISTING_FOLDER = "curation/listing"
INVENTORY_FOLDER = "curation/inventory"
INVENTORY = "curation/inventory.json"
SELECTION = "curation/selection.parquet"
PACK_FOLDER = "curation/pack"
REMOVED = "curation/removed.json"
SUMMARY = "curation/summary.json"

_PIECE_BYTES = 16 * 1024**2

SHARDS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("samples", pa.int64()),
    ]
)

SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),  # file name below shards/
        ("member", pa.string()),  # file name in the tar
        ("offset", pa.int64()),  # of the member's data in the tar, for ranged reads
        ("size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("sha256", pa.string()),  # of the member's bytes
        ("source", pa.string()),  # <source name>/<path below the source's uri>; dataset.json maps names to uris
        ("source_sha256", pa.string()),
        ("x", pa.int32()),  # crop box in the upright source picture, pixels
        ("y", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("laplacian_variance", pa.float32()),  # of the tile; units in datagen.picture.quality
        ("flat_fraction", pa.float32()),
        ("noise", pa.float32()),
        ("blockiness", pa.float32()),
        ("entropy", pa.float32()),
    ]
)


class DatasetError(Refusal, RuntimeError):
    """A dataset is missing, unfinished or damaged. The message names the file and what repairs it."""


def shard_key(name: str) -> str:
    """Store key of a shard, given its file name."""
    return f"{SHARD_FOLDER}/{name}"


class Identity:
    """The dataset id as it grows: 64 hex digits, sha256 over every value of the two tables, row by row."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, table: pa.Table, schema: pa.Schema) -> None:
        """Take in the next rows of the shards table, then of the samples table, in pieces of any size."""
        for batch in table.select(schema.names).to_batches(max_chunksize=65536):
            for row in batch.to_pylist():
                self._digest.update(canonical_json(row))
                self._digest.update(b"\n")

    def hexdigest(self) -> str:
        """The id of what was taken in."""
        return self._digest.hexdigest()


def dataset_id(shards: pa.Table, samples: pa.Table) -> str:
    """The id of a dataset; see :class:`Identity`."""
    identity = Identity()
    identity.add(shards, SHARDS_SCHEMA)
    identity.add(samples, SAMPLES_SCHEMA)
    return identity.hexdigest()


def sha256_of_object(store: Store, key: str) -> str:
    """Hex sha256 of a stored file, read in pieces of bounded memory."""
    digest = hashlib.sha256()
    start = 0
    while piece := store.read_range(key, start, _PIECE_BYTES):
        digest.update(piece)
        start += len(piece)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def code_version() -> str:
    """The installed version of this package."""
    try:
        return importlib.metadata.version("ird")
    except importlib.metadata.PackageNotFoundError:  # A Ray job runs from a bare copy of the working directory.
        return "uninstalled"


def write_table(store: Store, key: str, table: pa.Table) -> str:
    """Publish a parquet file; returns its sha256."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    store.write(key, data)
    return hashlib.sha256(data).hexdigest()


def read_table(store: Store, key: str, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file of the dataset."""
    return pq.read_table(io.BytesIO(store.read(key)), columns=columns)


def read_dataset_json(store: Store) -> dict[str, Any]:
    """The dataset's description: ``id``, ``totals``, ``format``, ``config``, ``sources``, ``files``, ``code_version``.

    Raises:
        DatasetError: there is no finished dataset at this place.
    """
    try:
        return json.loads(store.read(DATASET))
    except NotFoundError:
        raise DatasetError(
            f"{store.uri}: no {DATASET}, so no finished dataset; `python -m datagen build` makes one"
        ) from None


def read_samples(store: Store) -> pa.Table:
    """All samples, :data:`SAMPLES_SCHEMA`, in shard order and in the order in which they lie in the shards."""
    return _read_published(store, SAMPLES)


def read_shards(store: Store) -> pa.Table:
    """All shards, :data:`SHARDS_SCHEMA`, in order of name."""
    return _read_published(store, SHARDS)


def read_json(store: Store, key: str) -> dict[str, Any]:
    """A JSON file of the dataset; empty when it is not there."""
    return json.loads(store.read(key)) if store.exists(key) else {}


def read_take_downs(store: Store) -> list[dict[str, Any]]:
    """The pictures taken down, each with ``sha256``, ``source``, ``note`` and whether its tiles were ``dealt``."""
    return list(read_json(store, REMOVED).get("pictures", []))


def read_removed(store: Store) -> frozenset[str]:
    """sha256 of every picture file that was taken down."""
    return frozenset(picture["sha256"] for picture in read_take_downs(store))


def write_json(store: Store, key: str, value: dict[str, Any]) -> None:
    """Publish a JSON file that people read too."""
    store.write(key, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _read_published(store: Store, key: str) -> pa.Table:
    expected = read_dataset_json(store)["files"][key]
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != expected:
        raise DatasetError(
            f"{store.uri}/{key}: not the table {DATASET} describes; `python -m datagen pack` rewrites it"
        )
    return pq.read_table(io.BytesIO(data))
