"""Scan: every picture of the sources becomes one inventory row, measured or with the reason why not.

The sorted listing is cut into pieces, one Ray task each. A piece's result is one parquet file named by a fingerprint
of the piece (files, sizes, versions, limits), published atomically: it is there and right, or it is not there. So a
rerun does only what is missing, whatever was killed. ``curation/inventory.json`` lists the parts that count.

A picture that kills its worker, or hangs it for ``seconds_per_picture``, costs its piece a few tries. Then the piece's
pictures are measured in a process of their own, which shows the guilty one: its row is ``failed``, ``worker_died``,
and those of the others are what they would have been.

A worker holds one picture at a time: its file (``max_bytes`` at most) and its pixels with what is computed from them
(some 15 bytes for each of ``max_megapixels``), and the rows of one piece (about 10 kB each).

A corpus grows by batches: the listing of each is kept, and pictures stay in theirs.
"""

import dataclasses
import faulthandler
import functools
import hashlib
import io
import logging
import time
from collections.abc import Iterable, Sequence
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
    read_removed,
    write_table,
)
from datagen.progress import Progress
from datagen.scan.inventory import INVENTORY_SCHEMA, SCHEMA_VERSION, forget, write_manifest
from datagen.scan.isolated import IsolatedMeasure
from datagen.scan.row import measure_picture, require_measures, row_of
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import Picture, list_pictures
from infra.cluster import ClusterError, map_tasks, node_memory
from infra.storage import NotFoundError, StorageError, Store

# Tries of a piece before its pictures are suspected, and of one whose pictures are; each may cost a picture's timeout.
RETRIES = 2
# So many deaths from the start of a piece, and no picture that survived, say that it is not for the pictures.
_ALL_DIE = 16
_STDERR = 2

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One task's share of the listing, and where its part goes.

    ``removed``: sha256 of pictures taken down. ``known``: store key and sha256 of the part that the manifest lists for
    the piece. ``suspected``: a worker died at it, so its pictures are measured in a process of their own.
    """

    pictures: tuple[Picture, ...]
    batch: int
    limits: ScanConfig
    store: Store
    removed: frozenset[str] = frozenset()
    known: tuple[str, str] | None = None
    suspected: bool = False

    @functools.cached_property
    def part(self) -> str:
        """Store key of the piece's parquet part; its fingerprint."""
        files = [dataclasses.asdict(picture) for picture in self.pictures]
        identity = canonical_json([SCHEMA_VERSION, files, self.batch, settings_of(self.limits)])
        return f"{INVENTORY_FOLDER}/{hashlib.sha256(identity).hexdigest()[:24]}.parquet"


@dataclasses.dataclass(frozen=True)
class PartDone:
    """What a task reports of its part. ``piece`` is the fingerprint that asked for it."""

    piece: str
    key: str
    sha256: str
    rows: int
    batch: int
    measured: int
    megapixels: float
    bytes: int
    fresh: bool

    @property
    def listed(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {name: getattr(self, name) for name in ("piece", "key", "rows", "sha256", "batch")}


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
    """Scan what is missing of the batches and of the leak guard, and publish the manifest of all parts.

    Raises:
        ConfigError: a learned score or the NIQE model cannot be loaded, here or on a node.
        ClusterError: workers die, and not for the sake of single pictures.
    """
    require_measures(config.scan)
    guard_pictures, _ = list_pictures(config.leak_guard, "guard")
    removed = read_removed(store)
    pieces = [p for i, batch in enumerate(batches) for p in cut(batch, i, config.scan, store, removed)]
    guard_pieces = cut(guard_pictures, 0, guard_limits(config.scan), store, removed)
    inputs = sum(len(batch) for batch in batches)
    known = _listed_parts(store)
    tasks = (dataclasses.replace(piece, known=known.get(piece.part)) for piece in [*pieces, *guard_pieces])
    progress = Progress("scan", inputs + len(guard_pictures), "images")
    start = time.monotonic()
    done: dict[str, PartDone] = {}
    rows = measured = 0
    megapixels = 0.0
    for result in map_tasks(scan_piece, tasks, retries=RETRIES, on_death=_suspect):
        done[result.piece] = result
        rows, measured = rows + result.rows, measured + result.measured
        megapixels += result.megapixels if result.fresh else 0.0
        rate = megapixels / max(time.monotonic() - start, 1e-9)
        progress.advance(
            result.rows,
            fresh=result.fresh,
            notes=f"{rate:.1f} MP/s, {measured / rows:.1%} measured",
            figures={"megapixels_per_second": rate, "measured_share": measured / rows},
        )
    seconds = progress.finish()
    parts, guard_parts = ([done[piece.part].listed for piece in group] for group in (pieces, guard_pieces))
    _require_visible(store, [part["key"] for part in [*parts, *guard_parts]])
    write_batches(store, batches)
    publish_manifest(config.scan, store, parts, guard_parts)
    fresh = [part for part in done.values() if part.fresh]
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
    """The Ray task: measure a piece's pictures and publish its part, unless a right one is there already.

    Raises:
        StorageError: not one picture of several could be read, so the store is away rather than a picture damaged.
        ClusterError: every picture of several killed its process, so it is hardly for the pictures.
        ConfigError: a learned score or the NIQE model cannot be loaded on this node.
    """
    cv2.setNumThreads(1)
    require_measures(piece.limits)
    found = _existing_part(piece)
    if found is None:
        key, rows = piece.part, _suspected_rows(piece) if piece.suspected else _rows(piece)
        unreadable = [row for row in rows if row["reason"] == "unreadable"]
        if len(unreadable) == len(rows) > 1:
            raise StorageError(f"{unreadable[0]['error']} (nor could the next {len(rows) - 1} pictures be read)")
        table = table_of(rows, piece.removed)
        sha256 = write_table(piece.store, key, table)
    else:
        key, sha256, table = found
    sizes = table.select(["width", "height", "verdict"]).to_pylist()
    measured = [row["width"] * row["height"] for row in sizes if row["verdict"] == "measured"]
    return PartDone(
        piece=piece.part,
        key=key,
        sha256=sha256,
        rows=table.num_rows,
        batch=piece.batch,
        measured=len(measured),
        megapixels=sum(measured) / 1e6,
        bytes=sum(table.column("bytes").to_pylist()),
        fresh=found is None,
    )


def settings_of(limits: ScanConfig) -> dict[str, Any]:
    """What of the limits has a say in the rows."""
    return limits.model_dump(exclude={"pictures_per_piece", "seconds_per_picture"})


def guard_limits(limits: ScanConfig) -> ScanConfig:
    """Evaluation pictures are only matched, so they may be small, thin or poor, and are given no score."""
    gates = {"min_side": 16, "min_bytes": 0, "max_aspect": 1e9, "min_jpeg_quality": 0, "min_bits_per_pixel": 0.0}
    return limits.model_copy(update={**gates, "niqe_patches": 0, "niqe_model": None, "scores": {}})


def cut(
    pictures: Sequence[Picture], batch: int, limits: ScanConfig, store: Store, removed: frozenset[str]
) -> list[Piece]:
    """The pieces of a batch, in order."""
    size = limits.pictures_per_piece
    return [Piece(tuple(pictures[i : i + size]), batch, limits, store, removed) for i in range(0, len(pictures), size)]


def table_of(rows: Iterable[dict[str, Any]], removed: frozenset[str]) -> pa.Table:
    """Rows as a table of the inventory; those of pictures taken down show nothing of them."""
    rows = [forget(row) if row["sha256"] in removed else row for row in rows]
    return pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA)


