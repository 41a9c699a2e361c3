"""Blur kernels: they sum to 1 and have the spread, direction and range that their parameters say."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from datagen.degradations.blur import defocus_blur, gaussian_blur, motion_blur, sinc_blur
from datagen.degradations.kernels import (
    EVALUATION_KERNELS,
    disk_kernel,
    gaussian_kernel,
    motion_kernel,
    mzsr_kernel,
    mzsr_variances,
    sinc_kernel,
)


def moments(kernel: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (x, y) and covariance of a kernel, in px and px^2, from its centre."""
    size = kernel.shape[-1]
    offsets = np.arange(size) - size // 2
    weights = kernel.double().numpy()
    x, y = np.meshgrid(offsets, offsets)
    mean = np.array([(weights * x).sum(), (weights * y).sum()])
    points = np.stack([x - mean[0], y - mean[1]]).reshape(2, -1)
    return mean, (points * weights.ravel()) @ points.T


@pytest.mark.parametrize(
    ("var1", "var2", "theta"), [(2.0, 2.0, 0.0), (4.0, 1.0, -0.5), (9.0, 1.5, 1.1), (1.0, 5.0, 2.5)]
)
def test_gaussian_kernel_has_the_stated_covariance(var1: float, var2: float, theta: float) -> None:
    kernel = gaussian_kernel(41, var1, var2, theta)
    rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    mean, covariance = moments(kernel)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-12)
    assert np.abs(mean).max() < 1e-12
    assert np.allclose(covariance, rotation @ np.diag([var1, var2]) @ rotation.T, atol=1e-4)


def test_a_batch_of_kernels_equals_its_members() -> None:
    batch = gaussian_kernel(15, [1.0, 4.0], [1.0, 2.0], [0.0, 0.7], shape="plateau", beta=[1.0, 1.5])
    assert batch.shape == (2, 15, 15)
    assert torch.equal(batch[1], gaussian_kernel(15, 4.0, 2.0, 0.7, shape="plateau", beta=1.5))


def test_shapes_differ_as_they_should() -> None:
    gaussian = gaussian_kernel(21, 4, 4)
    assert torch.allclose(gaussian_kernel(21, 4, 4, shape="generalised", beta=1.0), gaussian)
    flat = gaussian_kernel(21, 4, 4, shape="generalised", beta=4.0)
    heavy = gaussian_kernel(21, 4, 4, shape="plateau", beta=1.0)
    assert flat[10, 11] / flat[10, 10] > gaussian[10, 11] / gaussian[10, 10], "a large beta flattens the top"
    assert heavy[0, 0] > gaussian[0, 0] > flat[0, 0], "a plateau kernel has heavy tails"


def test_mzsr_draws_stay_in_the_published_ranges_and_fill_them() -> None:
    rng = np.random.default_rng(0)
    draws = np.array([mzsr_variances(rng, 2.0) for _ in range(4000)])
    var1, var2, theta = draws.T
    assert var1.min() >= 1 and var1.max() <= 5 and var1.mean() == pytest.approx(3, abs=0.06)
    assert (var2 >= 1).all() and (var2 <= var1).all() and var2.mean() == pytest.approx(2, abs=0.05)
    assert theta.min() >= 0 and theta.max() <= math.pi and theta.mean() == pytest.approx(math.pi / 2, abs=0.05)


def test_mzsr_kernel_is_the_gaussian_of_its_draw() -> None:
    kernel = mzsr_kernel(np.random.default_rng(3), 4.0)
    assert kernel.shape == (15, 15)
    assert torch.equal(kernel, gaussian_kernel(15, *mzsr_variances(np.random.default_rng(3), 4.0)))


def test_the_evaluation_kernels_are_named_for_variances() -> None:
    _, covariance = moments(EVALUATION_KERNELS["g_2.0"])
    assert EVALUATION_KERNELS["g_2.0"].shape == (21, 21)
    assert np.allclose(covariance, 2 * np.eye(2), atol=1e-6)


@pytest.mark.parametrize("radius", [1.7, 4.0, 10.0])
def test_disk_has_the_moment_of_a_disk(radius: float) -> None:
    kernel = disk_kernel(21, radius)
    mean, covariance = moments(kernel)
    assert float(kernel.sum()) == pytest.approx(1) and np.abs(mean).max() < 1e-9
    # r^2 / 4 an axis for the disk itself, and up to 1/12 from the pixels that collect it.
    assert -0.01 * radius**2 <= covariance[0, 0] - radius**2 / 4 <= 1 / 12 + 0.01 * radius**2


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 200.0])
def test_straight_motion_is_a_line_in_its_direction(angle: float) -> None:
    kernel = motion_kernel(31, 20.0, angle)
    mean, covariance = moments(kernel)
    direction = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    across = np.array([-direction[1], direction[0]])
    assert float(kernel.sum()) == pytest.approx(1) and np.abs(mean).max() < 1e-9
    assert direction @ covariance @ direction == pytest.approx(20**2 / 12, rel=0.03)
    assert across @ covariance @ across < 0.3


@pytest.mark.parametrize("seed", range(20))
def test_wandering_motion_is_centred_and_stays_inside(seed: int) -> None:
    kernel = motion_kernel(43, 40.0, 10.0, wander=4.0, seed=seed)
    mean, _ = moments(kernel)
    assert float(kernel.sum()) == pytest.approx(1) and np.abs(mean).max() < 1e-9
    assert torch.equal(kernel, motion_kernel(43, 40.0, 10.0, wander=4.0, seed=seed))


def test_sinc_passes_below_its_cutoff_and_stops_above() -> None:
    kernel = sinc_kernel(63, 1.5)
    spectrum = np.abs(np.fft.fft2(kernel.numpy(), s=(256, 256)))[0]
    frequency = 2 * np.pi * np.arange(256) / 256
    assert np.abs(spectrum[frequency < 1.1] - 1).max() < 0.15
    assert spectrum[(frequency > 1.9) & (frequency < np.pi)].max() < 0.15


def test_blurs_keep_a_flat_image_and_its_range() -> None:
    flat = torch.full((2, 3, 48, 48), 0.4)
    edge = torch.zeros(2, 3, 48, 48)
    edge[..., 24:] = 1
    for apply in (
        lambda x: gaussian_blur(x, [1.0, 3.0], theta=[0.0, 1.0]),
        lambda x: motion_blur(x, 12.0, [0.0, 40.0], [1, 2], wander=1.0),
        lambda x: defocus_blur(x, [2.0, 5.0]),
        lambda x: sinc_blur(x, 1.2),
    ):
        assert torch.allclose(apply(flat), flat, atol=1e-5)
        blurred = apply(edge)
        assert blurred.min() >= 0 and blurred.max() <= 1
        assert (blurred - edge).abs().max() > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_kernel(20, 1, 1), "must be odd"),
        (lambda: gaussian_kernel(21, 0.0, 1), r"variance = 0: outside the allowed \[0.01, 400\] \(pixels squared\)"),
        (lambda: gaussian_kernel(21, 1, 1, shape="box"), "shape = 'box': expected one of"),
        (lambda: disk_kernel(7, 9.0), "a kernel of size 7 holds at most 3.5"),
        (lambda: motion_kernel(15, 40.0, 0.0), "a kernel of size 15 holds at most 14"),
        (lambda: sinc_kernel(21, 4.0), r"cutoff = 4: outside the allowed \[0.3, 3.14159\] \(radians a pixel\)"),
        (lambda: mzsr_kernel(np.random.default_rng(0), 0.5), r"scale = 0.5: outside the allowed \[1, 8\]"),
    ],
)
def test_bad_kernels_are_refused_with_their_range(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
