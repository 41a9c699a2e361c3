"""Select: the verdict on every inventory row under a set of thresholds. A pure function: no pixel is decoded again.

A row gets the first reason that applies: what the scan said, then a leak, then the gates in their order
(``datagen.select.gates``), then duplicates among what is left (so that a poor copy never displaces a good one), then
the lack of a good tile. Of copies the one kept is of the earliest batch, then the largest, then the best (JPEG quality,
lossless above all; bits per pixel), then the first. So the verdicts on a batch never depend on later ones.

A picture that was taken down stays what it was, as far as the others are concerned: one that was kept is still the
keeper of its copies and keeps its tiles, which pack leaves out after dealing, so that those of all others stay where
they are; only its verdict is ``removed``.

Memory grows by about half a kB a picture (11 GB for 20 million, measured): the inventory is read part by
part, thumbnails only of what looks alike, quality maps only of what is kept.
"""

import collections
import concurrent.futures
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datagen.config import DatagenConfig
from datagen.dataset import SELECTION, read_take_downs
from datagen.progress import Progress
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory, read_manifest, read_part, read_rows
from datagen.select.duplicates import Candidates, Copies, exact_copies, from_the_best_down, hash_keys, near_copies
from datagen.select.gates import bounds, first_rejection, measure_columns, measures, require_scores
from datagen.select.leaks import find_leaks
from datagen.select.neighbours import ORIENTATIONS
from datagen.select.tiles import COLUMNS as TILE_COLUMNS
from datagen.select.tiles import TILES_TYPE, choose_all_tiles
from infra.storage import Store

SELECTION_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("batch", pa.int32()),
        ("verdict", pa.string()),  # kept | rejected | failed
        ("reason", pa.string()),  # empty when kept
        ("detail", pa.string()),  # the measure and its limit, how a copy was found, or the error
        ("partner", pa.string()),  # of a duplicate: the copy kept; of a leak: the evaluation picture
        ("distance", pa.int32()),  # to the partner: bits of 64
        ("correlation", pa.float32()),  # with the partner: of thumbnails; null where one is missing, or not needed
        ("tiles", TILES_TYPE),
    ]
)

_GUARD_COLUMNS = ["source", "verdict", "phash", "thumbnail"]

_ROWS_AT_A_TIME = 65536
_NAMES_AT_A_TIME = 65536
_PARTS_AHEAD = 4

# Reasons are codes until the rows are written: these, and from len(_REASONS) on the gates.
_REASONS = ("", "leak", "exact_duplicate", "near_duplicate", "removed")
_SCAN = -1  # The scan gave its own reason.
_KEPT, _LEAK, _EXACT, _NEAR, _REMOVED = range(len(_REASONS))

_MATCHES_SCHEMA = pa.schema(
    [("row", pa.int64()), *(SELECTION_SCHEMA.field(name) for name in ("partner", "distance", "correlation", "detail"))]
)


class _Facts(NamedTuple):
    """What one pass over the inventory leaves in memory."""

    reason: np.ndarray  # int16 [N], codes: what the scan and the gates say
    value: np.ndarray  # float32 [N], what the gate saw; NaN unless a gate rejects
    measured: np.ndarray  # int64 [M], rows
    phash: np.ndarray  # uint64 [M], upright
    center_phash: np.ndarray  # uint64 [M]
    candidates: Candidates  # measured and through the gates
    dealt: np.ndarray  # int64, rows taken down whose tiles were dealt to shards


