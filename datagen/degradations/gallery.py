"""Every degradation over its parameter range, and samples of the recipes, on one page to be looked at."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from torch import Tensor

from datagen.degradations.checks import Parameter, check_images
from datagen.degradations.execute import degrade, replay
from datagen.degradations.recipe import Recipe
from datagen.degradations.steps import STEPS
from infra.files import publish_atomically, write_atomically
from infra.templates import templates

SERIES: dict[str, tuple[dict[str, Any], str, Sequence[Any]]] = {
    "gaussian_noise": ({"seed": 1}, "sigma", (5.0, 15.0, 25.0, 50.0, 75.0)),
    "poisson_gaussian_noise": ({"seed": 1, "read": 3.0}, "shot", (5.0, 15.0, 25.0, 40.0, 60.0)),
    "speckle_noise": ({"seed": 1}, "sigma", (10.0, 25.0, 50.0, 75.0, 100.0)),
    "jpeg": ({}, "quality", (80, 40, 20, 10, 5)),
    "gaussian_blur": ({"sigma2": 0.6, "theta": 0.8}, "sigma1", (0.6, 1.2, 2.0, 3.0, 4.0)),
    "gaussian_blur (plateau)": ({"shape": "plateau", "beta": 2.0, "size": 25}, "sigma1", (0.6, 1.2, 2.0, 3.0, 4.0)),
    "defocus_blur": ({"size": 21}, "radius", (1.0, 2.0, 4.0, 6.0, 9.0)),
    "motion_blur": ({"seed": 3, "angle": 30.0, "wander": 1.5, "size": 41}, "length", (4.0, 8.0, 15.0, 25.0, 36.0)),
    "sinc_blur": ({}, "cutoff", (2.6, 2.0, 1.5, 1.0, 0.7)),
    "low_light": ({"scale": 0.8}, "gamma", (1.5, 2.0, 3.0, 4.0, 5.0)),
    "rain": ({"seed": 5, "length": 35.0, "angle": 12.0}, "density", (0.001, 0.003, 0.006, 0.012, 0.02)),
    "rain (heavy)": (
        {"seed": 6, "density": 0.015, "length": 45.0, "angle": -20.0, "layers": 4},
        "veil",
        (0.0, 0.15, 0.3, 0.45, 0.6),
    ),
    "haze": ({"seed": 7, "airlight": 0.9}, "beta", (0.4, 0.8, 1.2, 1.8, 2.5)),
    "snow": ({"seed": 8, "size": 8.0, "angle": 15.0, "drift": 4.0}, "density", (0.001, 0.002, 0.004, 0.006, 0.01)),
    "block_mask": ({"seed": 9, "block": 16}, "masked", (0.1, 0.3, 0.5, 0.7, 0.9)),
}
"""Title (the step is its first word) -> (fixed parameters, the parameter that runs, its values)."""

PAGE_TILE, SHEET_TILE = 256, 128
"""Largest side of the pictures on a HTML page and on a single sheet, pixels."""

_SCENIC = ("rain", "haze", "snow")  # shown on a picture taken outdoors, where there is one
_FACTORS = (2, 3, 4, 6, 8)
_GAP, _TITLE, _CAPTION = 4, 22, 15
_TEMPLATES = Path(__file__).resolve().parent.parent / "report" / "templates"


@dataclass(frozen=True)
class Row:
    """Pictures (3, h, w) in [0, 1], each with a caption, under a title and a note with the units."""

    title: str
    note: str
    captions: list[str]
    pictures: list[Tensor]


def write_gallery(path: str | Path, source: Tensor | None = None, recipes: Sequence[Recipe] = ()) -> int:
    """Write ``path``: a self-contained HTML page, or a picture when it ends in .png or .jpg. Returns its rows.

    ``source``: (3, H, W) in [0, 1], 64x64 or more, of which the centre is shown, shrunk where it is larger than the
    page's tiles; without it, two pictures in the public domain that come with scikit-image. ``recipes``: samples of
    each are shown below.

    Raises:
        ValueError: another suffix, or a source that is no image or too small.
    """
    path = Path(path)
    kinds = {".html": "HTML", ".htm": "HTML", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'}; one of {', '.join(kinds)}")
    rows = gallery_rows(source, recipes, tile=PAGE_TILE if kind == "HTML" else SHEET_TILE)
    if kind == "HTML":
        write_atomically(path, _page(rows).encode())
        return len(rows)
    with publish_atomically(path) as temporary:
        _sheet(rows).save(temporary, format=kind, **({"quality": 80} if kind == "JPEG" else {}))
    return len(rows)


def gallery_rows(source: Tensor | None = None, recipes: Sequence[Recipe] = (), *, tile: int = PAGE_TILE) -> list[Row]:
    """The rows: a clean picture and what becomes of it, from weak to strong; then the samples of the recipes."""
    if source is None:
        centre, scene = (_tile(_tensor(pixels), tile) for pixels in (data.astronaut(), data.rocket()))
    else:
        check_images(source[None], channels=3)
        if min(source.shape[-2:]) < 64:
            raise ValueError(f"the picture must be 64x64 or more, got {source.shape[-2]}x{source.shape[-1]}")
        centre = scene = _tile(source, tile)
    rows = [_series(title, scene if title.split()[0] in _SCENIC else centre) for title in SERIES]
    rows += [_resized(centre), _downsampled(centre), _blurred_as_mzsr(centre), _quantised(centre)]
    return rows + [_samples(centre, recipe) for recipe in recipes]


def _series(title: str, clean: Tensor) -> Row:
    fixed, parameter, values = SERIES[title]
    name = title.split()[0]
    pictures = [replay(clean, {"steps": [{"name": name, **fixed, parameter: value}]}) for value in values]
    known = STEPS[name].named()
    unit = known[parameter]
    held = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in fixed.items()
    )
    note = f"{parameter}: {unit.unit}" if isinstance(unit, Parameter) else parameter
    captions = ["clean", *(f"{parameter} {value:g}" for value in values)]
    return Row(title, "; ".join([note, held] if held else [note]), captions, [clean, *pictures])


def _resized(clean: Tensor) -> Row:
    height, width = clean.shape[-2:]
    pictures = []
    for factor in _FACTORS:
        small = {"name": "resize", "height": max(8, height // factor), "width": max(8, width // factor)}
        pictures.append(replay(clean, {"steps": [small, {"name": "resize", "height": height, "width": width}]}))
    captions = ["clean", *(f"1/{factor} and back" for factor in _FACTORS)]
    return Row("resize, resize_to_output", "bicubic, antialiased", captions, [clean, *pictures])


def _downsampled(clean: Tensor) -> Row:
    height, width = clean.shape[-2:]
    pictures = []
    for factor in _FACTORS:
        small = replay(clean, {"steps": [{"name": "downsample_direct", "scale": factor}]})
        shown = small.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
        pictures.append(shown[:, :height, :width])
    captions = ["clean", *(f"scale {factor}" for factor in _FACTORS)]
    return Row("downsample_direct", "one pixel of scale x scale, shown enlarged", captions, [clean, *pictures])


def _blurred_as_mzsr(clean: Tensor) -> Row:
    recipe = Recipe.model_validate({"name": "mzsr", "chains": [{"steps": [{"name": "mzsr_blur", "scale": 4}]}]})
    keys = [str(draw) for draw in range(5)]
    pictures, metas = degrade(clean.expand(5, -1, -1, -1), recipe, seed=0, epoch=0, keys=keys)
    drawn = [meta["steps"][0] for meta in metas]
    captions = ["clean", *(f"sigma {step['sigma1']:.2f}, {step['sigma2']:.2f}" for step in drawn)]
    return Row("mzsr_blur", "random kernels of scale 4; sigma: pixels", captions, [clean, *pictures])


def _quantised(clean: Tensor) -> Row:
    dark = clean * 0.06
    shown = [(picture / 0.06).clamp(0, 1) for picture in (dark, replay(dark, {"steps": [{"name": "quantise"}]}))]
    return Row("quantise", "to 256 levels; a dark picture, shown 17 times brighter", ["before", "after"], shown)


def _samples(clean: Tensor, recipe: Recipe) -> Row:
    height, width = (side // recipe.scale * recipe.scale for side in clean.shape[-2:])
    clean = clean[:, :height, :width]
    # Of a recipe with several chains each is shown before one is shown twice.
    chains = [recipe.chains[draw % len(recipe.chains)] for draw in range(max(6, len(recipe.chains)))]
    pictures, captions = [], []
    for draw, chain in enumerate(chains):
        one = recipe.model_copy(update={"chains": [chain.model_copy(update={"weight": 1.0})]})
        degraded, _ = degrade(clean[None], one, seed=0, epoch=0, keys=[str(draw)])
        pictures.append(degraded[0])
        captions.append(chain.label or f"draw {draw + 1}")
    scale = f"1/{recipe.scale} of the size" if recipe.scale > 1 else ""
    return Row(f"recipe {recipe.name}", scale, captions, pictures)


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float().div(255).contiguous()


def _tile(picture: Tensor, tile: int) -> Tensor:
    """The middle of a picture as a square of ``tile`` pixels or less, shrunk where it is larger."""
    side = min(picture.shape[-2:])
    top, left = (picture.shape[-2] - side) // 2, (picture.shape[-1] - side) // 2
    square = picture[:, top : top + side, left : left + side].contiguous()
    if side <= tile:
        return square
    return replay(square, {"steps": [{"name": "resize", "height": tile, "width": tile}, {"name": "clip"}]})


def _image(picture: Tensor) -> Image.Image:
    levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(levels))


def _page(rows: Sequence[Row]) -> str:
    shown = [
        {"title": row.title, "note": row.note, "cells": list(zip(row.captions, map(_uri, row.pictures), strict=True))}
        for row in rows
    ]
    return templates(_TEMPLATES).get_template("gallery.html").render(rows=shown)


def _uri(picture: Tensor) -> str:
    buffer = io.BytesIO()
    # Full colour resolution and high quality: less would change what the page is about.
    _image(picture).save(buffer, format="JPEG", quality=93, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sheet(rows: Sequence[Row]) -> Image.Image:
    """Two columns of rows, one under the other."""
    side = max(max(picture.shape[-2:]) for row in rows for picture in row.pictures)
    cells = 6
    lines = [(row, start) for row in rows for start in range(0, len(row.pictures), cells)]
    half = -(-len(lines) // 2)
    wide, high = cells * (side + _GAP) + 3 * _GAP, side + _TITLE + _CAPTION + 2 * _GAP
    sheet = Image.new("RGB", (2 * wide, half * high), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(12)
    for number, (row, start) in enumerate(lines):
        left, top = number // half * wide + _GAP, number % half * high
        pen.text((left, top + 2), row.title, fill="black", font=bold)
        offset = pen.textlength(row.title, font=bold) + 10
        pen.text(
            (left + offset, top + 5), _fitting(pen, row.note, plain, wide - offset - 4 * _GAP), fill="#555", font=plain
        )
        for cell in range(start, min(start + cells, len(row.pictures))):
            x = left + (cell - start) * (side + _GAP)
            sheet.paste(_image(row.pictures[cell]), (x, top + _TITLE))
            pen.text((x + 1, top + _TITLE + side), row.captions[cell], fill="black", font=plain)
    return sheet


def _fitting(pen: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """As many parts of a note, which semicolons tell apart, as fit into ``width`` pixels."""
    while ";" in text and pen.textlength(text, font=font) > width:
        text = text.rpartition(";")[0]
    return text
