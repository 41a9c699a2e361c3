"""One shard: its samples cut, measured and written as a plain WebDataset tar, the same bytes every time."""

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

from datagen.dataset import (
    SAMPLES_SCHEMA,
    DatasetError,
    canonical_json,
    read_table,
    sha256_of_object,
    shard_key,
    write_table,
)
from datagen.pack.plan import Sample, ShardPlan
from datagen.picture.crop import can_crop, crop_jpeg, jpeg_grid
from datagen.picture.decode import decode, read_header
from datagen.picture.quality import Measures, luma, measure
from datagen.source.listing import Picture, read_picture
from infra.storage import NotFoundError

# Cells of the map in a sample's json: fine enough for a loader that weighs 64-pixel crops.
SAMPLE_CELL = 64
_SUMMARY = ("laplacian_variance", "flat_fraction", "noise", "blockiness", "entropy")


@dataclasses.dataclass(frozen=True)
class ShardDone:
    """What a task reports of its shard."""

    name: str
    sha256: str
    bytes: int
    samples: int
    fresh: bool


def pack_shard(plan: ShardPlan) -> ShardDone:
    """The Ray task: build one shard and its sidecar, unless both are there and right.

    Memory: the pixels of one picture at a time (see ``scan.max_megapixels``); the shard grows on local disk.

    Raises:
        DatasetError: a source file is gone, or no longer the one that was scanned.
    """
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
        for sample, (data, suffix, measures) in _crops(plan.pictures[source], list(samples), plan):
            encoded[sample.key] = (spool.tell(), len(data), suffix, measures)
            spool.write(data)
    return encoded


def _crops(
    picture: Picture, samples: list[Sample], plan: ShardPlan
) -> Iterator[tuple[Sample, tuple[bytes, str, Measures]]]:
    again = "run `python -m datagen build` again"
    try:
        data = read_picture(picture)
    except NotFoundError:
        raise DatasetError(f"{picture.uri}: gone since it was scanned; {again}") from None
    if hashlib.sha256(data).hexdigest() != samples[0].source_sha256:
        raise DatasetError(f"{picture.uri}: changed since it was scanned; {again}")
    header = read_header(data, plan.max_pixels)
    pixels, conversions = decode(data, header)
    # Grey is stored as grey: whoever decodes it to RGB gets these pixels.
    unconverted = header.format == "JPEG" and set(conversions) <= {"grey_to_rgb"}
    whole = (0, 0, pixels.shape[1], pixels.shape[0])
    tiles = {}
    if unconverted and plan.settings.crop == "lossless_jpeg" and (grid := jpeg_grid(data)):
        boxes = [sample.box for sample in samples if sample.box != whole and can_crop(grid, sample.box)]
        tiles = dict(zip(boxes, crop_jpeg(data, boxes) or []))
    for sample in samples:
        x, y, width, height = sample.box
        crop = pixels[y : y + height, x : x + width]
        measures = measure(luma(crop), SAMPLE_CELL)
        jpeg = data if sample.box == whole and unconverted else tiles.get(sample.box)
        if jpeg is None:
            yield sample, (_png(crop, plan.settings.png_compression), "png", measures)
        else:
            yield sample, (jpeg, "jpg", measures)


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
        **({} if sample.caption is None else {"caption": sample.caption}),
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
    return {name: round(getattr(measures, name), 4) for name in _SUMMARY}
