"""Scan: every picture of the sources becomes one inventory row, measured or with the reason why not.

The sorted listing is cut into pieces, one Ray task each. A piece's result is one parquet file named by a fingerprint
of the piece (files, sizes, versions, limits), published atomically: it is there and right, or it is not there. So a
rerun does only what is missing, whatever was killed. ``curation/inventory.json`` lists the parts that count.
"""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import (
    INVENTORY,
    INVENTORY_FOLDER,
    DatasetError,
    canonical_json,
    read_json,
    write_json,
    write_table,
)
from datagen.picture.decode import PictureError, decode, read_header
from datagen.picture.perceptual_hash import grey_thumb, hashes
from datagen.picture.quality import WHOLE_PICTURE_MEASURES, luma, measure
from datagen.progress import Progress
from datagen.source import Picture, list_pictures, open_source
from infra.cluster import map_tasks
from infra.storage import NotFoundError, StorageError, Store

# Part of every fingerprint: raise it when a row's meaning changes, and old parts are scanned again.
SCHEMA_VERSION = 1
THUMBNAIL_SIDE = 160

INVENTORY_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # <source name>/<key>
        ("root", pa.string()),  # uri of the source; root/key is the file
        ("key", pa.string()),
        ("licence", pa.string()),
        ("bytes", pa.int64()),
        ("version", pa.string()),  # etag, or modification time in ns
        ("sha256", pa.string()),  # of the file's bytes
        ("verdict", pa.string()),  # measured | rejected (by rule) | failed (damage)
        ("stage", pa.string()),  # how far it came: read | header | decode | measure
        ("reason", pa.string()),  # empty when measured
        ("error", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),  # of the upright picture, pixels
        ("height", pa.int32()),
        ("mode", pa.string()),  # colour mode as stored
        ("jpeg_quality", pa.int32()),  # IJG equivalent; null unless JPEG
        ("subsampling", pa.string()),
        ("bits_per_pixel", pa.float32()),  # of the file
        ("conversions", pa.list_(pa.string())),
        ("laplacian_variance", pa.float32()),  # these seven: datagen.picture.quality.measure
        ("flat_fraction", pa.float32()),
        ("blockiness", pa.float32()),
        ("entropy", pa.float32()),
        ("noise", pa.float32()),
        ("overexposed", pa.float32()),
        ("underexposed", pa.float32()),
        ("cell_laplacian_variance", pa.list_(pa.float32())),  # quality map, row by row, cells of quality.CELL pixels
        ("cell_flat_fraction", pa.list_(pa.float32())),
        ("phash", pa.list_(pa.uint64())),  # eight, by orientation; fixed-size lists do not survive parquet with nulls
        ("grey_thumb", pa.binary()),  # 32x32 luma, row by row
        ("thumbnail", pa.binary()),  # JPEG, at most 160 pixels a side
    ]
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One task's share of the listing, and where its part goes."""

    pictures: tuple[Picture, ...]
    limits: ScanConfig
    store: Store

    @property
    def part(self) -> str:
        """Store key of the piece's parquet part."""
        files = [dataclasses.asdict(picture) for picture in self.pictures]
        limits = self.limits.model_dump(exclude={"pictures_per_piece"})
        identity = canonical_json([SCHEMA_VERSION, files, limits])
        return f"{INVENTORY_FOLDER}/{hashlib.sha256(identity).hexdigest()[:24]}.parquet"


@dataclasses.dataclass(frozen=True)
class PartDone:
    """What a task reports of its part."""

    part: str
    sha256: str
    rows: int
    measured: int
    megapixels: float
    bytes: int
    fresh: bool


