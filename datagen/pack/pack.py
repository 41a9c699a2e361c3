"""Pack: the tiles of the kept pictures become WebDataset shards, the same bytes on any number of workers."""

import collections
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datagen.config import DatagenConfig, absolute, name_of
from datagen.dataset import (
    DATASET,
    PACK_FOLDER,
    SAMPLES,
    SAMPLES_SCHEMA,
    SELECTION,
    SHARD_FOLDER,
    SHARDS,
    SHARDS_SCHEMA,
    DatasetError,
    Identity,
    code_version,
    read_json,
    read_shards,
    read_table,
    read_take_downs,
    shard_key,
    write_json,
    write_table,
)
from datagen.pack.plan import Plan, plan_identity, plan_shards, sidecar_key
from datagen.pack.shard import ShardDone, pack_shard
from datagen.picture.crop import crop_available
from datagen.progress import Progress
from datagen.scan.inventory import read_manifest
from datagen.select.select import count_verdicts
from infra.cluster import map_tasks
from infra.config import ConfigError
from infra.storage import NotFoundError, Store

WHY_THIS_FORMAT = {
    "lossless_jpeg": "Nothing is lost after the source file: a whole JPEG that needs no conversion is stored byte for "
    "byte, and its tiles are cut on MCU borders without decoding, so their DCT coefficients are the source's own. "
    "Every other sample is PNG.",
    "png": "Nothing is lost after the source file: a whole JPEG that needs no conversion is stored byte for byte; "
    "every other sample is PNG, as pack.crop=png asks.",
}
# Rows that samples.parquet gathers into one row group.
_ROW_GROUP = 65536


