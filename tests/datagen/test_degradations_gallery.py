"""The gallery shows every step and every draw asked for."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

from datagen.degradations import load_recipe
from datagen.degradations.gallery import CAPTION, SERIES, degradation_gallery, recipe_gallery
from datagen.degradations.steps import STEPS

CLEAN = torch.from_numpy(data.astronaut()[:64, 150:214].copy()).permute(2, 0, 1).float() / 255


def test_the_page_has_a_row_for_every_degradation(tmp_path: Path) -> None:
    shown = {title.split()[0] for title in SERIES}
    plumbing = {"quantise", "resize", "resize_to_output", "downsample_direct", "mzsr_blur"}
    assert shown | plumbing == set(STEPS)
    degradation_gallery(CLEAN, tmp_path / "gallery.png")
    page = np.asarray(Image.open(tmp_path / "gallery.png"))
    assert page.shape == (len(SERIES) * (64 + CAPTION + 4), 6 * 68, 3)
    for row, title in enumerate(SERIES):
        top = row * (64 + CAPTION + 4) + CAPTION
        cells = [page[top : top + 64, 68 * column : 68 * column + 64].astype(int) for column in range(6)]
        changes = [np.abs(cell - cells[0]).mean() for cell in cells[1:]]
        assert changes[-1] > changes[0] > 0, f"{title} does not run from weak to strong: {changes}"


def test_a_recipe_page_shows_its_draws(tmp_path: Path) -> None:
    recipe_gallery(CLEAN, load_recipe("dynet_pretrain"), tmp_path / "recipe.png", rows=2)
    page = np.asarray(Image.open(tmp_path / "recipe.png"))
    assert page.shape == (2 * (64 + CAPTION + 4), 6 * 68, 3)
    assert not np.array_equal(page[CAPTION : CAPTION + 64, :64], page[CAPTION : CAPTION + 64, 68:132])
