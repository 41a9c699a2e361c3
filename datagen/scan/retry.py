"""Retry: the pictures whose rows say ``failed`` are read once more, and nothing else is.

A part in which a row has changed is written anew beside the old one, under its fingerprint and its content's; the
manifest then names the new ones in one step, and the old ones go. So the manifest holds whenever this is killed, and
running it again starts from what it says.
"""

import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import DATASET, DatasetError, read_removed, write_table
from datagen.progress import Progress
from datagen.scan.inventory import read_manifest
from datagen.scan.isolated import IsolatedMeasure
from datagen.scan.row import require_measures, row_of
from datagen.scan.scan import (
    RETRIES,
    Piece,
    guard_limits,
    publish_manifest,
    settings_of,
    table_of,
)
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import Picture, list_pictures
from infra.cluster import map_tasks, node_memory
from infra.storage import NotFoundError, Store, open_store

_AGAIN = "run `python -m datagen scan` first"


@dataclasses.dataclass(frozen=True)
class PartRetry:
    """One task's share: a part of the manifest, and the piece that it is of.

    ``batch``: what the rows that no longer fail get; None leaves them theirs.
    """

    index: int
    listed: dict[str, Any]
    piece: Piece
    batch: int | None


@dataclasses.dataclass(frozen=True)
class PartRetried:
    """What a task reports. ``listed`` and ``pictures`` are those of the part as it is now."""

    index: int
    listed: dict[str, Any]
    pictures: tuple[Picture, ...]
    failed: int
    recovered: int