def pack(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Build every shard of the selection that is not there yet, then publish the tables and ``dataset.json``.

    Raises:
        DatasetError: nothing was kept, or a source file is no longer the one that was scanned.
    """
    _require_cropper(config)
    plan = plan_shards(config, store)
    identity = plan_identity(config, store)
    # Until it is whole again, a dataset that changes must not look finished.
    if read_json(store, DATASET).get("plan") not in (None, identity):
        store.delete(DATASET)
    progress = Progress("pack", plan.count, "samples")
    done: dict[str, ShardDone] = {}
    written = 0
    for result in map_tasks(pack_shard, plan.shards()):
        done[result.name] = result
        written += result.bytes
        progress.advance(result.samples, fresh=result.fresh, notes=f"{len(done)} shards, {written / 1e6:.1f} MB")
    seconds = progress.finish()
    shards = [done[name] for name in plan.names]
    _publish(config, store, plan, identity, shards)
    _drop_stale(store, plan.names)
    fresh = [shard for shard in shards if shard.fresh]
    packed = sum(shard.bytes for shard in fresh)
    work = {
        "shards": len(fresh),
        "shards_found_packed": len(done) - len(fresh),
        "bytes": packed,
        "megabytes_per_second": round(packed / 1e6 / seconds, 2),
        "seconds": round(seconds, 3),
    }
    return {
        "shards": len(shards),
        "samples": plan.count,
        "bytes": written,
        "seconds": round(seconds, 3),
        **({"work": work} if fresh else {}),
    }


def repair_shard(config: DatagenConfig, store: Store, name: str) -> ShardDone:
    """Build one shard of a finished dataset again, and touch nothing else.

    Raises:
        DatasetError: the dataset has no such shard, or its sources or settings no longer give these bytes.
    """
    expected = {row["name"]: row["sha256"] for row in read_shards(store).to_pylist()}
    if name not in expected:
        raise DatasetError(f"{store.uri}: no shard {name!r}; there are {min(expected)} to {max(expected)}")
    if read_json(store, DATASET)["plan"] != plan_identity(config, store):
        raise DatasetError(f"{store.uri}: config or selection changed since it was packed; `python -m datagen pack`")
    _require_cropper(config)
    (result,) = map_tasks(pack_shard, plan_shards(config, store).shards([name]))
    if result.sha256 != expected[name]:
        raise DatasetError(f"{store.uri}/{shard_key(name)}: rebuilt, with other bytes; `python -m datagen pack`")
    return result


def _require_cropper(config: DatagenConfig) -> None:
    if config.pack.crop == "lossless_jpeg" and not crop_available():
        raise ConfigError(
            "pack.crop: lossless_jpeg needs libturbojpeg on every node (Debian: apt-get install libturbojpeg0, macOS: "
            "brew install jpeg-turbo); or set pack.crop=png, which stores tiles several times larger"
        )


def _publish(config: DatagenConfig, store: Store, plan: Plan, identity: str, shards: list[ShardDone]) -> None:
    rows = [{name: getattr(shard, name) for name in SHARDS_SCHEMA.names} for shard in shards]
    table = pa.Table.from_pylist(rows, schema=SHARDS_SCHEMA)
    dataset_id, samples_sha256, suffixes = _write_samples(store, table)
    selection = read_table(store, SELECTION, ["verdict", "reason", "batch"])
    manifest = read_manifest(store)
    files = {SHARDS: write_table(store, SHARDS, table), SAMPLES: samples_sha256}
    files[SELECTION] = hashlib.sha256(store.read(SELECTION)).hexdigest()
    files |= {part["key"]: part["sha256"] for part in [*manifest["parts"], *manifest["guard_parts"]]}
    # Where the dataset lies, who watched and how many cores made it is not what it is.
    settings = config.model_dump(mode="json", exclude={"out", "num_cpus", "tracking"})
    description = {
        "id": dataset_id,
        "plan": identity,
        "format": {
            "container": "webdataset",
            "members": dict(sorted(suffixes.items())),
            "crop": config.pack.crop,
            "why": WHY_THIS_FORMAT[config.pack.crop],
        },
        "totals": {
            **count_verdicts(selection),
            "batches": pc.max(selection.column("batch")).as_py() + 1,
            "shards": len(shards),
            "samples": sum(shard.samples for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
        },
        "conversions": _count_conversions(plan),
        "sources": {
            name_of(source, i): {"uri": absolute(source.uri), "licence": source.licence}
            for i, source in enumerate(config.source)
        },
        "leak_guard": [absolute(source.uri) for source in config.leak_guard],
        "removed": [picture["sha256"] for picture in read_take_downs(store)],
        "config": settings,
        "code_version": code_version(),
        "files": files,
    }
    write_json(store, DATASET, description)


def _write_samples(store: Store, shards: pa.Table) -> tuple[str, str, collections.Counter[str]]:
    """Join the sidecars into samples.parquet: dataset id, sha256 of the file, members by suffix."""
    identity = Identity()
    identity.add(shards, SHARDS_SCHEMA)
    suffixes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="ird-samples-") as folder:
        path = Path(folder) / SAMPLES
        with pq.ParquetWriter(path, SAMPLES_SCHEMA, compression="zstd") as writer:
            waiting: list[pa.Table] = []
            for name in shards.column("name").to_pylist():
                samples = _read_sidecar(store, name)
                identity.add(samples, SAMPLES_SCHEMA)
                suffixes.update(member.rpartition(".")[2] for member in samples.column("member").to_pylist())
                waiting.append(samples)
                if sum(table.num_rows for table in waiting) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.concat_tables(waiting))
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        store.upload(path, SAMPLES)
    return identity.hexdigest(), sha256, suffixes


def _read_sidecar(store: Store, name: str) -> pa.Table:
    try:
        return read_table(store, sidecar_key(name)).replace_schema_metadata(None)
    except NotFoundError:
        raise DatasetError(
            f"{store.uri}/{sidecar_key(name)} was written by a task but cannot be seen here: out must be a folder that "
            "all nodes of the cluster share, or an s3:// prefix"
        ) from None


def _count_conversions(plan: Plan) -> dict[str, int]:
    """Samples whose pixels were converted, by conversion."""
    samples = np.bincount(
        np.concatenate([plan.owner[share.samples] for share in plan.shares]), minlength=len(plan.pictures)
    )
    counts: collections.Counter[str] = collections.Counter()
    for names, number in zip(plan.pictures.column("conversions").to_pylist(), samples.tolist()):
        counts.update(dict.fromkeys(names, number) if number else {})
    return dict(sorted(counts.items()))


def _drop_stale(store: Store, names: list[str]) -> None:
    wanted = {shard_key(name) for name in names} | {sidecar_key(name) for name in names}
    for folder in (SHARD_FOLDER, PACK_FOLDER):
        for key in [entry.key for entry in store.list(f"{folder}/") if entry.key not in wanted]:
            store.delete(key)
