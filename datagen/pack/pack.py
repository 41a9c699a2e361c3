"""Pack: the tiles of the kept pictures become WebDataset shards, the same bytes on any number of workers.

What goes where is planned before any pixel is read: pictures in an order seeded by (seed, sha256 of the file), their
tiles dealt evenly to the shards in that order, and the order inside a shard seeded again by the sample's key. So any
shard is a fair sample of the corpus, while the tiles of a picture stay in one shard (two at a border): it is decoded
once, and taking it out touches one shard.
"""

import collections
import dataclasses
import hashlib
import io
import itertools
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import pyarrow as pa

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
    canonical_json,
    code_version,
    dataset_id,
    read_json,
    read_table,
    sha256_of_object,
    shard_key,
    write_json,
    write_table,
)
from datagen.picture.decode import decode, read_header
from datagen.picture.quality import Measures, luma, measure
from datagen.progress import Progress
from datagen.scan.inventory import read_inventory, read_manifest
from datagen.select.select import SELECTION_SCHEMA, count_verdicts
from datagen.select.tiles import Box
from datagen.source.listing import open_source
from infra.cluster import map_tasks
from infra.storage import NotFoundError, Store

# Part of every shard's fingerprint: raise it when the same plan gives other bytes, and shards are packed again.
FORMAT_VERSION = 1
# Cells of the map in a sample's json: fine enough for a loader that weighs 64-pixel crops.
SAMPLE_CELL = 64

