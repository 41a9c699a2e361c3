"""The page of ``ird evaluate``: means, every picture, and the places where the model did best and worst."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.files import write_atomically
from infra.templates import templates
from pipeline.report.images import Image, image_of_pixels
from training.metrics import Protocol

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_SIDE = 64  # of a crop, pixels
_STEP = 16
_SHOWN = 4  # best and worst places, each of another picture where there are so many
_ENLARGE = 3


@dataclass(frozen=True)
class Crop:
    """A place of a picture: what went in (enlarged), what came out, what it should be, and by how much it is off."""

    task: str
    picture: str
    top: int
    left: int
    before: np.ndarray
    restored: np.ndarray
    clean: np.ndarray
    error: float  # mean squared, levels
    gain: float  # by how many dB the error is less than that of what went in


@dataclass(frozen=True)
class _Shown:
    title: str
    images: tuple[tuple[str, Image], ...]


def crops_of(task: str, name: str, before: np.ndarray, restored: np.ndarray, clean: np.ndarray) -> list[Crop]:
    """The place of a picture (uint8 [H,W,3] each) with the largest error, and the one with the largest gain."""
    target = clean.astype(np.float32)
    errors = [((picture.astype(np.float32) - target) ** 2).mean(axis=2) for picture in (before, restored)]
    height, width = (min(side, _SIDE) for side in clean.shape[:2])
    sums = [np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for error in errors]
    tops = np.arange(0, clean.shape[0] - height + 1, _STEP)
    lefts = np.arange(0, clean.shape[1] - width + 1, _STEP)
    rows, columns = np.ix_(tops, lefts)
    given, made = (
        (s[rows + height, columns + width] - s[rows, columns + width] - s[rows + height, columns] + s[rows, columns])
        / (height * width)
        for s in sums
    )
    gains = 10 * np.log10((given + 0.1) / (made + 0.1))
    # A gain on hardly anything is no news: only places that had something to restore.
    worth = np.where(given >= np.median(given), gains, -np.inf)
    found = []
    for measure in (made, worth):
        i, j = np.unravel_index(int(np.argmax(measure)), measure.shape)
        top, left = int(tops[i]), int(lefts[j])
        part = (slice(top, top + height), slice(left, left + width))
        given_here, made_here, clean_here = (
            np.ascontiguousarray(picture[part]) for picture in (before, restored, clean)
        )
        error, gain = float(made[i, j]), float(gains[i, j])
        found.append(Crop(task, name, top, left, given_here, made_here, clean_here, error, gain))
    return found


def write_page(
    path: Path, rows: list[dict[str, Any]], summary: dict[str, Any], crops: Sequence[Crop], protocol: Protocol
) -> None:
    """Write the page; it asks for nothing but itself."""
    template = templates(_TEMPLATES).get_template("evaluation.html")
    page = template.render(
        style=(_TEMPLATES / "report.css").read_text(),
        rows=rows,
        summary=summary,
        about=protocol.about,
        before="bicubic" if summary["scale"] > 1 else "input",
        more=[name for name in ("niqe", "lpips") if name in rows[0]],
        worst=_first_of_each(sorted(crops[0::2], key=lambda crop: -crop.error), summary),
        best=_first_of_each(sorted(crops[1::2], key=lambda crop: -crop.gain), summary),
    )
    write_atomically(path, page.encode())


def _first_of_each(crops: Sequence[Crop], summary: dict[str, Any]) -> list[_Shown]:
    """The first crops, no two of one picture and task, as the page shows them."""
    shown: dict[tuple[str, str], _Shown] = {}
    names = ("bicubic" if summary["scale"] > 1 else "input", "restored", "clean")
    for crop in crops:
        key = (crop.task, crop.picture)
        if key in shown or len(shown) == _SHOWN:
            continue
        psnr = 10 * np.log10(255**2 / max(crop.error, 1e-4))
        title = f"{crop.task} {crop.picture} at ({crop.left}, {crop.top}): {psnr:.1f} dB here, {crop.gain:+.1f} dB"
        pictures = zip(names, (crop.before, crop.restored, crop.clean))
        images = ((name, image_of_pixels(pixels, f"{title}, {name}", enlarge=_ENLARGE)) for name, pixels in pictures)
        shown[key] = _Shown(title, tuple(images))
    return list(shown.values())