def publish_manifest(
    limits: ScanConfig, store: Store, parts: list[dict[str, Any]], guard_parts: list[dict[str, Any]]
) -> None:
    """Say which parts count, and take away all others."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings_of(limits),
        "inputs": sum(part["rows"] for part in parts),
        "parts": parts,
        "guard_inputs": sum(part["rows"] for part in guard_parts),
        "guard_parts": guard_parts,
    }
    write_manifest(store, manifest)


def _rows(piece: Piece) -> list[dict[str, Any]]:
    return [row_of(picture, piece.limits, piece.batch, _measure_or_end) for picture in piece.pictures]


def _measure_or_end(data: bytes, limits: ScanConfig) -> dict[str, Any]:
    """``measure_picture``, which ends this process when it takes too long: C code that hangs cannot be interrupted.

    Reading is not timed: stores have timeouts of their own, and being away is nothing to condemn a picture for.
    """
    faulthandler.dump_traceback_later(limits.seconds_per_picture, exit=True, file=_STDERR)
    try:
        return measure_picture(data, limits)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _suspected_rows(piece: Piece) -> list[dict[str, Any]]:
    rows = []
    # What one picture of many may not take under any division of a node.
    with IsolatedMeasure(piece.limits, node_memory() // 2) as measure:
        for picture in piece.pictures:
            rows.append(row_of(picture, piece.limits, piece.batch, measure))
            if measure.died == _ALL_DIE and not measure.survived:
                break
    if measure.died > 1 and not measure.survived:
        last = next(row for row in reversed(rows) if row["reason"] == "worker_died")
        raise ClusterError(
            f"every picture that was tried of {piece.pictures[0].source} … {piece.pictures[-1].source} killed the "
            f"process that measured it ({last['source']}: {last['error']}). So many bad pictures in a row are less "
            "likely than a node without memory or a scan.scores function that fails for all; no picture was condemned. "
            "See to that and run the same command again"
        )
    return rows


def _suspect(piece: Piece, why: str) -> list[Piece]:
    places = f"{piece.pictures[0].source} … {piece.pictures[-1].source}"
    if piece.suspected:
        raise ClusterError(
            f"a worker died {RETRIES + 1} times at {places}, although their pictures were measured in a process of "
            f"their own ({why}). Workers are being ended, or a node has too little memory: lower its num_cpus or "
            "scan.max_megapixels, and run the same command again, which goes on from here"
        )
    logger.warning("a worker died %d times at %s (%s): taking its pictures one by one", RETRIES + 1, places, why)
    return [dataclasses.replace(piece, suspected=True)]


def _listed_parts(store: Store) -> dict[str, tuple[str, str]]:
    """Key and sha256 of every part in the manifest, by the fingerprint of its piece."""
    manifest = read_json(store, INVENTORY)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        return {}
    return {part["piece"]: (part["key"], part["sha256"]) for part in [*manifest["parts"], *manifest["guard_parts"]]}


def _existing_part(piece: Piece) -> tuple[str, str, pa.Table] | None:
    """Key, sha256 and content of the piece's part; None when there is none, or not the one the manifest describes."""
    key = piece.known[0] if piece.known else piece.part
    try:
        data = piece.store.read(key)
    except NotFoundError:
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    if piece.known and sha256 != piece.known[1]:
        return None
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError):
        return None
    return (key, sha256, table) if table.schema == INVENTORY_SCHEMA and table.num_rows == len(piece.pictures) else None


def _require_visible(store: Store, parts: list[str]) -> None:
    there = {entry.key for entry in store.list(f"{INVENTORY_FOLDER}/")}
    missing = [part for part in parts if part not in there]
    if missing:
        raise DatasetError(
            f"{store.uri}/{missing[0]} was written by a task but cannot be seen here ({len(missing)} such files): "
            "out must be a folder that all nodes of the cluster share, or an s3:// prefix"
        )
