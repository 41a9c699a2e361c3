"""JPEG degradation is the codec itself, and its arithmetic in torch is the codec's to the last bit."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from datagen.degradations.jpeg import jpeg, jpeg_dct

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


QUALITIES = [1, 2, 5, 10, 20, 30, 40, 49, 50, 60, 75, 85, 90, 95, 98, 100]


@pytest.mark.parametrize("subsampling", SAMPLING)
@pytest.mark.parametrize("size", [(96, 96), (101, 135), (35, 50), (33, 17), (9, 3), (17, 5), (1, 1), (2, 40)])
def test_arithmetic_equals_the_codec_to_the_last_bit(size: tuple[int, int], subsampling: str) -> None:
    for picture in (data.astronaut(), data.coffee(), data.chelsea()):
        one = tensor(picture[60 : 60 + size[0], 120 : 120 + size[1]])
        batch = one.expand(len(QUALITIES), -1, -1, -1)
        assert torch.equal(
            jpeg_dct(batch, QUALITIES, subsampling=subsampling), jpeg(batch, QUALITIES, subsampling=subsampling)
        )


@pytest.mark.parametrize("subsampling", SAMPLING)
def test_arithmetic_equals_the_codec_on_noise_and_hard_edges(subsampling: str) -> None:
    """What no photograph has: colours out of gamut after decoding, and blocks that swing over the whole range."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(len(QUALITIES), 3, 40, 56, generator=rng)
    for batch in (noise, (noise > 0.5).float()):
        assert torch.equal(
            jpeg_dct(batch, QUALITIES, subsampling=subsampling), jpeg(batch, QUALITIES, subsampling=subsampling)
        )


@pytest.mark.parametrize("subsampling", SAMPLING)
def test_arithmetic_equals_the_codec_on_benchmark_photographs(real_data: Path, subsampling: str) -> None:
    pictures = sorted(path for path in real_data.rglob("*") if path.suffix in (".png", ".jpg"))
    assert pictures, f"no pictures below {real_data}"
    for number, path in enumerate(pictures[:: -(-len(pictures) // 10)]):
        one = tensor(np.asarray(Image.open(path).convert("RGB"))[:200, :300])
        quality = [5, 30, 60 + number, 95]
        batch = one.expand(4, -1, -1, -1)
        exact = jpeg(batch, quality, subsampling=subsampling)
        assert torch.equal(jpeg_dct(batch, quality, subsampling=subsampling), exact), path.name


def test_gradient_of_a_fine_quality_is_almost_that_of_the_identity() -> None:
    x = (0.2 + 0.6 * tensor(IMAGE[:64, :64])).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    weights = weights.mean(dim=1, keepdim=True).expand_as(x)  # without colour, which 4:2:0 takes away
    (jpeg_dct(x, 95) * weights).sum().backward()
    assert x.grad is not None
    luma = (x.grad.sum(dim=1) - weights.sum(dim=1)).abs().max() / weights.abs().max()
    assert float(luma) < 0.02


def test_mixed_precision_and_memory_format_change_nothing() -> None:
    x = tensor(IMAGE)  # channels last
    for compress in (jpeg, jpeg_dct):
        assert torch.equal(compress(x, 40), compress(x.contiguous(), 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jpeg_dct(x, 40), jpeg(x, 40))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no gpu with cuda")
@pytest.mark.parametrize("subsampling", SAMPLING)
def test_a_gpu_gives_what_the_codec_gives(subsampling: str) -> None:
    batch = tensor(IMAGE).expand(len(QUALITIES), -1, -1, -1)
    on_gpu = jpeg(batch.cuda(), QUALITIES, subsampling=subsampling)
    assert on_gpu.is_cuda
    assert float((on_gpu.cpu() - jpeg(batch, QUALITIES, subsampling=subsampling)).abs().max()) < 1e-6