def select(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Write ``curation/selection.parquet`` from the inventory; returns the facts for the summary.

    Raises:
        DatasetError: nothing was scanned here yet.
        ConfigError: a limit on a score that the scan did not take.
    """
    inputs = sum(part["rows"] for part in read_manifest(store)["parts"])
    guard = read_inventory(store, ["source", "verdict"], guard=True)
    progress = Progress("select", inputs, "images")
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    tiles = 0
    with tempfile.TemporaryDirectory(prefix="ird-select-") as folder:
        path = Path(folder) / "selection.parquet"
        with pq.ParquetWriter(path, SELECTION_SCHEMA, compression="zstd") as writer:
            for rows in _evenly(judge(config, store, lambda note: progress.advance(0, notes=note))):
                writer.write_table(rows)
                counts.update(_tally(rows))
                tiles += pc.sum(pc.list_value_length(rows.column("tiles"))).as_py() or 0
                progress.advance(rows.num_rows, notes=f"{counts['kept', ''] / counts.total():.1%} kept")
        store.upload(path, SELECTION)
    unusable = guard.filter(pc.not_equal(guard.column("verdict"), "measured"))
    return {
        **_counts(counts),
        "tiles": tiles,
        "guard_pictures": guard.num_rows,
        "guard_pictures_unusable": unusable.column("source").to_pylist(),
        "seconds": round(progress.finish(), 3),
    }


def judge(config: DatagenConfig, store: Store, say: Callable[[str], None] = lambda note: None) -> Iterator[pa.Table]:
    """Verdicts, :data:`SELECTION_SCHEMA`, one row an inventory row in the same order, part by part.

    Args:
        say: told what is being done until the first verdict, which is most of the time.

    Raises:
        DatasetError, ConfigError: see :func:`select`.
    """
    taken_down = read_take_downs(store)
    facts = _read_facts(config, store, taken_down, say)
    say("looking for leaks")
    leaks = list(_reject_leaks(facts, config, store))
    say("looking for copies")
    copies = list(_reject_copies(facts, config, store))
    matches = pa.concat_tables([_MATCHES_SCHEMA.empty_table(), *leaks, *copies]).sort_by("row")
    reasons, values = facts.reason, facts.value
    del facts  # The candidates and their hashes, most of the memory, have done their work.
    removed = {picture["sha256"]: picture.get("note") for picture in taken_down}
    rows = matches.column("row").to_numpy()
    start = 0
    for part in read_parts(store, ["source", "sha256", "batch", "verdict", "reason", "error", *TILE_COLUMNS]):
        stop = start + part.num_rows
        first, last = np.searchsorted(rows, (start, stop))
        found = _spread(matches.slice(first, last - first), rows[first:last] - start, part.num_rows)
        yield _judge_part(part, reasons[start:stop], values[start:stop], found, config, removed)
        start = stop


def count_verdicts(selection: pa.Table) -> dict[str, Any]:
    """``{"inputs", "kept", "rejected": {reason: n}, "failed": {reason: n}}``."""
    return _counts(_tally(selection))


def read_parts(store: Store, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of the inventory, part after part in its order; the next few are fetched meanwhile.

    Raises:
        DatasetError, StorageError: see ``datagen.scan.inventory.read_part``.
    """
    keys = [part["key"] for part in read_manifest(store)["parts"]]
    with concurrent.futures.ThreadPoolExecutor(_PARTS_AHEAD) as pool:
        ahead: collections.deque[concurrent.futures.Future[pa.Table]] = collections.deque()
        for key in keys:
            ahead.append(pool.submit(read_part, store, key, columns))
            if len(ahead) > _PARTS_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    if not keys:
        yield pa.schema([INVENTORY_SCHEMA.field(name) for name in columns]).empty_table()


def _read_facts(
    config: DatagenConfig, store: Store, taken_down: list[dict[str, Any]], say: Callable[[str], None]
) -> _Facts:
    gates = bounds(config.select)
    columns = ["source", "verdict", "batch", "sha256", "pixel_sha256", "phash", "center_phash"]
    digests = pa.array([picture["sha256"] for picture in taken_down], pa.string())
    kept_before = pa.array([picture["source"] for picture in taken_down if picture["dealt"]], pa.string())
    facts: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    candidates: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    scored: collections.Counter[str] = collections.Counter()
    start = 0
    for part in read_parts(store, [*columns, *measure_columns(config.select)]):
        measured = pc.equal(part.column("verdict"), "measured").to_numpy()
        values = measures(part, config.select)
        scored.update({name: int(np.isfinite(values[name][measured]).sum()) for name in values})
        gate, value = first_rejection(values, gates)
        dealt = measured & pc.is_in(part.column("source"), kept_before).to_numpy()
        gone = measured & pc.is_in(part.column("sha256"), digests).to_numpy() & ~dealt
        through = measured & (gate < 0) & ~gone
        hashes = _phashes(part, measured)
        code = np.where(gate < 0, _KEPT, gate + len(_REASONS))
        facts["reason"].append(np.where(measured, np.where(gone, _REMOVED, code), _SCAN))
        facts["dealt"].append(start + np.flatnonzero(dealt))
        facts["value"].append(value.astype(np.float32))
        facts["measured"].append(start + np.flatnonzero(measured))
        facts["phash"].append(hashes[:, 0].copy())
        # No hash of a picture has all its bits set, so this one is near none.
        facts["center_phash"].append(pc.fill_null(part.column("center_phash"), 2**64 - 1).to_numpy()[measured])
        candidates["row"].append(start + np.flatnonzero(through))
        candidates["phash"].append(hashes[through[measured]])
        for name in ("batch", "width", "height"):
            candidates[name].append(part.column(name).to_numpy()[through].astype(np.int32))
        for name in ("jpeg_quality", "bits_per_pixel"):
            candidates[name].append(values[name][through].astype(np.float32))
        for name in ("sha256", "pixel_sha256"):
            candidates[name].append(hash_keys(part.column(name).filter(through)))
        start += part.num_rows
        say(f"{start:,} rows of the inventory read")
    require_scores(config.select, scored, sum(len(rows) for rows in facts["measured"]))
    return _Facts(**_joined(facts), candidates=Candidates(**_joined(candidates)))


def _joined(pieces: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Each column in one array; its pieces are let go before the next is joined."""
    return {name: np.concatenate(pieces.pop(name)) for name in list(pieces)}


def _phashes(part: pa.Table, rows: np.ndarray) -> np.ndarray:
    """Uint64 ``[K, 8]`` of the rows where a mask is true."""
    return part.column("phash").filter(rows).combine_chunks().flatten().to_numpy().reshape(-1, ORIENTATIONS)


def _reject_leaks(facts: _Facts, config: DatagenConfig, store: Store) -> Iterator[pa.Table]:
    """Mark the copies of evaluation pictures; yields the matches, the nearest picture of each."""
    guard = read_inventory(store, _GUARD_COLUMNS, guard=True)

    def thumbnails(indices: np.ndarray) -> list[bytes | None]:
        return read_rows(store, ["thumbnail"], facts.measured[indices]).column("thumbnail").to_pylist()

    found = find_leaks(facts.phash, facts.center_phash, thumbnails, guard, config.select)
    rows = facts.measured[np.array([match.row for match in found], dtype=np.int64)]
    # What was kept and then taken down was judged by its pixels once; without them it is not judged again.
    judged = ~np.isin(rows, facts.dealt)
    found, rows = list(itertools.compress(found, judged)), rows[judged]
    facts.reason[rows] = _LEAK
    sources = guard.column("source").to_pylist()
    yield pa.table(
        {
            "row": rows,
            "partner": pa.array([sources[match.guard] for match in found], pa.string()),
            "distance": pa.array([match.distance for match in found], pa.int32()),
            "correlation": _or_null(np.array([match.correlation for match in found])),
            "detail": pa.array([match.how for match in found], pa.string()),
        }
    )


def _reject_copies(facts: _Facts, config: DatagenConfig, store: Store) -> Iterator[pa.Table]:
    """Mark the duplicates among what is left; yields the matches, each with the copy that is kept."""

    def thumbs(rows: np.ndarray) -> list[bytes | None]:
        return read_rows(store, ["grey_thumb"], rows).column("grey_thumb").to_pylist()

    left = facts.reason[facts.candidates.row] == _KEPT
    ranked = from_the_best_down(facts.candidates.take(left))
    for code, find in ((_EXACT, exact_copies), (_NEAR, lambda some: near_copies(some, thumbs, config.select))):
        copies = find(ranked)
        copies = copies.take(~np.isin(ranked.row[copies.copy], facts.dealt))
        rows = ranked.row[copies.copy]
        facts.reason[rows] = code
        yield pa.table(
            {
                "row": rows,
                "partner": _sources(store, ranked.row[copies.keeper]),
                "distance": copies.distance,
                "correlation": _or_null(copies.correlation),
                "detail": _how(copies) if code == _EXACT else pa.nulls(len(rows), pa.string()),
            }
        )
        ranked = ranked.take(facts.reason[ranked.row] == _KEPT)


def _how(copies: Copies) -> pa.Array:
    return pc.if_else(pa.array(copies.same_file), "the same file", "the same pixels in another file")


def _sources(store: Store, rows: np.ndarray) -> pa.Array:
    """Names of inventory rows, asked for a bounded number at a time in their order."""
    wanted, places = np.unique(rows, return_inverse=True)
    blocks = [wanted[i : i + _NAMES_AT_A_TIME] for i in range(0, len(wanted), _NAMES_AT_A_TIME)]
    names = [name for block in blocks for name in read_rows(store, ["source"], block).column("source").to_pylist()]
    return pa.array(names, pa.string()).take(pa.array(places))


def _or_null(values: np.ndarray) -> pa.Array:
    """Float32 with null for NaN."""
    return pa.array(values.astype(np.float32), from_pandas=True)


def _spread(matches: pa.Table, places: np.ndarray, count: int) -> pa.Table:
    """The matches at their places among ``count`` rows, the rest null."""
    index = np.full(count, -1, dtype=np.int64)
    index[places] = np.arange(len(places))
    return matches.take(pa.array(index, mask=index < 0))


def _judge_part(
    part: pa.Table,
    codes: np.ndarray,
    values: np.ndarray,
    matches: pa.Table,
    config: DatagenConfig,
    removed: dict[str, str | None],
) -> pa.Table:
    """The selection's rows of one part, given the codes of its rows, what the gates saw, and the row-wise matches."""
    gates = bounds(config.select)
    names = np.array([*_REASONS, *(gate.reason for gate in gates)], dtype=object)
    by_scan = codes == _SCAN
    verdict = np.where(by_scan, _objects(part, "verdict"), np.where(codes == _KEPT, "kept", "rejected"))
    reason = np.where(by_scan, _objects(part, "reason"), names[np.maximum(codes, 0)])
    detail = np.where(by_scan, _objects(part, "error"), _objects(matches, "detail"))
    for i in np.flatnonzero(codes >= len(_REASONS)):
        detail[i] = gates[codes[i] - len(_REASONS)].detail(float(values[i]))
    kept = codes == _KEPT
    tiles, number = (
        choose_all_tiles(part.select(TILE_COLUMNS).filter(kept), config.tiles),
        np.zeros(len(codes), np.int32),
    )
    number[kept] = pc.list_value_length(tiles).to_numpy()
    bare = kept & (number == 0)
    verdict[bare], reason[bare], detail[bare] = "rejected", "no_good_tile", "every tile is blurred or flat"
    taken_down = pc.is_in(part.column("sha256"), pa.array(list(removed), pa.string())).to_numpy() & (
        verdict != "failed"
    )
    verdict[taken_down], reason[taken_down] = "rejected", "removed"
    detail[taken_down] = [removed[sha256] for sha256 in part.column("sha256").filter(taken_down).to_pylist()]
    offsets = np.concatenate([[0], np.cumsum(number)]).astype(np.int32)
    columns = {
        **{name: part.column(name) for name in ("source", "sha256", "batch")},
        "verdict": pa.array(verdict, pa.string()),
        "reason": pa.array(reason, pa.string()),
        "detail": pa.array(detail, pa.string()),
        **{name: _unless(taken_down, matches.column(name)) for name in ("partner", "distance", "correlation")},
        "tiles": pa.ListArray.from_arrays(offsets, tiles.values),
    }
    return pa.table(columns).select(SELECTION_SCHEMA.names).cast(SELECTION_SCHEMA)


def _objects(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table.column(name).to_pylist(), dtype=object)


def _unless(mask: np.ndarray, column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pa.array(mask), pa.scalar(None, column.type), column)


def _evenly(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, a fixed number at a time, so that the file does not depend on how the scan cut its parts."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(rows.num_rows for rows in waiting) >= _ROWS_AT_A_TIME:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, _ROWS_AT_A_TIME).combine_chunks()
            waiting = [joined.slice(_ROWS_AT_A_TIME)]
    if any(rows.num_rows for rows in waiting):
        yield pa.concat_tables(waiting).combine_chunks()


def _tally(selection: pa.Table) -> collections.Counter[tuple[str, str]]:
    counted = selection.select(["verdict", "reason"]).group_by(["verdict", "reason"]).aggregate([([], "count_all")])
    return collections.Counter({(row["verdict"], row["reason"]): row["count_all"] for row in counted.to_pylist()})


def _counts(tally: collections.Counter[tuple[str, str]]) -> dict[str, Any]:
    by_verdict: dict[str, dict[str, int]] = {"rejected": {}, "failed": {}}
    for (verdict, reason), number in sorted(tally.items()):
        if verdict != "kept":
            by_verdict[verdict][reason] = number
    return {"inputs": tally.total(), "kept": sum(n for (v, _), n in tally.items() if v == "kept"), **by_verdict}
