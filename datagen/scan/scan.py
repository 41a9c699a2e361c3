"""Scan: every picture of the sources becomes one inventory row, measured or with the reason why not.

The sorted listing is cut into pieces, one Ray task each. A piece's result is one parquet file named by a fingerprint
of the piece (files, sizes, versions, limits), published atomically: it is there and right, or it is not there. So a
rerun does only what is missing, whatever was killed. ``curation/inventory.json`` lists the parts that count.

A corpus grows by batches: the listing of each is kept, and pictures stay in theirs.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import cv2
import pyarrow as pa

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import INVENTORY, INVENTORY_FOLDER, DatasetError, canonical_json, write_json, write_table
from datagen.progress import Progress
from datagen.scan.inventory import INVENTORY_SCHEMA, SCHEMA_VERSION, read_part
from datagen.scan.row import row_of
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import Picture, list_pictures
from infra.cluster import map_tasks
from infra.storage import NotFoundError, StorageError, Store


@dataclasses.dataclass(frozen=True)
class Piece:
    """One task's share of the listing, and where its part goes. ``removed``: sha256 of pictures taken down."""

    pictures: tuple[Picture, ...]
    batch: int
    limits: ScanConfig
    store: Store
    removed: frozenset[str] = frozenset()

    @property
    def part(self) -> str:
        """Store key of the piece's parquet part."""
        files = [dataclasses.asdict(picture) for picture in self.pictures]
        limits = self.limits.model_dump(exclude={"pictures_per_piece", "seconds_per_picture"})
        identity = canonical_json([SCHEMA_VERSION, files, self.batch, limits])
        return f"{INVENTORY_FOLDER}/{hashlib.sha256(identity).hexdigest()[:24]}.parquet"


@dataclasses.dataclass(frozen=True)
class PartDone:
    """What a task reports of its part."""

    part: str
    sha256: str
    rows: int
    batch: int
    measured: int
    megapixels: float
    bytes: int
    fresh: bool


def scan(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Bring the inventory of ``config.source`` and of ``config.leak_guard`` up to date, on the connected Ray cluster.

    While the listing is what the batches on record hold, they stay; else all of it becomes the one batch of a new
    dataset. Returns the facts for the summary: inputs, parts, throughput.
    """
    pictures, others = list_pictures(config.source)
    batches = read_batches(store)
    known = [picture for batch in batches for picture in batch]
    if len(known) != len(pictures) or set(known) != set(pictures):
        batches = [pictures]
    return {**scan_batches(config, store, batches), "files_without_picture_suffix": others}


def scan_batches(config: DatagenConfig, store: Store, batches: Sequence[Sequence[Picture]]) -> dict[str, Any]:
    """Scan what is missing of the batches and of the leak guard, and publish the manifest of all parts."""
    guard_pictures, _ = list_pictures(config.leak_guard, "guard")
    # Evaluation sets may hold small pictures; whatever their size they must be matched.
    guard_limits = config.scan.model_copy(update={"min_side": 16})
    pieces = [piece for i, batch in enumerate(batches) for piece in _cut(batch, i, config.scan, store)]
    guard_pieces = _cut(guard_pictures, 0, guard_limits, store)
    inputs = sum(len(batch) for batch in batches)
    progress = Progress("scan", inputs + len(guard_pictures), "images")
    done: dict[str, PartDone] = {}
    megapixels = 0.0
    for result in map_tasks(scan_piece, [*pieces, *guard_pieces]):
        done[result.part] = result
        megapixels += result.megapixels if result.fresh else 0.0
        rows = sum(part.rows for part in done.values())
        share = sum(part.measured for part in done.values()) / rows
        progress.advance(result.rows, fresh=result.fresh, notes=f"{megapixels:.1f} MP, {share:.1%} measured")
    seconds = progress.finish()
    fresh = [part for part in done.values() if part.fresh]
    parts, guard_parts = [piece.part for piece in pieces], [piece.part for piece in guard_pieces]
    _require_visible(store, [*parts, *guard_parts])
    write_batches(store, batches)
    write_json(
        store,
        INVENTORY,
        {
            "schema_version": SCHEMA_VERSION,
            "inputs": inputs,
            "parts": [_listed(done[key]) for key in parts],
            "guard_inputs": len(guard_pictures),
            "guard_parts": [_listed(done[key]) for key in guard_parts],
        },
    )
    _drop_stale(store, {*parts, *guard_parts})
    images = sum(part.rows for part in fresh)
    work = {
        "images": images,
        "images_found_scanned": inputs + len(guard_pictures) - images,
        "megapixels": round(megapixels, 3),
        "bytes": sum(part.bytes for part in fresh),
        "images_per_second": round(images / seconds, 2),
        "megapixels_per_second": round(megapixels / seconds, 2),
        "seconds": round(seconds, 3),
    }
    return {
        "inputs": inputs,
        "guard_inputs": len(guard_pictures),
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
        rows = [row_of(picture, piece.limits, piece.batch) for picture in piece.pictures]
        unreadable = [row for row in rows if row["reason"] == "unreadable"]
        if len(unreadable) == len(rows) > 1:
            raise StorageError(f"{unreadable[0]['error']} (nor could the next {len(rows) - 1} pictures be read)")
        for row in rows:
            if row["sha256"] in piece.removed:
                row |= {"grey_thumb": None, "thumbnail": None}
        table = pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA)
        write_table(piece.store, piece.part, table)
    measured = [(row["width"] or 0) * (row["height"] or 0) for row in table.select(["width", "height"]).to_pylist()]
    verdicts = table.column("verdict").to_pylist()
    return PartDone(
        part=piece.part,
        sha256=hashlib.sha256(piece.store.read(piece.part)).hexdigest(),
        rows=table.num_rows,
        batch=piece.batch,
        measured=verdicts.count("measured"),
        megapixels=sum(pixels for pixels, verdict in zip(measured, verdicts) if verdict == "measured") / 1e6,
        bytes=sum(table.column("bytes").to_pylist()),
        fresh=fresh,
    )


def _cut(pictures: Sequence[Picture], batch: int, limits: ScanConfig, store: Store) -> list[Piece]:
    size = limits.pictures_per_piece
    return [Piece(tuple(pictures[i : i + size]), batch, limits, store) for i in range(0, len(pictures), size)]


def _existing_part(piece: Piece) -> pa.Table | None:
    try:
        table = read_part(piece.store, piece.part)
    except (NotFoundError, DatasetError):
        return None
    return table if table.schema == INVENTORY_SCHEMA and table.num_rows == len(piece.pictures) else None


def _listed(part: PartDone) -> dict[str, Any]:
    return {"key": part.part, "rows": part.rows, "sha256": part.sha256, "batch": part.batch}


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
