"""PSNR and SSIM against values worked out by hand and against published bicubic rows."""

from pathlib import Path

import numpy as np
import pytest

from datagen.degradations.resample import imresize
from datagen.picture.region import decode_whole
from training.evaluate import mean_rows, to_batch, to_picture
from training.metrics import compare, luma, to_uint8


def test_psnr_by_hand() -> None:
    a = np.zeros((16, 16, 3), np.uint8)
    assert compare(a + 5, a)["psnr"] == pytest.approx(10 * np.log10(255**2 / 25))
    assert compare(a, a) == {"psnr": float("inf"), "ssim": pytest.approx(1.0)}


def test_luma_is_matlabs() -> None:
    picture = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0]]], np.uint8)
    assert luma(picture)[0] == pytest.approx([235, 16, 81.481])


def test_shave_leaves_the_border_out() -> None:
    a = np.full((20, 20, 3), 100, np.uint8)
    b = a.copy()
    b[:2], b[:, -2:] = 0, 255
    assert compare(b, a, shave=2)["psnr"] == float("inf") and compare(b, a)["psnr"] < 20


def test_rounding_clips() -> None:
    assert to_uint8(np.array([-0.1, 0.5 / 255, 1.5 / 255, 2.0])).tolist() == [0, 0, 2, 255]


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


@pytest.mark.parametrize(("scale", "psnr", "ssim"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_published_bicubic_rows_on_set5(real_data: Path, scale: int, psnr: float, ssim: float) -> None:
    """EDSR's Table 3: Y channel, border of ``scale`` shaved, 8-bit LR and output."""
    results = []
    for path in sorted((real_data / "benchmarks" / "set5").glob("*.png")):
        picture = decode_whole(path.read_bytes())
        height, width = (side - side % scale for side in picture.shape[:2])
        clean = picture[:height, :width]
        low = imresize(to_batch(clean), 1 / scale, round_to_uint8=True)
        restored = to_picture(imresize(low, scale, round_to_uint8=True))
        results.append(compare(restored, clean, shave=scale, y_only=True))
    assert np.mean([r["psnr"] for r in results]) == pytest.approx(psnr, abs=0.02)
    assert np.mean([r["ssim"] for r in results]) == pytest.approx(ssim, abs=0.001)
