"""Read members of the shards of one dataset, local or remote, each checked against its sha256."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import pyarrow as pa

from datagen.dataset import read_dataset_json, read_samples, shard_key
from infra.errors import Refusal
from infra.storage import Store, open_store


class DamagedSampleError(Refusal, RuntimeError):
    """A member's bytes are not those that were packed. The message names the shard and the repair."""


class ShardReader:
    """Random access to a dataset's members. Remote shards are fetched whole into a bounded local cache."""

    def __init__(self, dataset_uri: str, cache: str = "", cache_gib: float = 50.0) -> None:
        """Read the index. ``cache`` is a folder that may be shared by processes; empty picks one per user."""
        self.store: Store = open_store(dataset_uri)
        self.facts = read_dataset_json(self.store)
        self.samples: pa.Table = read_samples(self.store)
        self._remote = "://" in self.store.uri
        default = Path(tempfile.gettempdir()) / f"ird-shards-{os.getuid()}"
        self._cache = Path(cache or default) / str(self.facts["id"])
        self._limit = int(cache_gib * 2**30)

    @property
    def dataset_id(self) -> str:
        """Content hash of the dataset."""
        return str(self.facts["id"])

    def read(self, sample: int) -> tuple[str, bytes]:
        """Key and encoded picture of sample number ``sample`` (row of samples.parquet).

        Raises:
            DamagedSampleError: the bytes in the shard differ from what was packed.
        """
        row = self.samples.slice(sample, 1).to_pylist()[0]
        shard = shard_key(row["shard"])
        if self._remote:
            with open(self._fetched(shard), "rb") as file:
                file.seek(row["offset"])
                data = file.read(row["size"])
        else:
            data = self.store.read_range(shard, row["offset"], row["size"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise DamagedSampleError(
                f"{self.store.uri}/{shard}: sample {row['key']} does not have the sha256 of samples.parquet; "
                f"run: python -m datagen verify out={self.store.uri}"
            )
        return row["key"], data

    def _fetched(self, shard: str) -> Path:
        path = self._cache / shard.rsplit("/", 1)[-1]
        if not path.exists():
            self._make_room(self.store.stat(shard).size)
            self.store.download(shard, path)
        os.utime(path)
        return path

    def _make_room(self, needed: int) -> None:
        cached = sorted(self._cache.glob("*.tar"), key=lambda p: p.stat().st_mtime)
        total = sum(p.stat().st_size for p in cached) + needed
        for path in cached:
            if total <= self._limit:
                return
            total -= path.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