WHY_THIS_FORMAT = (
    "Nothing is lost after the source file: a whole JPEG that needs no conversion is stored byte for byte; every other "
    "sample is PNG. A lossless crop of JPEG data needs libjpeg-turbo's transform, which no dependency offers."
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One planned sample: a crop of a picture."""

    key: str
    source: str
    source_sha256: str
    licence: str
    conversions: tuple[str, ...]
    box: Box


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard as a Ray task builds it. ``origins``: source name of each picture → (root uri, key)."""

    name: str
    samples: tuple[Sample, ...]
    origins: dict[str, tuple[str, str]]
    max_pixels: int
    png_compression: int
    store: Store

    @property
    def fingerprint(self) -> str:
        """Changes when the shard's bytes may."""
        samples = [dataclasses.asdict(sample) for sample in self.samples]
        return hashlib.sha256(canonical_json([FORMAT_VERSION, self.png_compression, samples])).hexdigest()

    @property
    def sidecar(self) -> str:
        """Store key of the shard's share of samples.parquet: the marker that the shard is finished."""
        return f"{PACK_FOLDER}/{self.name.removesuffix('.tar')}.parquet"


@dataclasses.dataclass(frozen=True)
class ShardDone:
    """What a task reports of its shard."""

    name: str
    sha256: str
    bytes: int
    samples: int
    fresh: bool


def pack(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Build every shard of the selection that is not there yet, then publish the tables and ``dataset.json``.

    Raises:
        DatasetError: nothing was kept, or a source file is no longer the one that was scanned.
    """
    plans = plan_shards(config, store)
    identity = hashlib.sha256("".join(plan.fingerprint for plan in plans).encode()).hexdigest()
    # Until it is whole again, a dataset that changes must not look finished.
    if read_json(store, DATASET).get("plan") not in (None, identity):
        store.delete(DATASET)
    progress = Progress("pack", sum(len(plan.samples) for plan in plans), "samples")
    done: dict[str, ShardDone] = {}
    for result in map_tasks(pack_shard, plans):
        done[result.name] = result
        total = sum(shard.bytes for shard in done.values())
        progress.advance(result.samples, fresh=result.fresh, notes=f"{len(done)} shards, {total / 1e6:.1f} MB")
    seconds = progress.finish()
    shards = pa.Table.from_pylist([dataclasses.asdict(done[plan.name]) for plan in plans], schema=SHARDS_SCHEMA)
    samples = pa.concat_tables([_read_sidecar(plan) for plan in plans])
    fresh = [shard for shard in done.values() if shard.fresh]
    written = sum(shard.bytes for shard in fresh)
    work = {
        "shards": len(fresh),
        "shards_found_packed": len(done) - len(fresh),
        "bytes": written,
        "megabytes_per_second": round(written / 1e6 / seconds, 2),
        "seconds": round(seconds, 3),
    }
    _publish(config, store, plans, identity, shards, samples)
    _drop_stale(store, plans)
    return {
        "shards": len(plans),
        "samples": samples.num_rows,
        "bytes": sum(shard.bytes for shard in done.values()),
        "seconds": round(seconds, 3),
        **({"work": work} if fresh else {}),
    }


def plan_shards(config: DatagenConfig, store: Store) -> list[ShardPlan]:
    """Every shard's content, from selection and inventory alone."""
    try:
        selection = read_table(store, SELECTION)
    except NotFoundError:
        raise DatasetError(f"{store.uri}: no selection; `python -m datagen select` makes it") from None
    columns = ["source", "sha256", "root", "key", "licence", "conversions"]
    inventory = read_inventory(store, columns)
    if selection.column("source") != inventory.column("source"):
        raise DatasetError(f"{store.uri}/{SELECTION}: not of this inventory; `python -m datagen select` renews it")
    kept = []
    for row, verdict in zip(inventory.to_pylist(), selection.select(["verdict", "tiles"]).to_pylist()):
        if verdict["verdict"] == "kept":
            kept.append((_shuffle_key(config.seed, row["sha256"]), row, verdict["tiles"]))
    kept.sort(key=lambda entry: entry[0])
    samples = [
        Sample(
            key=_key(row["sha256"], Box(**tile)),
            source=row["source"],
            source_sha256=row["sha256"],
            licence=row["licence"],
            conversions=tuple(row["conversions"]),
            box=Box(**tile),
        )
        for _, row, tiles in kept
        for tile in tiles
    ]
    if not samples:
        raise DatasetError(f"{store.uri}: no picture was kept; {SELECTION} says why, thresholds are in the config")
    origins = {row["source"]: (row["root"], row["key"]) for _, row, _ in kept}
    count = -(-len(samples) // config.pack.samples_per_shard)
    edges = [i * len(samples) // count for i in range(count + 1)]
    plans = []
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        content = sorted(samples[start:end], key=lambda sample: _shuffle_key(config.seed, sample.key))
        plans.append(
            ShardPlan(
                name=f"ird-{index:06d}.tar",
                samples=tuple(content),
                origins={sample.source: origins[sample.source] for sample in content},
                max_pixels=round(config.scan.max_megapixels * 1e6),
                png_compression=config.pack.png_compression,
                store=store,
            )
        )
    return plans


def pack_shard(plan: ShardPlan) -> ShardDone:
    """The Ray task: build one shard and its sidecar, unless both are there and right."""
    cv2.setNumThreads(1)
    finished = _finished(plan)
    if finished:
        return finished
    with tempfile.TemporaryDirectory(prefix="ird-pack-") as folder:
        path = Path(folder) / plan.name
        with open(path, "wb") as file, tempfile.TemporaryFile(dir=folder) as spool:
            rows = _write_tar(file, spool, plan)
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        plan.store.upload(path, shard_key(plan.name))
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
    marker = {"fingerprint": plan.fingerprint, "sha256": sha256, "bytes": str(size)}
    write_table(plan.store, plan.sidecar, table.replace_schema_metadata(marker))
    return ShardDone(plan.name, sha256, size, len(rows), fresh=True)


def _finished(plan: ShardPlan) -> ShardDone | None:
    try:
        table = read_table(plan.store, plan.sidecar)
        marker = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if marker.get("fingerprint") != plan.fingerprint:
            return None
        if sha256_of_object(plan.store, shard_key(plan.name)) != marker["sha256"]:
            return None
    except (NotFoundError, pa.ArrowInvalid):
        return None
    return ShardDone(plan.name, marker["sha256"], int(marker["bytes"]), table.num_rows, fresh=False)


def _write_tar(file: IO[bytes], spool: IO[bytes], plan: ShardPlan) -> list[dict[str, Any]]:
    rows = []
    encoded = _encode_samples(spool, plan)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in plan.samples:
            start, size, suffix, measures = encoded[sample.key]
            spool.seek(start)
            data = spool.read(size)
            sha256 = hashlib.sha256(data).hexdigest()
            metadata = canonical_json(_metadata(sample, sha256, measures))
            member = f"{sample.key}.{suffix}"
            row = {
                "key": sample.key,
                "shard": plan.name,
                "member": member,
                "offset": _add_member(tar, member, data),
                "size": size,
                "json_offset": _add_member(tar, f"{sample.key}.json", metadata),
                "json_size": len(metadata),
                "sha256": sha256,
                "source": sample.source,
                "source_sha256": sample.source_sha256,
            }
            rows.append(row | sample.box._asdict() | _summary(measures))
    return rows


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; returns where its data begin in the tar."""
    entry = tarfile.TarInfo(name)  # Its defaults carry no clock, user or host: mtime, uid and gid are 0.
    entry.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(entry, io.BytesIO(data))
    return start


def _encode_samples(spool: IO[bytes], plan: ShardPlan) -> dict[str, tuple[int, int, str, Measures]]:
    """Encode every sample into ``spool``: key → (start, size, suffix, measures). Each picture is decoded once."""
    encoded = {}
    by_source = sorted(plan.samples, key=lambda sample: sample.source)
    for source, samples in itertools.groupby(by_source, key=lambda sample: sample.source):
        root, key = plan.origins[source]
        for sample, (data, suffix, measures) in _crops(root, key, list(samples), plan):
            encoded[sample.key] = (spool.tell(), len(data), suffix, measures)
            spool.write(data)
    return encoded


def _crops(
    root: str, key: str, samples: list[Sample], plan: ShardPlan
) -> Iterator[tuple[Sample, tuple[bytes, str, Measures]]]:
    data = open_source(root).read(key)
    if hashlib.sha256(data).hexdigest() != samples[0].source_sha256:
        raise DatasetError(f"{root}/{key}: changed since it was scanned; run `python -m datagen build` again")
    header = read_header(data, plan.max_pixels)
    pixels, conversions = decode(data, header)
    for sample in samples:
        x, y, width, height = sample.box
        crop = pixels[y : y + height, x : x + width]
        measures = measure(luma(crop), SAMPLE_CELL)
        if crop.shape == pixels.shape and header.format == "JPEG" and not conversions:
            yield sample, (data, "jpg", measures)
        else:
            yield sample, (_png(crop, plan.png_compression), "png", measures)


def _png(pixels: np.ndarray, compression: int) -> bytes:
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, compression])[1].tobytes()


def _metadata(sample: Sample, sha256: str, measures: Measures) -> dict[str, Any]:
    cells = measures.cells
    return {
        "key": sample.key,
        "sha256": sha256,
        "source": sample.source,
        "source_sha256": sample.source_sha256,
        "licence": sample.licence,
        "conversions": list(sample.conversions),
        "crop": list(sample.box),
        "quality": _summary(measures),
        "quality_map": {
            "cell": cells.cell,
            "rows": cells.laplacian_variance.shape[0],
            "columns": cells.laplacian_variance.shape[1],
            "laplacian_variance": [round(float(value), 1) for value in cells.laplacian_variance.reshape(-1)],
            "flat_fraction": [round(float(value), 3) for value in cells.flat_fraction.reshape(-1)],
        },
    }


def _summary(measures: Measures) -> dict[str, float]:
    names = ("laplacian_variance", "flat_fraction", "noise", "blockiness", "entropy")
    return {name: round(getattr(measures, name), 4) for name in names}


def _key(source_sha256: str, box: Box) -> str:
    return "-".join([source_sha256[:20], *(str(value) for value in box)])


def _shuffle_key(seed: int, content: str) -> str:
    return hashlib.sha256(f"{seed}:{content}".encode()).hexdigest()


def _read_sidecar(plan: ShardPlan) -> pa.Table:
    try:
        return read_table(plan.store, plan.sidecar).replace_schema_metadata(None)
    except NotFoundError:
        raise DatasetError(
            f"{plan.store.uri}/{plan.sidecar} was written by a task but cannot be seen here: out must be a folder that "
            "all nodes of the cluster share, or an s3:// prefix"
        ) from None


def _publish(
    config: DatagenConfig,
    store: Store,
    plans: list[ShardPlan],
    identity: str,
    shards: pa.Table,
    samples: pa.Table,
) -> None:
    selection = read_table(store, SELECTION)
    manifest = read_manifest(store)
    files = {
        SHARDS: write_table(store, SHARDS, shards),
        SAMPLES: write_table(store, SAMPLES, samples),
        SELECTION: write_table(store, SELECTION, selection.cast(SELECTION_SCHEMA)),
    }
    files |= {part["key"]: part["sha256"] for part in [*manifest["parts"], *manifest["guard_parts"]]}
    suffixes = [member.rpartition(".")[2] for member in samples.column("member").to_pylist()]
    # Where the dataset lies and how many cores made it is not what it is.
    settings = config.model_dump(mode="json", exclude={"out", "num_cpus"})
    description = {
        "id": dataset_id(shards, samples),
        "plan": identity,
        "format": {
            "container": "webdataset",
            "members": {suffix: suffixes.count(suffix) for suffix in sorted(set(suffixes))},
            "why": WHY_THIS_FORMAT,
        },
        "totals": {
            **count_verdicts(selection),
            "shards": shards.num_rows,
            "samples": samples.num_rows,
            "bytes": sum(shards.column("bytes").to_pylist()),
        },
        "conversions": _count_conversions(plans),
        "sources": {
            name_of(source, i): {"uri": absolute(source.uri), "licence": source.licence}
            for i, source in enumerate(config.source)
        },
        "leak_guard": [absolute(source.uri) for source in config.leak_guard],
        "config": settings,
        "code_version": code_version(),
        "files": files,
    }
    write_json(store, DATASET, description)


def _count_conversions(plans: list[ShardPlan]) -> dict[str, int]:
    """Samples whose pixels were converted, by conversion."""
    names = [name for plan in plans for sample in plan.samples for name in sample.conversions]
    return dict(sorted(collections.Counter(names).items()))


def _drop_stale(store: Store, plans: list[ShardPlan]) -> None:
    wanted = {shard_key(plan.name) for plan in plans} | {plan.sidecar for plan in plans}
    for folder in (SHARD_FOLDER, PACK_FOLDER):
        for key in [entry.key for entry in store.list(f"{folder}/") if entry.key not in wanted]:
            store.delete(key)
