"""Sections "Results" and "Before and after": the figures of the evaluation, and the pictures behind them."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.pictures import find_pictures
from pipeline.report.images import Image, image_of_file
from pipeline.report.run import read_json
from pipeline.stages import read_record

INPUTS = ("degraded", "bicubic")  # what every method of a task is measured against
PICTURES_SHOWN = 3  # a task

_METHODS = {
    "degraded": "Degraded input",
    "bicubic": "Bicubic",
    "dynet-small": "DyNet small",
    "dynet-large": "DyNet large",
    "edsr": "EDSR",
    "large-scale": "MZSR before meta-learning",
    "mzsr-unadapted": "MZSR, not adapted",
    "clean": "Clean",
}


@dataclass(frozen=True)
class Line:
    """Means of one method on one task. ``gain`` in dB over the task's input; None for the input itself.

    ``bar`` is where the gain's bar begins and how long it is, in percent of an axis that all tasks share.
    """

    method: str
    psnr: float
    ssim: float
    gain: float | None
    bar: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Task:
    """One task: its lines, the protocol of its figures, and what an honest reader must be told."""

    name: str
    title: str
    protocol: str
    pictures: int
    lines: list[Line]
    note: str


@dataclass(frozen=True)
class Results:
    """The table, its headline, and the single figures: (task, picture, method, PSNR, SSIM)."""

    tasks: list[Task]
    headline: str
    rows: list[tuple[str, str, str, float, float]]


@dataclass(frozen=True)
class Strip:
    """One picture under every method of a task: (figure, image), in the order of the methods."""

    picture: str
    cells: list[tuple[str, Image]]


@dataclass(frozen=True)
class Comparison:
    """The pictures of one task under its methods, input first and clean last; ``hidden`` more lie in the folder."""

    title: str
    methods: list[str]
    strips: list[Strip]
    hidden: int


@dataclass(frozen=True)
class Slider:
    """A picture that the registered model restored: before and after."""

    picture: str
    variant: str
    before: Image
    after: Image


def results(root: Path) -> Results | None:
    """The table of stage ``evaluate``; None when it has not run."""
    found = read_json(root / "evaluate" / "out" / "results.json")
    if not found:
        return None
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in found["means"]:
        by_task.setdefault(row["task"], []).append(row)
    tasks = _with_bars([_task(name, rows) for name, rows in by_task.items()])
    rows = [
        (task_title(r["task"]), r["picture"], method_title(r["method"]), r["psnr"], r["ssim"]) for r in found["rows"]
    ]
    return Results(tasks, _headline(tasks), rows)


def comparisons(root: Path) -> list[Comparison]:
    """The pictures of stage ``evaluate``, in the order of its table; empty when it has not run."""
    out = root / "evaluate" / "out"
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in read_json(out / "results.json").get("rows", []):
        figures.setdefault(row["task"], {}).setdefault(row["picture"], {})[row["method"]] = row["psnr"]
    found = []
    for task, pictures in figures.items():
        shown = list(pictures.items())[:PICTURES_SHOWN]
        methods = [*shown[0][1], "clean"]
        strips = [_strip(out / "pictures" / task / picture, picture, methods, psnrs) for picture, psnrs in shown]
        titles = [method_title(method) for method in methods]
        found.append(Comparison(task_title(task), titles, strips, len(pictures) - len(shown)))
    return found


def sliders(root: Path) -> tuple[str, list[Slider]]:
    """(title of the task, before and after of stage ``restore``); the list is empty when it has not run."""
    folder = root / "restore"
    found = []
    pictures = find_pictures(folder / "degraded") if (folder / "degraded").is_dir() else []
    for name in pictures[:PICTURES_SHOWN]:
        for variant in ("small", "large"):
            if (folder / variant / name).exists():
                before = image_of_file(folder / "degraded" / name, f"{name}: degraded")
                after = image_of_file(folder / variant / name, f"{name}: restored by the {variant} variant")
                found.append(Slider(name.stem, variant, before, after))
    return task_title(str(read_record(folder).get("task", ""))), found


def task_title(task: str) -> str:
    """A task's name in words: noise_50 is "Noise, sigma 50"."""
    if match := re.fullmatch(r"noise_(\d+)", task):
        return f"Noise, sigma {match[1]}"
    if match := re.fullmatch(r"sr_x(\d+)", task):
        return f"Super-resolution ×{match[1]}"
    if match := re.fullmatch(r"blind_sr_x(\d+)", task):
        return f"Super-resolution ×{match[1]}, unseen blur"
    return task.replace("_", " ").capitalize()


def method_title(method: str) -> str:
    """A method's name in words: mzsr-1step-assumed is "MZSR, 1 step, assumed blur"."""
    if match := re.fullmatch(r"mzsr-(\d+)step(-assumed)?", method):
        steps = f"{match[1]} step{'s' if match[1] != '1' else ''}"
        return f"MZSR, {steps}, {'assumed' if match[2] else 'true'} blur"
    return _METHODS.get(method, method)


def decibels(value: float) -> str:
    """A PSNR with the sign of infinity where two pictures are equal."""
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def _task(name: str, rows: list[dict[str, Any]]) -> Task:
    start = next((row["psnr"] for row in rows if row["method"] in INPUTS), None)
    lines = [
        Line(
            method_title(row["method"]),
            row["psnr"],
            row["ssim"],
            None if start is None or row["method"] in INPUTS else row["psnr"] - start,
        )
        for row in rows
    ]
    scale = re.fullmatch(r"(?:blind_)?sr_x(\d+)", name)
    protocol = f"Y of YCbCr, border of {scale[1]} pixels shaved" if scale else "RGB, whole picture"
    base = "bicubic" if scale else "the input"
    below = [line.method for line in lines if line.gain is not None and line.gain < 0]
    note = f"Below {base}: {', '.join(below)}." if below else ""
    return Task(name, task_title(name), protocol, int(rows[0].get("pictures", 0)), lines, note)


def _with_bars(tasks: list[Task]) -> list[Task]:
    """Bars that grow from zero to the right for a gain and to the left for a loss."""
    gains = [line.gain for task in tasks for line in task.lines if line.gain is not None and math.isfinite(line.gain)]
    low, high = min([0.0, *gains]), max([0.0, *gains])
    share = 100 / ((high - low) or 1.0)

    def with_bar(line: Line) -> Line:
        if line.gain is None or not math.isfinite(line.gain):
            return line
        return replace(line, bar=((min(line.gain, 0.0) - low) * share, abs(line.gain) * share))

    return [replace(task, lines=[with_bar(line) for line in task.lines]) for task in tasks]


def _headline(tasks: list[Task]) -> str:
    """The hardest noise, or the first task where there is no noise: input -> each method."""
    noises = {int(match[1]): task for task in tasks if (match := re.fullmatch(r"noise_(\d+)", task.name))}
    if not tasks:
        return ""
    task = noises[max(noises)] if noises else tasks[0]
    start = " ".join(f"input {decibels(line.psnr)} dB" for line in task.lines if line.gain is None)
    ends = [f"{line.method} {decibels(line.psnr)} dB" for line in task.lines if line.gain is not None]
    return f"{task.title}: {start} → {', '.join(ends)}"


def _strip(folder: Path, picture: str, methods: list[str], psnrs: dict[str, float]) -> Strip:
    cells = []
    for method in methods:
        figure = f"{decibels(psnrs[method])} dB" if method in psnrs else ""
        cells.append((figure, image_of_file(folder / f"{method}.png", f"{picture}: {method_title(method)}")))
    return Strip(picture, cells)
