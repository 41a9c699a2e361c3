"""Section "Curves": the loss of every training stage, as line charts that the template draws in SVG."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from infra.launcher import read_marker
from pipeline.curves import loss_lines, read_history
from pipeline.report.run import STAGES, TRAININGS

# Geometry in SVG units, which are CSS pixels at full width.
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36

_LABELS = {
    "loss": "mean of what was trained",
    "loss_small": "small variant",
    "loss_large": "large variant",
    "loss_before": "query, before adaptation",
    "loss_adapted": "query, after adaptation",
}
_LOG_FROM = 8.0  # ratio of largest to smallest loss from which a linear axis hides the end of the curve


@dataclass(frozen=True)
class Series:
    """One line. ``path`` is SVG path data, ``points`` pixel positions with their (step, loss)."""

    label: str
    path: str
    points: list[tuple[float, float, float, float]]
    last: float


@dataclass(frozen=True)
class Chart:
    """The curves of one stage. Ticks are (pixel position, label)."""

    stage: str
    series: list[Series]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    log: bool
    facts: list[str]
    run_id: str


def curves(root: Path) -> list[tuple[str, Chart | None]]:
    """(label, chart) of every training stage, None for one that has logged nothing yet."""
    return [(STAGES[stage], _chart(root, stage)) for stage in TRAININGS]


def _chart(root: Path, stage: str) -> Chart | None:
    history = read_history(root / stage / "out" / "metrics.jsonl")
    lines = loss_lines(history)
    if not lines:
        return None
    values = [value for line in lines.values() for _, value in line]
    log = min(values) > 0 and max(values) / min(values) > _LOG_FROM
    y_values = _ticks(min(values), max(values), log)
    last_step = history[-1]["step"]
    x_values = [x for x in MaxNLocator(5, integer=True).tick_values(0, last_step) if 0 <= x <= last_step]

    def x_of(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / last_step, 1)

    def y_of(value: float) -> float:
        low, high, at = (math.log(v) if log else v for v in (y_values[0], y_values[-1], value))
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (at - low) / (high - low), 1)

    series = []
    for name in sorted(lines):
        points = [(x_of(step), y_of(value), step, value) for step, value in lines[name]]
        path = "M" + " L".join(f"{x} {y}" for x, y, *_ in points)
        label = "loss" if len(lines) == 1 else _LABELS.get(name, name.replace("_", " "))
        series.append(Series(label, path, points, lines[name][-1][1]))
    marker = read_marker(root / stage / "out") or {}
    return Chart(
        stage=STAGES[stage],
        series=series,
        x_ticks=[(x_of(x), f"{x:,.0f}") for x in x_values],
        y_ticks=[(y_of(y), label) for y, label in zip(y_values, _labels(y_values), strict=True)],
        log=log,
        facts=_facts(history, marker),
        run_id=str(marker.get("run_id", "")),
    )


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round values that enclose [low, high]."""
    if log:
        ticks = [float(tick) for tick in LogLocator(subs=(1, 2, 5)).tick_values(low, high)]
        first = max(i for i, tick in enumerate(ticks) if tick <= low)
        last = min(i for i, tick in enumerate(ticks) if tick >= high)
        return ticks[first : last + 1]
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return [float(tick) for tick in MaxNLocator(5).tick_values(low - margin, high + margin)]


def _labels(values: list[float]) -> list[str]:
    """With as many digits as it takes to tell neighbours apart."""
    labels: list[str] = []
    for digits in range(3, 9):
        labels = [f"{value:.{digits}g}" for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def _facts(history: list[dict[str, Any]], marker: Mapping[str, Any]) -> list[str]:
    rates = [row["images_per_second"] for row in history if "images_per_second" in row]
    waits = [row["data_wait_share"] for row in history if "data_wait_share" in row]
    facts = [f"{history[-1]['step']:,} steps" + ("" if marker else " so far")]
    if ranks := marker.get("ranks"):
        facts.append(f"{ranks} rank{'s' if ranks != 1 else ''}")
    data = marker.get("config", {}).get("data", {})
    if data:
        facts.append(f"batch {data['batch']} × {data['patch']}²")
    if rates:
        facts.append(f"{sum(rates) / len(rates):.1f} patches/s")
    if waits:
        facts.append(f"{sum(waits) / len(waits):.0%} waiting for data")
    return facts
