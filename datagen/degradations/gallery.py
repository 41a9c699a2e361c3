"""One page with every degradation over its parameter range, to be looked at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datagen.degradations.checks import check_images
from datagen.degradations.execute import degrade, replay
from datagen.degradations.recipe import Recipe
from infra.files import publish_atomically

SERIES: dict[str, tuple[dict[str, Any], str, Sequence[Any]]] = {
    "gaussian_noise": ({"seed": 1}, "sigma", (5.0, 15.0, 25.0, 50.0, 75.0)),
    "poisson_gaussian_noise": ({"seed": 1, "read": 3.0}, "shot", (5.0, 15.0, 25.0, 40.0, 60.0)),
    "speckle_noise": ({"seed": 1}, "sigma", (10.0, 25.0, 50.0, 75.0, 100.0)),
    "jpeg": ({}, "quality", (80, 40, 20, 10, 5)),
    "gaussian_blur": ({"sigma2": 0.6, "theta": 0.8}, "sigma1", (0.6, 1.2, 2.0, 3.0, 4.0)),
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
    "snow": ({"seed": 8, "size": 12.0, "angle": 15.0, "drift": 6.0}, "density", (0.001, 0.003, 0.006, 0.01, 0.02)),
    "block_mask": ({"seed": 9, "block": 16}, "masked", (0.1, 0.3, 0.5, 0.7, 0.9)),
}
"""Title (the step is its first word) -> (fixed parameters, the parameter that runs, its values)."""

CAPTION = 18


def degradation_gallery(clean: Tensor, path: str | Path) -> None:
    """Write a PNG grid: a row for each entry of ``SERIES``, the clean picture first, then from weak to strong.

    ``clean``: (3, H, W) float in [0, 1], at least 64x64.
    """
    check_images(clean[None], channels=3)
    rows = []
    for title, (fixed, parameter, values) in SERIES.items():
        step = {"name": title.split()[0], **fixed}
        metas = [{"steps": [step | {parameter: value}]} for value in values]
        pictures = torch.stack([clean, *(replay(clean, meta) for meta in metas)])
        rows.append((pictures, [title, *(f"{parameter} {value:g}" for value in values)]))
    _write_grid(rows, path)


def recipe_gallery(clean: Tensor, recipe: Recipe, path: str | Path, *, seed: int = 0, rows: int = 4) -> None:
    """Write a PNG grid of ``rows`` x 6 draws from a recipe, each under the label of its chain; ``clean`` as above."""
    grid = []
    for row in range(rows):
        keys = [f"{row}-{column}" for column in range(6)]
        pictures, metas = degrade(clean.expand(6, -1, -1, -1), recipe, seed=seed, epoch=0, keys=keys)
        grid.append((pictures, [meta["chain"] or recipe.name for meta in metas]))
    _write_grid(grid, path)


def _write_grid(rows: Sequence[tuple[Tensor, Sequence[str]]], path: str | Path) -> None:
    height, width = rows[0][0].shape[-2:]
    columns = max(len(captions) for _, captions in rows)
    page = Image.new("RGB", (columns * (width + 4), len(rows) * (height + CAPTION + 4)), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    for row, (pictures, captions) in enumerate(rows):
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            left, top = column * (width + 4), row * (height + CAPTION + 4)
            levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            pen.text((left + 2, top + 1), caption, fill="black", font=font)
            page.paste(Image.fromarray(np.ascontiguousarray(levels)), (left, top + CAPTION))
    with publish_atomically(path) as temporary:
        page.save(temporary, format="PNG")
