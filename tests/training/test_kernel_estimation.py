"""The blur of a picture, found from the picture."""

import numpy as np
import pytest
import torch
from skimage import data

from datagen.degradations.kernels import gaussian_kernel
from training.adaptation import shrink_blurred
from training.benchmark import to_batch
from training.kernel_estimation import estimate_kernel, most_consistent


def covariance(kernel: torch.Tensor) -> np.ndarray:
    """Of (x, y), px^2."""
    offsets = torch.arange(kernel.shape[-1], dtype=kernel.dtype) - kernel.shape[-1] // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    return np.array([float((kernel * a * b).sum()) for a, b in ((x, x), (x, y), (y, y))])


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return to_batch(data.astronaut()[:384, :384])


@pytest.mark.parametrize("blur", [(0.8, 0.8, 0.0), (2.0, 2.0, 0.0), (4.0, 1.0, -0.5)], ids=str)
def test_known_blurs_are_found(photograph: torch.Tensor, blur: tuple[float, float, float]) -> None:
    kernel = gaussian_kernel(15, *blur)
    low = (shrink_blurred(photograph, kernel.float(), 2) * 255).round() / 255
    found = estimate_kernel(low, 2)
    assert float(found.sum()) == pytest.approx(1)
    # The round blur of 2 px^2, which is assumed when nothing is known, is off by 1.3 from the first and last.
    assert np.abs(covariance(found) - covariance(kernel)).max() < 0.9
    assert torch.equal(found, estimate_kernel(low, 2))
    # With a turned picture the blur turns.
    turned = covariance(estimate_kernel(low.transpose(-1, -2), 2))
    assert turned[::-1] == pytest.approx(covariance(found), abs=0.25)


def test_another_scale_has_the_blur_of_the_same_camera(photograph: torch.Tensor) -> None:
    low = shrink_blurred(photograph, gaussian_kernel(15, 1.0, 1.0).float(), 2)
    by_two, by_four = (covariance(estimate_kernel(low, scale, 31)) for scale in (2, 4))
    assert by_four[[0, 2]] == pytest.approx(5 * by_two[[0, 2]], rel=0.1)


@pytest.mark.parametrize("true", [0, 1, 2])
def test_the_most_consistent_of_a_list(photograph: torch.Tensor, true: int) -> None:
    kernels = [gaussian_kernel(15, v, w, 0.5).float() for v, w in ((0.4, 0.4), (2.0, 2.0), (5.0, 3.0))]
    assert most_consistent(shrink_blurred(photograph, kernels[true], 2), kernels, 2) == true


def test_pictures_without_edges_are_no_reason_to_fail() -> None:
    for picture in (torch.full((1, 3, 40, 40), 0.5), torch.rand(1, 3, 30, 34)):
        kernel = estimate_kernel(picture, 2)
        assert torch.isfinite(kernel).all() and float(kernel.sum()) == pytest.approx(1)
