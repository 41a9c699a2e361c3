"""Select: the verdict on every inventory row under a set of thresholds. A pure function: no pixel is decoded again.

A row gets the first reason that applies: what the scan said, then a leak, then the gates in the order of ``GATES``,
then duplicates among what is left (so that a poor copy never displaces a good one), then the lack of a good tile.
Of copies the one kept is the largest, then the best (JPEG quality, lossless above all; bits per pixel), then the first.
"""

import collections
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datagen.config import DatagenConfig, SelectConfig
from datagen.dataset import SELECTION, write_table
from datagen.picture.perceptual_hash import THUMB, correlation, near_pairs, orient
from datagen.picture.quality import WHOLE_PICTURE_MEASURES
from datagen.progress import Progress
from datagen.scan.inventory import read_inventory
from datagen.select.tiles import choose_tiles
from infra.storage import Store

SELECTION_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("verdict", pa.string()),  # kept | rejected | failed
        ("reason", pa.string()),  # empty when kept
        ("detail", pa.string()),  # the measure and its limit, or the error
        ("partner", pa.string()),  # of a duplicate: the copy kept; of a leak: the evaluation picture
        ("distance", pa.int32()),  # to the partner: bits of 64
        ("correlation", pa.float32()),  # with the partner: of 32x32 thumbnails
        ("tiles", pa.list_(pa.struct([(name, pa.int32()) for name in ("x", "y", "width", "height")]))),
    ]
)

MEASURES = [*WHOLE_PICTURE_MEASURES, "jpeg_quality", "bits_per_pixel"]
COLUMNS = [
    *("source", "sha256", "verdict", "reason", "error", "format", "width", "height", "phash", "grey_thumb"),
    *("cell_laplacian_variance", "cell_flat_fraction", *MEASURES),
]


class Gate(NamedTuple):
    """Reject for ``reason`` when ``measure`` lies on the wrong side of ``limit`` (a field of SelectConfig)."""

    reason: str
    measure: str
    limit: str


GATES = (
    Gate("too_small", "shorter_side", "min_side"),
    Gate("too_elongated", "aspect", "max_aspect"),
    Gate("low_jpeg_quality", "jpeg_quality", "min_jpeg_quality"),
    Gate("low_bits_per_pixel", "jpeg_bits_per_pixel", "min_bits_per_pixel"),
    Gate("flat", "flat_fraction", "max_flat_fraction"),
    Gate("blurred", "laplacian_variance", "min_laplacian_variance"),
    Gate("low_entropy", "entropy", "min_entropy"),
    Gate("blocky", "blockiness", "max_blockiness"),
    Gate("noisy", "noise", "max_noise"),
    Gate("overexposed", "overexposed", "max_overexposed"),
    Gate("underexposed", "underexposed", "max_underexposed"),
)


def select(config: DatagenConfig, store: Store) -> dict[str, Any]:
    """Write ``curation/selection.parquet`` from the inventory; returns the facts for the summary."""
    inventory = read_inventory(store, COLUMNS)
    guard = read_inventory(store, COLUMNS, guard=True)
    progress = Progress("select", inventory.num_rows, "images")
    selection = judge(inventory, guard, config)
    write_table(store, SELECTION, selection)
    counts = count_verdicts(selection)
    progress.advance(inventory.num_rows, notes=f"{counts['kept'] / max(1, inventory.num_rows):.1%} kept")
    unusable = guard.filter(pc.not_equal(guard.column("verdict"), "measured"))
    return {
        **counts,
        "tiles": sum(len(tiles) for tiles in selection.column("tiles").to_pylist()),
        "guard_pictures": guard.num_rows,
        "guard_pictures_unusable": unusable.column("source").to_pylist(),
        "seconds": round(progress.finish(), 3),
    }


def judge(inventory: pa.Table, guard: pa.Table, config: DatagenConfig) -> pa.Table:
    """Verdicts, :data:`SELECTION_SCHEMA`, one row an inventory row in the same order.

    Args:
        inventory, guard: :data:`COLUMNS` of the corpus' and of the leak guard's inventory.
    """
    rows: list[dict[str, Any]] = []
    for row in inventory.select(["source", "sha256", "verdict", "reason", "error"]).to_pylist():
        verdict = {"measured": "kept"}.get(row["verdict"], row["verdict"])
        rows.append({**row, "verdict": verdict, "detail": row["error"], "tiles": []})
    measures = _measures(inventory)
    _reject_leaks(rows, inventory, guard, config.select)
    _reject_by_gates(rows, measures, config.select)
    _reject_duplicates(rows, inventory, measures, config.select)
    _choose_tiles(rows, inventory, config)
    names = SELECTION_SCHEMA.names
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows], schema=SELECTION_SCHEMA)


def count_verdicts(selection: pa.Table) -> dict[str, Any]:
    """``{"inputs", "kept", "rejected": {reason: n}, "failed": {reason: n}}``."""
    counts = collections.Counter(zip(selection.column("verdict").to_pylist(), selection.column("reason").to_pylist()))
    by_verdict: dict[str, dict[str, int]] = {"rejected": {}, "failed": {}}
    for (verdict, reason), number in sorted(counts.items()):
        if verdict != "kept":
            by_verdict[verdict][reason] = number
    return {"inputs": selection.num_rows, "kept": sum(n for (v, _), n in counts.items() if v == "kept"), **by_verdict}


def _measures(inventory: pa.Table) -> dict[str, np.ndarray]:
    """Every measure as float64 ``[N]``; NaN where there is none, which no gate rejects."""
    values = {
        name: inventory.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("width", "height", *MEASURES)
    }
    width, height = values["width"], values["height"]
    values["shorter_side"] = np.minimum(width, height)
    values["aspect"] = np.maximum(width, height) / values["shorter_side"]
    values["jpeg_bits_per_pixel"] = np.where(np.isnan(values["jpeg_quality"]), np.nan, values["bits_per_pixel"])
    return values


