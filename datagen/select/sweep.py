"""Sweep: what each limit costs. How much of a corpus is kept if one limit moves and all others stay.

Only the gates are asked again, over the measures in the inventory, so millions of pictures take seconds. Leaks,
duplicates and tiles are left as they are out of it: the figures say what passes the gates, not what is kept in the end.
"""

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from datagen.config import DatagenConfig, SelectConfig
from datagen.dataset import write_table
from datagen.select.gates import Bound, bounds, measure_columns, measures, require_scores
from datagen.select.select import read_parts
from infra.storage import Store

SWEEP = "curation/sweep.parquet"
SWEEP_PLOT = "curation/sweep.png"

SWEEP_SCHEMA = pa.schema(
    [
        ("gate", pa.string()),
        ("measure", pa.string()),
        ("side", pa.string()),  # min: what is below the limit is rejected; max: what is above
        ("limit", pa.float64()),
        ("configured", pa.bool_()),  # the limit that the configuration has
        ("pictures", pa.int64()),  # that pass all gates, this one with this limit
        ("megapixels", pa.float64()),  # of these
        ("rejected_alone", pa.int64()),  # pictures that fail this gate and no other
    ]
)

_PANELS_A_ROW = 4
_SHOWN = (0.05, 0.1, 0.25, 0.5)  # Shares of all pictures that a limit of the printed table rejects.


def sweep(config: DatagenConfig, store: Store, points: int = 25) -> str:
    """Write ``curation/sweep.parquet`` and ``curation/sweep.png``; returns the table for people.

    Args:
        points: limits tried for each gate, quantiles of its measure; the configured limit is one more.

    Raises:
        DatasetError: nothing was scanned here yet.
        ConfigError: a limit on a score that the scan did not take.
    """
    values, megapixels = _read_measures(config.select, store)
    swept = sweep_limits(values, megapixels, config.select, points)
    write_table(store, SWEEP, swept)
    sink = io.BytesIO()
    _plot(swept, len(megapixels)).savefig(sink, format="png", metadata={"Software": None})
    store.write(SWEEP_PLOT, sink.getvalue())
    return f"{_text(swept, values, megapixels)}\n{store.uri}/{SWEEP}\n{store.uri}/{SWEEP_PLOT}"


def sweep_limits(
    values: dict[str, np.ndarray], megapixels: np.ndarray, config: SelectConfig, points: int = 25
) -> pa.Table:
    """:data:`SWEEP_SCHEMA`, gates in their order, limits rising; a gate whose measure no picture has is left out.

    Args:
        values: float ``[N]`` for each measure, of measured pictures (``datagen.select.gates.measures``).
        megapixels: float ``[N]``.
    """
    gates = bounds(config)
    failures = np.zeros(len(megapixels), dtype=np.int16)
    for gate in gates:
        failures += gate.rejects(values[gate.measure])
    tables = [SWEEP_SCHEMA.empty_table()]
    for gate in gates:
        value = values[gate.measure]
        known = value[np.isfinite(value)]
        if not len(known):
            continue
        others_pass = failures == gate.rejects(value)
        limits = _limits(known, gate, points)
        pictures, sizes = _passing(value[others_pass], megapixels[others_pass], limits, gate.lower)
        tables.append(
            pa.table(
                {
                    "gate": [gate.reason] * len(limits),
                    "measure": [gate.measure] * len(limits),
                    "side": ["min" if gate.lower else "max"] * len(limits),
                    "limit": limits,
                    "configured": limits == gate.limit,
                    "pictures": pictures,
                    "megapixels": sizes,
                    "rejected_alone": others_pass.sum() - pictures,
                },
                schema=SWEEP_SCHEMA,
            )
        )
    return pa.concat_tables(tables)


