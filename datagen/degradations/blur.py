"""Blur: correlation with a kernel, and one function for each physical cause. NCHW in, NCHW out."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor

from datagen.degradations.checks import Parameter, PerSample, check_images
from datagen.degradations.kernels import (
    ANGLE,
    BETA,
    CUTOFF,
    LENGTH,
    RADIUS,
    WANDER,
    disk_kernel,
    gaussian_kernel,
    motion_kernel,
    sinc_kernel,
)

SIGMA1 = Parameter("sigma1", 0.1, 20, "standard deviation along theta in pixels")
SIGMA2 = Parameter("sigma2", 0.1, 20, "standard deviation across theta in pixels", default="sigma1")
THETA = Parameter("theta", -6.2832, 6.2832, "radians from the x axis, clockwise on the screen", default=0.0)
SEEDS = Sequence[int]


def blur(x: Tensor, kernel: Tensor | np.ndarray) -> Tensor:
    """Correlate every channel with ``kernel``; edges are mirrored with the edge pixel repeated ('symmetric').

    ``x``: (N, C, H, W) float; ``kernel``: (k, k) for all samples or (N, k, k), k odd, of any size.
    Done by FFT: time independent of the kernel, no TF32 on GPUs, differentiable; float32 error about 1e-7.

    Raises:
        ValueError: the kernel is even or not square, or there are not as many as samples.
    """
    kernel = torch.as_tensor(kernel).to(x)
    size = kernel.shape[-1]
    height, width = x.shape[-2:]
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != size or size % 2 == 0:
        raise ValueError(f"kernel must be (k, k) or (N, k, k) with k odd, got {tuple(kernel.shape)}")
    if kernel.ndim == 3 and kernel.shape[0] != x.shape[0]:
        raise ValueError(f"{kernel.shape[0]} kernels for a batch of {x.shape[0]}")
    radius = size // 2
    padded = _pad_symmetric(x, radius)
    # A length with a large prime factor would take twice as long; the zeros beyond the picture are cut off again.
    shape = tuple(next_fast_len(side, real=True) for side in padded.shape[-2:])
    spectrum = torch.fft.rfft2(kernel.reshape(-1, 1, size, size), s=shape)
    # The conjugate makes it a correlation; what wraps around falls outside the part that is kept.
    blurred = torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * spectrum.conj(), s=shape)
    return blurred[..., :height, :width]


def gaussian_blur(
    x: Tensor,
    sigma1: PerSample,
    *,
    sigma2: PerSample | None = None,
    theta: PerSample = 0.0,
    size: int = 21,
    shape: str = "gaussian",
    beta: PerSample = 1.0,
) -> Tensor:
    """Blur with the kernels of ``kernels.gaussian_kernel``; sigmas are standard deviations in px, theta radians.

    Without ``sigma2`` the kernel is isotropic.
    """
    check_images(x)
    count = x.shape[0]
    first = SIGMA1.check_all(sigma1, count)
    second = first if sigma2 is None else SIGMA2.check_all(sigma2, count)
    angle = THETA.check_all(theta, count)
    var1, var2 = [sigma**2 for sigma in first], [sigma**2 for sigma in second]
    powers = BETA.check_all(beta, count)
    return blur(x, gaussian_kernel(size, var1, var2, angle, shape=shape, beta=powers)).clamp(0, 1)


def motion_blur(
    x: Tensor, length: PerSample, angle: PerSample, seed: SEEDS, *, wander: PerSample = 0.0, size: int = 31
) -> Tensor:
    """Camera shake along a path (``kernels.motion_kernel``): length px, angle degrees, wander radians."""
    check_images(x)
    count = x.shape[0]
    paths = zip(
        LENGTH.check_all(length, count),
        ANGLE.check_all(angle, count),
        WANDER.check_all(wander, count),
        seed,
        strict=True,
    )
    kernels = [motion_kernel(size, path, heading, wander=stray, seed=one) for path, heading, stray, one in paths]
    return blur(x, torch.stack(kernels)).clamp(0, 1)


def defocus_blur(x: Tensor, radius: PerSample, *, size: int = 21) -> Tensor:
    """Defocus: the circle of confusion, a disk of ``radius`` px (``kernels.disk_kernel``), at most ``size / 2``."""
    check_images(x)
    kernels = [disk_kernel(size, one) for one in RADIUS.check_all(radius, x.shape[0])]
    return blur(x, torch.stack(kernels)).clamp(0, 1)


def sinc_blur(x: Tensor, cutoff: PerSample, *, size: int = 21) -> Tensor:
    """Ringing: ideal circular low-pass filter with ``cutoff`` in radians a pixel (``kernels.sinc_kernel``)."""
    check_images(x)
    kernels = [sinc_kernel(size, one) for one in CUTOFF.check_all(cutoff, x.shape[0])]
    return blur(x, torch.stack(kernels)).clamp(0, 1)


def _pad_symmetric(x: Tensor, radius: int) -> Tensor:
    for axis in (-2, -1):
        length = x.shape[axis]
        positions = torch.arange(-radius, length + radius, device=x.device) % (2 * length)
        x = x.index_select(axis, torch.where(positions < length, positions, 2 * length - 1 - positions))
    return x
