"""JPEG degradation is the codec itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from datagen.degradations.jpeg import jpeg

SAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
"""Pillow's numbers for them."""
IMAGE = data.astronaut()[:101, 100:235]


def tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("subsampling", SAMPLING)
@pytest.mark.parametrize("quality", [5, 30, 75, 98])
def test_equals_another_build_of_the_codec(subsampling: str, quality: int) -> None:
    """Pillow brings its own libjpeg-turbo: bytes and pixels agree exactly."""
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", quality=quality, subsampling=SAMPLING[subsampling])
    expected = np.asarray(Image.open(file))
    result = (jpeg(tensor(IMAGE), quality, subsampling=subsampling)[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(result, expected)


def test_each_sample_has_its_own_quality() -> None:
    x = tensor(IMAGE, IMAGE, IMAGE)
    result = jpeg(x, [90, 10, 40])
    errors = ((result - x) ** 2).mean(dim=(1, 2, 3))
    assert errors[0] < errors[2] < errors[1]
    for sample, quality in zip(result, (90, 10, 40), strict=True):
        assert torch.equal(sample, jpeg(x[:1], quality)[0])


def test_chroma_survives_without_subsampling() -> None:
    x = tensor(IMAGE)
    full, half = (((jpeg(x, 90, subsampling=s) - x) ** 2).mean() for s in ("4:4:4", "4:2:0"))
    assert full < half


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"quality = 0: outside the allowed \[1, 100\] \(IJG quality factor\)"):
        jpeg(tensor(IMAGE), 0)
    with pytest.raises(ValueError, match=r"quality = 50\.5: expected a whole number"):
        jpeg(tensor(IMAGE), 50.5)
    with pytest.raises(ValueError, match="subsampling = '4:1:1': expected one of"):
        jpeg(tensor(IMAGE), 50, subsampling="4:1:1")
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\)"):
        jpeg(torch.rand(1, 1, 16, 16), 50)
