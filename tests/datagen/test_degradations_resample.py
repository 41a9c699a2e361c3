"""MATLAB-compatible resizing, blur and direct sub-sampling, against independent code and published tables."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage import data

from datagen.degradations.kernels import EVALUATION_KERNELS, gaussian_kernel
from datagen.degradations.resample import blur, downsample_direct, imresize


def keys_cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    if x < 2:
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return 0.0


def dense_matrix(length_in: int, length_out: int, scale: float, antialias: bool = True) -> np.ndarray:
    """The resize of one axis as a matrix, from the definition: centre-aligned, mirrored, weights normalised."""
    matrix = np.zeros((length_out, length_in))
    stretch = min(scale, 1.0) if antialias else 1.0
    for row in range(length_out):
        centre = (row + 0.5) / scale - 0.5
        reach = math.ceil(2 / stretch) + 2
        for position in range(math.floor(centre) - reach, math.ceil(centre) + reach + 1):
            source = position
            while not 0 <= source < length_in:
                source = -1 - source if source < 0 else 2 * length_in - 1 - source
            matrix[row, source] += keys_cubic(stretch * (centre - position))
        matrix[row] /= matrix[row].sum()
    return matrix


@pytest.mark.parametrize("scale", [1 / 2, 1 / 3, 1 / 4, 0.37, 1.0, 1.7, 2, 3, 4])
@pytest.mark.parametrize("antialias", [True, False])
def test_imresize_equals_the_definition_in_dense_matrices(scale: float, antialias: bool) -> None:
    x = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    height, width = math.ceil(37 * scale), math.ceil(50 * scale)
    down = dense_matrix(37, height, scale, antialias)
    across = dense_matrix(50, width, scale, antialias)
    expected = np.einsum("yh,nchw,xw->ncyx", down, x.double().numpy(), across)
    result = imresize(x, scale, antialias=antialias)
    assert result.shape == (2, 3, height, width) and result.dtype == torch.float32
    assert np.abs(result.numpy() - expected).max() < 1e-5


def test_imresize_to_a_size_uses_a_scale_for_each_axis() -> None:
    x = torch.rand(1, 1, 40, 30)
    expected = np.einsum(
        "yh,nchw,xw->ncyx", dense_matrix(40, 25, 25 / 40), x.double().numpy(), dense_matrix(30, 47, 47 / 30)
    )
    assert np.abs(imresize(x, size=(25, 47)).numpy() - expected).max() < 1e-5


def test_rounding_to_uint8_happens_after_each_pass_rows_first() -> None:
    image = data.astronaut()[:64, 100:180, 0].astype(np.float64)
    rows = np.floor(np.clip(dense_matrix(64, 32, 0.5) @ image, 0, 255) + 0.5)
    expected = np.floor(np.clip(rows @ dense_matrix(80, 40, 0.5).T, 0, 255) + 0.5)
    x = torch.from_numpy(image / 255).float()[None, None]
    twice = (imresize(x, 0.5, round_to_uint8=True)[0, 0] * 255).round().numpy()
    once = (imresize(x, 0.5).clamp(0, 1)[0, 0] * 255).round().numpy()
    assert np.array_equal(twice, expected)
    assert not np.array_equal(once, expected), "the option would have no effect"


def test_other_filters_average_what_they_cover() -> None:
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    means = x.reshape(1, 1, 4, 4, 4, 4).mean(dim=(3, 5))
    assert torch.allclose(imresize(x, 0.25, filter="box"), means, atol=1e-12)
    assert torch.allclose(imresize(torch.full((1, 1, 9, 9), 0.3), 1.9, filter="linear"), torch.tensor(0.3), atol=1e-6)


def test_imresize_refuses_what_it_cannot_do() -> None:
    x = torch.rand(1, 1, 8, 8)
    for arguments in ({}, {"scale": 2, "size": (4, 4)}):
        with pytest.raises(ValueError, match="either scale or size"):
            imresize(x, **arguments)
    with pytest.raises(ValueError, match=r"scale = 0: outside the allowed \[0.015625, 64\]"):
        imresize(x, 0.0)
    with pytest.raises(ValueError, match="'nearest': expected one of 'cubic', 'linear', 'box'"):
        imresize(x, 2, filter="nearest")


def test_blur_correlates_with_symmetric_edges() -> None:
    x = torch.rand(2, 3, 31, 40)
    kernels = torch.stack([gaussian_kernel(15, 4.0, 1.0, -0.5), torch.rand(15, 15).double() / 100])
    result = blur(x, kernels)
    for sample, kernel, blurred in zip(x, kernels, result, strict=True):
        for plane, output in zip(sample, blurred, strict=True):
            expected = ndimage.correlate(plane.double().numpy(), kernel.numpy(), mode="reflect")
            assert np.abs(output.numpy() - expected).max() < 1e-6
    assert torch.equal(blur(x[1:], kernels[1:])[0], result[1])


def test_a_kernel_may_be_larger_than_the_image() -> None:
    """Random resizes make pictures of a few pixels; mirroring goes on as often as it must."""
    x = torch.rand(1, 1, 8, 11, dtype=torch.float64)
    kernel = gaussian_kernel(45, 90.0, 40.0, 0.4)
    expected = ndimage.correlate(x[0, 0].numpy(), kernel.numpy(), mode="reflect")
    assert np.abs(blur(x, kernel)[0, 0].numpy() - expected).max() < 1e-12


def test_blur_is_differentiable_and_refuses_impossible_kernels() -> None:
    x = torch.rand(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: blur(image, gaussian_kernel(5, 1.0, 1.0)), (x,))
    with pytest.raises(ValueError, match="k odd"):
        blur(x, torch.ones(4, 4))
    with pytest.raises(ValueError, match="2 kernels for a batch of 1"):
        blur(x, torch.ones(2, 3, 3))


def test_direct_downsampling_keeps_the_top_left_pixel_of_each_cell() -> None:
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert downsample_direct(x, 3).flatten().tolist() == [0, 3, 18, 21]
    with pytest.raises(ValueError, match=r"outside the allowed \[1, 16\]"):
        downsample_direct(x, 0)


def set5() -> list[torch.Tensor]:
    root = os.environ.get("IRD_REAL_DATA")
    if not root:
        pytest.skip("IRD_REAL_DATA is not set: the Set5 pictures (benchmarks/set5) are not at hand")
    files = sorted((Path(root) / "benchmarks" / "set5").glob("*.png"))
    assert len(files) == 5
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return [torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in images]


def luma(x: torch.Tensor) -> np.ndarray:
    red, green, blue = (x.double() * 255).round()[0].numpy() / 255
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def psnr(a: np.ndarray, b: np.ndarray, shave: int) -> float:
    difference = (a - b)[shave:-shave, shave:-shave]
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_rows_of_set5_are_the_published_ones(scale: int, published: float) -> None:
    """Bicubic column of the EDSR paper's Table 3: PSNR on Y, border of ``scale`` px shaved, 8-bit pictures."""
    values = []
    for image in set5():
        height, width = (size // scale * scale for size in image.shape[-2:])
        truth = image[..., :height, :width]
        small = imresize(truth, 1 / scale, round_to_uint8=True)
        values.append(psnr(luma(imresize(small, scale, round_to_uint8=True)), luma(truth), scale))
    assert round(float(np.mean(values)), 2) == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize(
    ("kernel", "direct", "scale", "published"),
    [
        ("g_0.2", True, 2, 30.24),
        ("g_2.0", True, 2, 28.73),
        ("g_ani", True, 2, 28.15),
        ("g_1.3", False, 2, 30.54),
        ("g_2.0", True, 4, 24.74),
    ],
)
def test_bicubic_rows_of_set5_under_the_mzsr_kernels(kernel: str, direct: bool, scale: int, published: float) -> None:
    """Bicubic column of the MZSR paper's Tables 2 and 3, Y rounded to 8 bits as in its evaluation."""
    values = []
    for truth in set5():
        blurred = blur(truth.double(), EVALUATION_KERNELS[kernel])
        small = downsample_direct(blurred, scale) if direct else imresize(blurred, 1 / scale)
        small = (small.clamp(0, 1) * 255).round() / 255
        large = imresize(small, scale, round_to_uint8=True)
        values.append(psnr(luma(large).round(), luma(truth).round(), scale))
    assert round(float(np.mean(values)), 2) == pytest.approx(published, abs=0.011)
