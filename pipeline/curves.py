"""Curves of training runs that lie on this machine: loss and held-out PSNR, of one run or of several together."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from infra.errors import Refusal
from infra.files import publish_atomically

Over = Literal["step", "device_hours"]
Lines = dict[str, list[tuple[float, float]]]

_LABELS = {"step": "step", "device_hours": "hours of all devices"}
_LOG_FROM = 3.0  # ratio of largest to smallest loss from which a linear axis hides the end of the curve
# What a format says of when and by what it was written, which would make two pictures of the same runs differ.
_FORMATS = {".png": "Software", ".pdf": "CreationDate"}
_ONLY = "default"  # the variant of networks that have one
_MOST_LINES = 12  # beyond it a legend says nothing


def read_history(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl or validation.jsonl by ascending step.

    Of a step logged twice, by a run that was resumed, the last counts. A line that a kill cut short is passed over; a
    missing file is no history.
    """
    rows: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def loss_lines(history: Sequence[Mapping[str, Any]], over: Over = "step") -> Lines:
    """(x, loss) of each loss in lines of a metrics.jsonl, by name; what is not finite is left out."""
    return _lines(history, _losses, over)


def draw_curves(runs: Sequence[Path], path: Path, over: Over = "step") -> None:
    """Draw the losses of ``runs``, folders that a training stage wrote, and their held-out PSNR if they were validated:
    of one run every variant and task, of several the mean of each variant over the tasks.

    Args:
        path: the picture, .png or .pdf.
        over: what stands on the x axis. Hours of all devices make runs comparable whose steps cost differently.

    Raises:
        Refusal: a run has logged nothing yet, is none, or was given twice; its message names the folder. Or ``path``
            has another suffix.
    """
    if path.suffix not in _FORMATS:
        raise Refusal(f"{path}: cannot be drawn; give a name that ends in one of {', '.join(_FORMATS)}")
    losses: Lines = {}
    scores: Lines = {}
    for run, name in zip(runs, _names(runs)):
        history = read_history(run / "metrics.jsonl")
        if not history:
            raise Refusal(
                f"{run}: no metrics.jsonl with a step in it; give what was out= of a stage that has logged one"
            )
        measured = _lines(read_history(run / "validation.jsonl"), _scores if len(runs) == 1 else _mean_scores, over)
        for loss, points in loss_lines(history, over).items():
            losses[f"{name} {loss.replace('_', ' ')}".strip()] = points
        scores |= {f"{name} {label}".strip(): points for label, points in measured.items()}
    with publish_atomically(path) as temporary:
        _figure(losses, scores, _LABELS[over]).savefig(temporary, metadata={_FORMATS[path.suffix]: None})


def _figure(losses: Lines, scores: Lines, label: str) -> Figure:
    panels = [("loss, mean since the point before", losses)]
    if scores:
        panels.append(("held-out PSNR, dB", scores))
    figure = Figure(figsize=(6.4 * len(panels), 4.4), dpi=110, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, points in lines.items():
            # A single point is a run at its first measurement, which a line would not show.
            axes.plot(*zip(*points), label=name, linewidth=1.4, marker="o" if len(points) == 1 else None)
        axes.set(title=title, xlabel=label)
        axes.grid(alpha=0.3)
        if len(lines) <= _MOST_LINES:
            axes.legend(fontsize="small")
    values = [value for points in losses.values() for _, value in points]
    if values and 0 < min(values) < max(values) / _LOG_FROM:
        axes = figure.axes[0]
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def _names(runs: Sequence[Path]) -> list[str]:
    """Of one run none; of several as much of each path as tells it from the others."""
    if len(runs) == 1:
        return [""]
    parts = [run.resolve().parts for run in runs]
    for kept in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-kept:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise Refusal(f"{runs[0]}: a run was given twice")


def _lines(
    history: Sequence[Mapping[str, Any]], values: Callable[[Mapping[str, Any]], dict[str, float]], over: Over
) -> Lines:
    lines: Lines = {}
    for row in history:
        for label, value in values(row).items():
            if math.isfinite(value):
                lines.setdefault(label, []).append((row[over], value))
    return lines


def _losses(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("loss")}


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        task if variant == _ONLY else f"{variant}, {task}": psnr
        for variant, by_task in row["psnr"].items()
        for task, psnr in by_task.items()
    }


def _mean_scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        "" if variant == _ONLY else variant: sum(by_task.values()) / len(by_task)
        for variant, by_task in row["psnr"].items()
    }