def _read_measures(config: SelectConfig, store: Store) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What the gates look at, float32 ``[N]`` by measure, and megapixels, of the measured pictures."""
    names = sorted({gate.measure for gate in bounds(config)})
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in [*names, "megapixels"]}
    for part in read_parts(store, ["verdict", *measure_columns(config)]):
        found = measures(part.filter(pc.equal(part.column("verdict"), "measured")), config)
        for name in names:
            pieces[name].append(found[name].astype(np.float32))
        pieces["megapixels"].append(found["width"] * found["height"] / 1e6)
    values = {name: np.concatenate(pieces.pop(name)) for name in list(pieces)}
    megapixels = values.pop("megapixels")
    require_scores(config, {name: int(np.isfinite(value).sum()) for name, value in values.items()}, len(megapixels))
    return values, megapixels


def _limits(known: np.ndarray, gate: Bound, points: int) -> np.ndarray:
    """Quantiles of the measure and the configured limit, rising; the outermost reject nothing and nearly all."""
    quantiles = np.quantile(known, np.linspace(0, 1, points)).astype(np.float64)
    return np.unique(quantiles if math.isnan(gate.limit) else np.append(quantiles, gate.limit))


def _passing(
    value: np.ndarray, megapixels: np.ndarray, limits: np.ndarray, lower: bool
) -> tuple[np.ndarray, np.ndarray]:
    """How many pictures, and megapixels, are on the right side of each limit or have no value."""
    unknown = np.isnan(value)
    order = np.argsort(value[~unknown])
    ranked = value[~unknown][order].astype(np.float64)
    sizes = np.concatenate([[0.0], np.cumsum(megapixels[~unknown][order])])
    if lower:
        first = np.searchsorted(ranked, limits, side="left")
        pictures, area = len(ranked) - first, sizes[-1] - sizes[first]
    else:
        pictures = np.searchsorted(ranked, limits, side="right")
        area = sizes[pictures]
    return pictures + unknown.sum(), area + megapixels[unknown].sum()


def _text(swept: pa.Table, values: dict[str, np.ndarray], megapixels: np.ndarray) -> str:
    total = max(1, len(megapixels))
    rows = swept.to_pylist()
    now = [row for row in rows if row["configured"]]
    lines = [
        f"{len(megapixels)} measured pictures, {megapixels.sum():.0f} megapixels. "
        "Gates only: leaks, duplicates and tiles are not judged again.",
        f"With the configured limits {now[0]['pictures'] / total:.1%} pass." if now else "No limit is configured.",
        "",
        f"{'gate':<22}{'limit':>16}{'rejects':>9}{'alone':>8}   what passes all gates, by limit",
    ]
    for gate in dict.fromkeys(row["gate"] + " " + row["side"] for row in rows):
        own = [row for row in rows if row["gate"] + " " + row["side"] == gate]
        value = values[own[0]["measure"]]
        upper = own[0]["side"] == "max"
        rejected = [(value > row["limit"] if upper else value < row["limit"]).sum() / total for row in own]
        current = next((i for i, row in enumerate(own) if row["configured"]), None)
        shown = {min(range(len(own)), key=lambda i: abs(rejected[i] - share)) for share in _SHOWN}
        others = "  ".join(f"{own[i]['limit']:.4g}: {own[i]['pictures'] / total:.1%}" for i in sorted(shown))
        if current is None:
            limit, shares = "none", f"{'':>9}{'':>8}"
        else:
            limit = f"{'<' if upper else '>'}= {own[current]['limit']:g}"
            shares = f"{rejected[current]:>9.1%}{own[current]['rejected_alone'] / total:>8.1%}"
        lines.append(f"{own[0]['gate']:<22}{limit:>16}{shares}   {others}")
    return "\n".join(lines)


def _plot(swept: pa.Table, total: int) -> Figure:
    rows = swept.to_pylist()
    gates = list(dict.fromkeys((row["gate"], row["side"]) for row in rows))
    down = max(1, -(-len(gates) // _PANELS_A_ROW))
    figure = Figure(figsize=(3.2 * _PANELS_A_ROW, 2.4 * down + 0.7), dpi=110, layout="constrained")
    figure.suptitle("Share of the measured pictures that pass all gates, by the limit of one")
    for index, (gate, side) in enumerate(gates):
        own = [row for row in rows if (row["gate"], row["side"]) == (gate, side)]
        axes = figure.add_subplot(down, _PANELS_A_ROW, index + 1)
        limits = [row["limit"] for row in own]
        axes.plot(limits, [100 * row["pictures"] / max(1, total) for row in own], color="#1f5fa8", linewidth=1.6)
        now = [row for row in own if row["configured"]]
        if now:
            share = 100 * now[0]["pictures"] / max(1, total)
            axes.axvline(now[0]["limit"], color="#b3261e", linewidth=1, linestyle="--")
            axes.plot([now[0]["limit"]], [share], "o", color="#b3261e", markersize=4)
        if limits[0] > 0 and limits[-1] > 100 * limits[0]:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        state = f"now {now[0]['limit']:g}" if now else "no limit now"
        axes.set_title(f"{gate.replace('_', ' ')} ({state})", fontsize=9)
        axes.set_xlabel(f"{side} {own[0]['measure'].replace('_', ' ')}", fontsize=8)
        axes.set_ylim(0, 102)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if index % _PANELS_A_ROW == 0:
            axes.set_ylabel("% pass", fontsize=8)
    return figure