def scan(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Bring the inventory of ``config.source`` and of ``config.leak_guard`` up to date, on the connected Ray cluster.

    Returns the facts for the summary: inputs, parts, throughput.
    """
    pictures, others = list_pictures(config.source)
    guard_pictures, _ = list_pictures(config.leak_guard, "guard")
    # Evaluation sets may hold small pictures; whatever their size they must be matched.
    guard_limits = config.scan.model_copy(update={"min_side": 16})
    pieces = [*_cut(pictures, config.scan, store), *_cut(guard_pictures, guard_limits, store)]
    progress = Progress("scan", len(pictures) + len(guard_pictures), "images")
    done: dict[str, PartDone] = {}
    megapixels = 0.0
    for result in map_tasks(scan_piece, pieces):
        done[result.part] = result
        megapixels += result.megapixels if result.fresh else 0.0
        rows = sum(part.rows for part in done.values())
        share = sum(part.measured for part in done.values()) / rows
        progress.advance(result.rows, fresh=result.fresh, notes=f"{megapixels:.1f} MP, {share:.1%} measured")
    seconds = progress.finish()
    fresh = [part for part in done.values() if part.fresh]
    corpus_parts = [piece.part for piece in pieces if piece.limits is config.scan]
    guard_parts = [piece.part for piece in pieces if piece.limits is guard_limits]
    _require_visible(store, [*corpus_parts, *guard_parts])
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "inputs": len(pictures),
        "parts": [{"key": key, "rows": done[key].rows, "sha256": done[key].sha256} for key in corpus_parts],
        "guard_inputs": len(guard_pictures),
        "guard_parts": [{"key": key, "rows": done[key].rows, "sha256": done[key].sha256} for key in guard_parts],
    }
    write_json(store, INVENTORY, manifest)
    _drop_stale(store, {*corpus_parts, *guard_parts})
    images = sum(part.rows for part in fresh)
    work = {
        "images": images,
        "images_found_scanned": len(pictures) + len(guard_pictures) - images,
        "megapixels": round(megapixels, 3),
        "bytes": sum(part.bytes for part in fresh),
        "images_per_second": round(images / seconds, 2),
        "megapixels_per_second": round(megapixels / seconds, 2),
        "seconds": round(seconds, 3),
    }
    return {
        "inputs": len(pictures),
        "guard_inputs": len(guard_pictures),
        "files_without_picture_suffix": others,
        "seconds": round(seconds, 3),
        **({"work": work} if fresh else {}),
    }


def scan_piece(piece: Piece) -> PartDone:
    """The Ray task: measure a piece's pictures and publish its part, unless a readable one is there already.

    Raises:
        StorageError: not one picture of several could be read, so the store is away rather than a picture damaged.
    """
    cv2.setNumThreads(1)
    table = _existing_part(piece)
    fresh = table is None
    if table is None:
        rows = [_row(picture, piece.limits) for picture in piece.pictures]
        unreadable = [row for row in rows if row["reason"] == "unreadable"]
        if len(unreadable) == len(rows) > 1:
            raise StorageError(f"{rows[0]['error']}; nor could the next {len(rows) - 1} pictures be read")
        table = pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA)
        write_table(piece.store, piece.part, table)
    measured = [(row["width"] or 0) * (row["height"] or 0) for row in table.select(["width", "height"]).to_pylist()]
    verdicts = table.column("verdict").to_pylist()
    return PartDone(
        part=piece.part,
        sha256=hashlib.sha256(piece.store.read(piece.part)).hexdigest(),
        rows=table.num_rows,
        measured=verdicts.count("measured"),
        megapixels=sum(pixels for pixels, verdict in zip(measured, verdicts) if verdict == "measured") / 1e6,
        bytes=sum(table.column("bytes").to_pylist()),
        fresh=fresh,
    )


def read_inventory(store: Store, columns: Sequence[str], *, guard: bool = False) -> pa.Table:
    """The inventory of the corpus, or of the leak guard, in the order of the listing.

    Raises:
        DatasetError: nothing was scanned here yet.
    """
    manifest = read_json(store, INVENTORY)
    if not manifest:
        raise DatasetError(f"{store.uri}: no inventory; `python -m datagen scan` makes it")
    schema = pa.schema([INVENTORY_SCHEMA.field(name) for name in columns])
    parts = manifest["guard_parts" if guard else "parts"]
    tables = [pq.read_table(io.BytesIO(store.read(part["key"])), columns=list(columns)) for part in parts]
    return pa.concat_tables([schema.empty_table(), *tables])


def _cut(pictures: list[Picture], limits: ScanConfig, store: Store) -> list[Piece]:
    size = limits.pictures_per_piece
    return [Piece(tuple(pictures[i : i + size]), limits, store) for i in range(0, len(pictures), size)]


def _existing_part(piece: Piece) -> pa.Table | None:
    try:
        table = pq.read_table(io.BytesIO(piece.store.read(piece.part)))
    except NotFoundError:
        return None
    except (pa.ArrowInvalid, OSError):
        return None
    return table if table.schema == INVENTORY_SCHEMA and table.num_rows == len(piece.pictures) else None


def _row(picture: Picture, limits: ScanConfig) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(INVENTORY_SCHEMA.names)
    row |= {"source": picture.source, "root": picture.root, "key": picture.key, "licence": picture.licence}
    row |= {"bytes": picture.size, "version": picture.version, "verdict": "failed", "stage": "read", "reason": ""}
    try:
        _measure_into(row, picture, limits)
    except PictureError as error:
        row |= {"verdict": "failed" if error.failed else "rejected", "reason": error.reason, "error": str(error)}
    except NotFoundError as error:
        row |= {"reason": "missing", "error": str(error)}
    except StorageError as error:
        row |= {"reason": "unreadable", "error": str(error)}
    return row


def _measure_into(row: dict[str, Any], picture: Picture, limits: ScanConfig) -> None:
    """Fill ``row`` stage by stage, the cheapest first, so that a picture refused early keeps what was learnt."""
    data = open_source(picture.root).read(picture.key)
    row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "stage": "header"}
    header = read_header(data, round(limits.max_megapixels * 1e6))
    row |= {
        "format": header.format,
        "width": header.width,
        "height": header.height,
        "mode": header.mode,
        "jpeg_quality": header.jpeg_quality,
        "subsampling": header.subsampling,
        "bits_per_pixel": len(data) * 8 / (header.width * header.height),
    }
    if min(header.width, header.height) < limits.min_side:
        message = f"{header.width}x{header.height}, below {limits.min_side} pixels"
        raise PictureError("too_small", message, failed=False)
    row["stage"] = "decode"
    pixels, conversions = decode(data, header)
    row |= {"width": pixels.shape[1], "height": pixels.shape[0], "conversions": conversions, "stage": "measure"}
    grey = luma(pixels)
    measures = measure(grey)
    thumb = grey_thumb(grey)
    row |= {name: getattr(measures, name) for name in WHOLE_PICTURE_MEASURES}
    row |= {
        "cell_laplacian_variance": measures.cells.laplacian_variance.reshape(-1),
        "cell_flat_fraction": measures.cells.flat_fraction.reshape(-1),
        "phash": hashes(thumb),
        "grey_thumb": thumb.tobytes(),
        "thumbnail": _thumbnail(pixels),
        "verdict": "measured",
    }


def _thumbnail(pixels: Any) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return encoded.tobytes()


def _require_visible(store: Store, parts: list[str]) -> None:
    there = {entry.key for entry in store.list(f"{INVENTORY_FOLDER}/")}
    missing = [part for part in parts if part not in there]
    if missing:
        raise DatasetError(
            f"{store.uri}/{missing[0]} was written by a task but cannot be seen here ({len(missing)} such files): "
            "out must be a folder that all nodes of the cluster share, or an s3:// prefix"
        )


def _drop_stale(store: Store, wanted: set[str]) -> None:
    for key in [entry.key for entry in store.list(f"{INVENTORY_FOLDER}/") if entry.key not in wanted]:
        store.delete(key)
