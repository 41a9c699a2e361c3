"""PSNR and SSIM against values worked out by hand; ``test_benchmark.py`` has the published rows."""

import numpy as np
import pytest
import torch

from training.benchmark import to_picture
from training.evaluate import mean_rows
from training.metrics import compare, luma


def test_psnr_by_hand() -> None:
    a = np.zeros((16, 16, 3), np.uint8)
    assert compare(a + 5, a)["psnr"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert compare(a, a) == {"psnr": float("inf"), "ssim": pytest.approx(1.0)}


def test_luma_is_matlabs() -> None:
    picture = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0]]], np.uint8)
    assert luma(picture)[0] == pytest.approx([235, 16, 81.481])


def test_luma_is_rounded_unless_told_otherwise() -> None:
    clean = np.full((16, 16, 3), 100, np.uint8)
    bluer = clean + np.array([0, 0, 1], np.uint8)  # 0.098 levels of luma: 101.88 and 101.98, both 102 when rounded
    assert compare(bluer, clean, y_only=True)["psnr"] == float("inf")
    assert compare(bluer, clean, y_only=True, round_y=False)["psnr"] == pytest.approx(68.3, abs=0.1)


def test_shave_leaves_the_border_out() -> None:
    a = np.full((20, 20, 3), 100, np.uint8)
    b = a.copy()
    b[:2], b[:, -2:] = 0, 255
    assert compare(b, a, shave=2)["psnr"] == float("inf") and compare(b, a)["psnr"] < 20


def test_rounding_clips_and_takes_halves_upwards() -> None:
    levels = torch.tensor([-25.5, 0.4, 0.5, 1.5, 510]) / 255
    assert to_picture(levels.double().expand(1, 3, 1, 5))[0, :, 0].tolist() == [0, 0, 1, 2, 255]


def test_other_sizes_and_types_are_refused() -> None:
    a = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="one size"):
        compare(a[:8], a)
    with pytest.raises(ValueError, match="uint8"):
        compare(a.astype(np.float32), a)


def test_means_are_grouped_by_task_and_method() -> None:
    rows = [
        {"task": "t", "method": m, "picture": p, "psnr": v, "ssim": v} for m, p, v in [("a", "x", 1.0), ("a", "y", 3.0)]
    ]
    assert mean_rows(rows) == [{"task": "t", "method": "a", "pictures": 2, "psnr": 2.0, "ssim": 2.0}]