def _reject_by_gates(rows: list[dict[str, Any]], measures: dict[str, np.ndarray], config: SelectConfig) -> None:
    for gate in GATES:
        limit = getattr(config, gate.limit)
        lower = gate.limit.startswith("min_")
        beyond = measures[gate.measure] < limit if lower else measures[gate.measure] > limit
        for i in np.flatnonzero(beyond):
            if rows[i]["verdict"] == "kept":
                sign = "<" if lower else ">"
                detail = f"{gate.measure} {measures[gate.measure][i]:.4g} {sign} {limit:g}"
                rows[i] |= {"verdict": "rejected", "reason": gate.reason, "detail": detail}


def _reject_leaks(rows: list[dict[str, Any]], inventory: pa.Table, guard: pa.Table, config: SelectConfig) -> None:
    theirs = [i for i, verdict in enumerate(guard.column("verdict").to_pylist()) if verdict == "measured"]
    ours = [i for i, row in enumerate(rows) if row["verdict"] == "kept"]
    matches = _near(_rows(guard, theirs), _rows(inventory, ours), config.leak_radius, config.leak_correlation)
    names = guard.column("source").to_pylist()
    best: dict[int, tuple[int, float, int]] = {}
    for guarded, found, distance, likeness in matches:
        candidate = (distance, -likeness, theirs[guarded])
        best[ours[found]] = min(best.get(ours[found], candidate), candidate)
    for i, (distance, likeness, guarded) in best.items():
        # Guard pictures are sources of the same kind: their names say which evaluation set they belong to.
        rows[i] |= {"verdict": "rejected", "reason": "leak", "partner": names[guarded], "detail": None}
        rows[i] |= {"distance": distance, "correlation": -likeness}


def _reject_duplicates(
    rows: list[dict[str, Any]], inventory: pa.Table, measures: dict[str, np.ndarray], config: SelectConfig
) -> None:
    kept = np.array([i for i, row in enumerate(rows) if row["verdict"] == "kept"], dtype=np.int64)
    quality = np.nan_to_num(measures["jpeg_quality"], nan=101.0)
    pixels = measures["width"] * measures["height"]
    order = kept[np.lexsort((kept, -measures["bits_per_pixel"][kept], -quality[kept], -pixels[kept]))]
    first_of: dict[str, int] = {}
    for i in order:
        keeper = first_of.setdefault(rows[i]["sha256"], int(i))
        if keeper != i:
            partner = rows[keeper]["source"]
            rows[i] |= {"verdict": "rejected", "reason": "exact_duplicate", "partner": partner, "distance": 0}
    order = np.array([i for i in order if rows[i]["verdict"] == "kept"], dtype=np.int64)
    table = _rows(inventory, order.tolist())
    neighbours: dict[int, list[tuple[int, int, float]]] = collections.defaultdict(list)
    for better, worse, distance, likeness in _near(table, table, config.duplicate_radius, config.duplicate_correlation):
        if better < worse:
            neighbours[worse].append((better, distance, likeness))
    # From the best down, so that a picture is compared with kept ones only and chains of likeness do not grow.
    for position, i in enumerate(order):
        for better, distance, likeness in neighbours[position]:
            keeper_row = rows[order[better]]
            if keeper_row["verdict"] == "kept":
                rows[i] |= {"verdict": "rejected", "reason": "near_duplicate", "partner": keeper_row["source"]}
                rows[i] |= {"distance": distance, "correlation": likeness}
                break


def _near(queries: pa.Table, base: pa.Table, radius: int, likeness: float) -> list[tuple[int, int, int, float]]:
    """(query, base, distance, correlation) of the pairs near by hash and confirmed on the thumbnails."""
    if not queries.num_rows or not base.num_rows:
        return []
    query_hashes, base_hashes = _hashes(queries), _hashes(base)
    pairs = near_pairs(query_hashes, base_hashes[:, 0], radius)
    query_thumbs, base_thumbs = queries.column("grey_thumb"), base.column("grey_thumb")
    confirmed = []
    for query, found, orientation, distance in pairs.tolist():
        turned = orient(_thumb(query_thumbs[query]), orientation)
        value = correlation(turned, _thumb(base_thumbs[found]))
        if value >= likeness:
            confirmed.append((query, found, distance, value))
    return confirmed


def _rows(table: pa.Table, indices: list[int]) -> pa.Table:
    return table.take(pa.array(indices, pa.int64()))  # An empty list alone would have no type.


def _hashes(table: pa.Table) -> np.ndarray:
    return np.array(table.column("phash").to_pylist(), dtype=np.uint64)


def _thumb(value: Any) -> np.ndarray:
    return np.frombuffer(value.as_py(), dtype=np.uint8).reshape(THUMB, THUMB)


def _choose_tiles(rows: list[dict[str, Any]], inventory: pa.Table, config: DatagenConfig) -> None:
    columns = ["width", "height", "cell_laplacian_variance", "cell_flat_fraction"]
    kept = [i for i, row in enumerate(rows) if row["verdict"] == "kept"]
    for i, cells in zip(kept, _rows(inventory.select(columns), kept).to_pylist()):
        width, height, sharp, flat = (cells[name] for name in columns)
        boxes = choose_tiles(width, height, np.array(sharp), np.array(flat), config.tiles)
        rows[i]["tiles"] = [box._asdict() for box in boxes]
        if not boxes:
            rows[i] |= {"verdict": "rejected", "reason": "no_good_tile", "detail": "every tile is blurred or flat"}
