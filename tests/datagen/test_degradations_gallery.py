"""The gallery shows every step from weak to strong and the draws of recipes, on a page that needs nothing else."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from datagen.degradations import load_recipe
from datagen.degradations.checks import Parameter
from datagen.degradations.gallery import SERIES, SHEET_TILE, gallery_rows, write_gallery
from datagen.degradations.steps import STEPS

CLEAN = torch.from_numpy(data.astronaut()[:128, 150:278].copy()).permute(2, 0, 1).float() / 255


def test_every_step_has_a_row_that_names_its_unit() -> None:
    rows = gallery_rows(CLEAN)
    shown = " ".join(row.title for row in rows).replace(",", " ").split()
    assert set(STEPS) <= set(shown)
    for row, (title, (_, parameter, _)) in zip(rows, SERIES.items(), strict=False):
        declared = STEPS[title.split()[0]].named()[parameter]
        assert isinstance(declared, Parameter) and declared.unit in row.note


@pytest.mark.parametrize("row", gallery_rows(CLEAN)[: len(SERIES)], ids=lambda row: row.title)
def test_a_row_runs_from_weak_to_strong(row) -> None:  # type: ignore[no-untyped-def]
    changes = [float((picture - CLEAN).abs().mean()) for picture in row.pictures[1:]]
    assert torch.equal(row.pictures[0], CLEAN)
    assert len(row.captions) == len(row.pictures) == 6
    assert all(weak < strong * 1.02 for weak, strong in pairwise(changes)), changes
    assert changes[-1] > 1.5 * changes[0] > 0, changes


def test_a_recipe_shows_each_of_its_chains() -> None:
    recipe = load_recipe("composite_weather")
    row = gallery_rows(CLEAN, [recipe])[-1]
    assert {chain.label for chain in recipe.chains} == set(row.captions)
    assert len({picture.numpy().tobytes() for picture in row.pictures}) == len(row.pictures)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    rows = write_gallery(tmp_path / "gallery.html", CLEAN, [load_recipe("dynet_pretrain")])
    page = (tmp_path / "gallery.html").read_text()
    assert page.count("<section>") == rows == len(gallery_rows(CLEAN)) + 1
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 6 * len(SERIES) and all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_a_sheet_shows_the_clean_pictures_at_their_size(tmp_path: Path) -> None:
    write_gallery(tmp_path / "gallery.png")
    sheet = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"))
    first = gallery_rows(tile=SHEET_TILE)[0].pictures[0]
    wanted = (first * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (sheet[22 : 22 + SHEET_TILE, 4 : 4 + SHEET_TILE] == wanted).all()
    assert sheet.shape[1] > 12 * SHEET_TILE and sheet.shape[0] > len(SERIES) // 2 * SHEET_TILE


def test_other_suffixes_and_small_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gallery.bmp: cannot write .bmp; one of .html, .htm, .png, .jpg, .jpeg"):
        write_gallery(tmp_path / "gallery.bmp", CLEAN)
    with pytest.raises(ValueError, match="64x64 or more, got 128x32"):
        write_gallery(tmp_path / "gallery.png", CLEAN[:, :, :32])
    assert not list(tmp_path.iterdir())
