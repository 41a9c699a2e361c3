"""Blur kernels: float64 tensors of odd size that sum to 1. x runs right, y runs down, the centre is the origin."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datagen.degradations.checks import Option, Parameter
from datagen.degradations.random import field_generator

SIZE = Parameter("size", 1, 63, "odd width of the kernel in pixels", default=21, integer=True, odd=True)
VARIANCE = Parameter("variance", 0.01, 400, "pixels squared")
BETA = Parameter("beta", 0.1, 10, "exponent of the generalised and plateau shapes", default=1.0)
SHAPE = Option("shape", ("gaussian", "generalised", "plateau"), default="gaussian")
RADIUS = Parameter("radius", 0.5, 30, "pixels")
LENGTH = Parameter("length", 1, 60, "path in pixels")
ANGLE = Parameter("angle", -360, 360, "degrees from the x axis, clockwise on the screen", default=0.0)
WANDER = Parameter("wander", 0, 10, "radians that the heading strays over the path", default=0.0)
CUTOFF = Parameter("cutoff", 0.3, math.pi, "radians a pixel")
MZSR_SCALE = Parameter("scale", 1, 8, "factor of super-resolution")
MZSR_SIZE = 15

Number = float | Sequence[float] | Tensor


def gaussian_kernel(
    size: int, var1: Number, var2: Number, theta: Number = 0.0, *, shape: str = "gaussian", beta: Number = 1.0
) -> Tensor:
    """Anisotropic Gaussian sampled at pixel centres, with covariance R(theta) diag(var1, var2) R(theta)^T.

    ``var1``, ``var2``: VARIANCES in px^2; ``theta``: radians. A number for one kernel (size, size), or N numbers
    for (N, size, size). ``shape`` 'generalised' is exp(-q^beta / 2), 'plateau' is 1 / (1 + q^beta), where q is
    the squared Mahalanobis distance (Wang et al., Real-ESRGAN, 2021, section 3.1; after Liu et al., 2020).
    """
    SIZE.check(size)
    SHAPE.check(shape)
    v1, v2, angle, power = torch.broadcast_tensors(*(_as_column(value) for value in (var1, var2, theta, beta)))
    for values, parameter in ((v1, VARIANCE), (v2, VARIANCE), (power, BETA)):
        parameter.check_all(values.flatten().tolist(), values.numel())
    y, x = _grid(size)
    along = torch.cos(angle) * x + torch.sin(angle) * y
    across = -torch.sin(angle) * x + torch.cos(angle) * y
    distance = along**2 / v1 + across**2 / v2
    if shape == "gaussian":
        return _normalised(torch.exp(-0.5 * distance))
    raised = distance**power
    return _normalised(torch.exp(-0.5 * raised) if shape == "generalised" else 1 / (1 + raised))


def mzsr_variances(rng: np.random.Generator, scale: float, least: float = 1.0) -> tuple[float, float, float]:
    """One draw of (var1, var2, theta) from the kernel distribution of MZSR (Soh et al., CVPR 2020, section 4.1).

    theta ~ U[0, pi], var1 ~ U[least, 2.5 scale], var2 ~ U[least, var1]; variances in px^2. ``least`` is 1 in the
    released code, which leaves the nearly sharp blurs of the paper's tables (0.2) to the adaptation.
    """
    MZSR_SCALE.check(scale)
    VARIANCE.check(least)
    theta = float(rng.uniform(0, math.pi))
    var1 = float(rng.uniform(least, 2.5 * scale))
    var2 = float(rng.uniform(least, var1))
    return var1, var2, theta


def mzsr_kernel(rng: np.random.Generator, scale: float, least: float = 1.0) -> Tensor:
    """One 15x15 kernel from the distribution of ``mzsr_variances``."""
    return gaussian_kernel(MZSR_SIZE, *mzsr_variances(rng, scale, least))


def disk_kernel(size: int, radius: float) -> Tensor:
    """Defocus: the share of each pixel that a disk of ``radius`` px covers, from 8x8 points a pixel."""
    SIZE.check(size)
    RADIUS.check(radius)
    if radius > size / 2:
        raise ValueError(f"radius = {radius:g}: a kernel of size {size} holds at most {size / 2:g}")
    steps = 8
    offsets = (torch.arange(size * steps, dtype=torch.float64) + 0.5) / steps - size / 2
    inside = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).double()
    return _normalised(inside.reshape(size, steps, size, steps).mean(dim=(1, 3)))


def motion_kernel(size: int, length: float, angle: float, *, wander: float = 0.0, seed: int = 0) -> Tensor:
    """Camera shake: the time spent in each pixel along a path of ``length`` px at constant speed.

    The heading starts at ``angle`` degrees and follows Brownian motion that strays by ``wander`` radians (standard
    deviation at the end of the path); 0 is a straight line. The path is centred on its centre of mass, so that
    the blur does not shift the image.
    """
    SIZE.check(size)
    LENGTH.check(length)
    if length > size - 1:
        raise ValueError(f"length = {length:g}: a kernel of size {size} holds at most {size - 1}")
    ANGLE.check(angle)
    WANDER.check(wander)
    points = max(2, math.ceil(8 * length))
    turns = field_generator(seed).standard_normal(points) * (wander / math.sqrt(points))
    heading = math.radians(angle) + np.cumsum(turns)
    step = length / points
    path = np.stack([np.cumsum(np.sin(heading)), np.cumsum(np.cos(heading))]) * step
    path -= path.mean(axis=1, keepdims=True)
    path += size // 2
    low = np.floor(path).astype(int)
    y, x = path - low
    kernel = np.zeros((size + 1, size + 1))
    for dy, dx, share in ((0, 0, (1 - y) * (1 - x)), (0, 1, (1 - y) * x), (1, 0, y * (1 - x)), (1, 1, y * x)):
        np.add.at(kernel, (low[0] + dy, low[1] + dx), share)
    # The last row and column take shares of weight 0 only.
    kernel = kernel[:size, :size]
    return _normalised(torch.from_numpy(kernel))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Circular low-pass filter, cutoff * J1(cutoff * r) / (2 pi r): ringing and overshoot (Real-ESRGAN, eq. 6)."""
    SIZE.check(size)
    CUTOFF.check(cutoff)
    y, x = _grid(size)
    radius = torch.sqrt(x**2 + y**2)
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius.clamp_min(1e-12))
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _normalised(kernel)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    return offsets[:, None], offsets[None, :]