def rescan_failed(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Read again every picture whose row failed, of the corpus and of the leak guard, whatever it failed for.

    A file that was replaced since is on record with its new size and version from then on. Where a dataset is packed
    already, pictures that no longer fail become one more batch, so that the shards that are there keep their bytes.

    Returns:
        facts for the summary: ``failed`` before, ``recovered``, ``batch`` of those that were (None without any).

    Raises:
        DatasetError: nothing was scanned yet, or not these files under these settings.
        ClusterError: workers die, though the pictures are measured in processes of their own.
    """
    require_measures(config.scan)
    manifest = read_manifest(store)
    if manifest["settings"] != settings_of(config.scan):
        raise DatasetError(f"{store.uri}: was scanned with other settings in scan; {_AGAIN}")
    batches = read_batches(store)
    guard, _ = list_pictures(config.leak_guard, "guard")
    new_batch = len(batches) if store.exists(DATASET) else None
    removed = read_removed(store)
    corpus = [picture for batch in batches for picture in batch]
    items = list(_shares(manifest["parts"], corpus, config.scan, store, removed, new_batch))
    guard_items = list(_shares(manifest["guard_parts"], guard, guard_limits(config.scan), store, removed, None))
    # Both in one run of tasks: the guard's go by negative numbers.
    guard_items = [dataclasses.replace(item, index=-1 - item.index) for item in guard_items]
    progress = Progress("retry", len(items) + len(guard_items), "parts")
    start = time.monotonic()
    done: dict[int, PartRetried] = {}
    for result in map_tasks(retry_part, [*items, *guard_items], retries=RETRIES):
        done[result.index] = result
        progress.advance(1, notes=f"{sum(part.recovered for part in done.values())} recovered")
    progress.finish()
    failed, recovered = (sum(getattr(part, name) for part in done.values()) for name in ("failed", "recovered"))
    in_corpus = sum(done[item.index].recovered for item in items)
    if any(done[item.index].listed != item.listed for item in [*items, *guard_items]):
        pictures = iter([picture for item in items for picture in done[item.index].pictures])
        batches = [[next(pictures) for _ in batch] for batch in batches]
        # An empty batch takes the number, so that the next `add` takes another. Written before the manifest: a number
        # that is on record and in no row does no harm.
        write_batches(store, [*batches, []] if new_batch is not None and in_corpus else batches)
        parts, guard_parts = ([done[item.index].listed for item in group] for group in (items, guard_items))
        publish_manifest(config.scan, store, parts, guard_parts)
    return {
        "failed": failed,
        "recovered": recovered,
        "batch": new_batch if in_corpus else None,
        "seconds": round(time.monotonic() - start, 3),
    }


def retry_part(item: PartRetry) -> PartRetried:
    """The Ray task: read the failed pictures of a part again, each in a process of its own.

    Raises:
        DatasetError: the part is damaged, or its pictures are not those of the listing.
    """
    cv2.setNumThreads(1)
    piece, store = item.piece, item.piece.store
    table = _read_as_listed(store, item.listed)
    _require_aligned(table, item)
    failed = np.flatnonzero(table.column("verdict").to_numpy(zero_copy_only=False) == "failed")
    if not len(failed):
        return PartRetried(item.index, item.listed, piece.pictures, 0, 0)
    pictures = list(piece.pictures)
    rows = []
    with IsolatedMeasure(piece.limits, node_memory() // 2) as measure:
        for i in failed:
            pictures[i] = _as_it_is_now(pictures[i])
            row = row_of(pictures[i], piece.limits, table["batch"][int(i)].as_py(), measure)
            if item.batch is not None and row["verdict"] != "failed":
                row["batch"] = item.batch
            rows.append(row)
    recovered = sum(row["verdict"] != "failed" for row in rows)
    order = np.arange(table.num_rows)
    order[failed] = table.num_rows + np.arange(len(failed))
    merged = pa.concat_tables([table, table_of(rows, piece.removed)]).take(pa.array(order)).combine_chunks()
    if merged.equals(table):
        return PartRetried(item.index, item.listed, piece.pictures, len(failed), 0)
    now = dataclasses.replace(piece, pictures=tuple(pictures))
    key = _revised_key(now, merged)
    listed = {**item.listed, "piece": now.part, "key": key, "sha256": write_table(store, key, merged)}
    return PartRetried(item.index, listed, now.pictures, len(failed), recovered)


def _shares(
    parts: Sequence[dict[str, Any]],
    pictures: Sequence[Picture],
    limits: ScanConfig,
    store: Store,
    removed: frozenset[str],
    batch: int | None,
) -> Iterator[PartRetry]:
    if sum(part["rows"] for part in parts) != len(pictures):
        raise DatasetError(f"{store.uri}: the inventory is not of the pictures listed now; {_AGAIN}")
    start = 0
    for index, part in enumerate(parts):
        end = start + part["rows"]
        piece = Piece(tuple(pictures[start:end]), part["batch"], limits, store, removed)
        yield PartRetry(index, part, piece, batch)
        start = end


def _read_as_listed(store: Store, listed: dict[str, Any]) -> pa.Table:
    data = store.read(listed["key"])
    if hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise DatasetError(f"{store.uri}/{listed['key']}: damaged; {_AGAIN}")
    return pq.read_table(io.BytesIO(data))


def _require_aligned(table: pa.Table, item: PartRetry) -> None:
    rows = table.select(["source", "version", "verdict"]).to_pylist()
    for row, picture in zip(rows, item.piece.pictures, strict=True):
        # A picture that failed may have been replaced meanwhile; one that did not is not read here.
        same = row["version"] == picture.version or row["verdict"] == "failed"
        if row["source"] != picture.source or not same:
            raise DatasetError(f"{picture.source}: has changed since it was scanned; {_AGAIN}")


def _as_it_is_now(picture: Picture) -> Picture:
    """The listing's entry of a file that may have been replaced. Members of tars stay: their spans would not hold."""
    if picture.member or picture.fault or picture.root.startswith("embedded:"):
        return picture
    try:
        entry = open_store(picture.root).stat(picture.key)
    except NotFoundError:
        return picture
    return dataclasses.replace(picture, size=entry.size, version=entry.version)


def _revised_key(piece: Piece, table: pa.Table) -> str:
    digest = hashlib.sha256()
    for column in ("sha256", "version", "verdict", "reason", "error", "batch"):
        digest.update(str(table.column(column).to_pylist()).encode())
    return f"{piece.part.removesuffix('.parquet')}-{digest.hexdigest()[:12]}.parquet"