def _as_column(value: Number) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    return tensor.reshape(*tensor.shape, 1, 1)


def _normalised(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(dim=(-2, -1), keepdim=True)


EVALUATION_KERNELS: dict[str, Tensor] = {
    "g_0.2": gaussian_kernel(21, 0.2, 0.2),
    "g_1.3": gaussian_kernel(21, 1.3, 1.3),
    "g_2.0": gaussian_kernel(21, 2.0, 2.0),
    "g_ani": gaussian_kernel(21, 4.0, 1.0, -0.5),
}
"""The kernels of the MZSR tables; the numbers in the names are variances. g_1.3 goes with bicubic sub-sampling, the
others with direct. g_ani reproduces the published bicubic row on Set5 only: its B100 and Urban100 rows were made
with an unknown kernel."""


def kernel_named(text: str, size: int = 21) -> Tensor:
    """A blur from what a person writes: a name in ``EVALUATION_KERNELS``, or the variances of a Gaussian in px^2.

    "2.0" is round; "4,1,-0.5" has var1, var2 and theta of ``gaussian_kernel``. float64 (size, size), or of the named
    kernel's size.

    Raises:
        ValueError: it is neither, or a variance is out of range.
    """
    if text in EVALUATION_KERNELS:
        return EVALUATION_KERNELS[text]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2, 3):
        known = ", ".join(EVALUATION_KERNELS)
        raise ValueError(f"kernel {text!r}: expected {known}, a variance such as 2.0, or var1,var2,theta")
    var1, var2, theta = (*numbers, *([numbers[0], 0.0][len(numbers) - 1 :]))
    return gaussian_kernel(size, var1, var2, theta)
