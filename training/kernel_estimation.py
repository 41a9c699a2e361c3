"""The blur of a picture whose origin nobody knows, from the picture alone.

Edges of a scene are as sharp in a small picture of it as the camera makes them, so the blur that is looked for is the
one under which the shrunken picture has edges as sharp as the picture itself: the cross-scale likeness that Michaeli &
Irani (ICCV 2013) search for in patches and KernelGAN (Bell-Kligler et al., NeurIPS 2019) has a network judge, for 3,000
steps. Here the sharpness of edges is measured: the largest step along a short line over the range that the line spans.
It does not depend on contrast, and on content little, since only the lines that span the most are looked at; its
distribution along four directions fixes a Gaussian blur of any shape in a hundred evaluations, without training.

``docs/results-super-resolution.md`` has the errors on known blurs; ``benchmarks/kernel_estimation.py`` measures them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from datagen.degradations.blur import blur
from datagen.degradations.kernels import MZSR_SIZE

_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns that a line goes on by
_LENGTH = 9  # pixels of a line
_SPANNING = 0.2  # share of the lines that is looked at: those with the largest range
_QUANTILES = 40
_VARIANCES = (0.15, 0.3, 0.5, 0.75, 1.0, 1.4, 1.9, 2.5, 3.3, 4.3, 5.5, 7.0)  # px^2, of the first, round blurs
_LEAST, _MOST = 0.12, 10.0  # variances that a 15x15 kernel can hold
_MOST_STRETCHED = 0.9  # natural logarithm of a standard deviation's ratio to the mean one
_SIDE_LOOKED_AT = 512  # pixels of the picture; more say little and take longer


def estimate_kernel(picture: Tensor, scale: int, size: int = MZSR_SIZE) -> Tensor:
    """The Gaussian blur, [size, size] on the grid of the result, that ``picture`` [1,C,H,W] in [0, 1] went through.

    Estimated at a factor of 2 whatever ``scale``: if the camera's blur is v px^2 of its own picture, then the blur
    between two pictures of it that differ by s is (s^2 - 1) v, so that its covariance is known for every s.

    Deterministic; float64 on the CPU.
    """
    covariance = _estimate_covariance(_luma(picture)) * (scale**2 - 1) / 3
    return _gaussian(covariance, size)


def most_consistent(picture: Tensor, candidates: Sequence[Tensor], scale: int) -> int:
    """Which of the blurs [k,k], on the grid of the result, makes ``picture`` [1,C,H,W] most like its smaller self."""
    grey = _luma(picture)
    wanted = _sharpness(grey)
    distances = [_distance(grey, kernel, scale, wanted) for kernel in candidates]
    return distances.index(min(distances))


@torch.no_grad()
def _estimate_covariance(grey: Tensor) -> Tensor:
    """2x2 covariance in px^2, (x, y), float64, at a factor of 2: round blurs first, then a search by halving steps."""
    wanted = _sharpness(grey)

    def cost(shape: Tensor) -> float:
        # A stretched blur has to be worth it: on a picture with few edges in one direction anything may fit.
        return _distance(grey, _gaussian(_covariance(shape), MZSR_SIZE), 2, wanted) + 0.01 * float(shape[1:].norm())

    shapes = [torch.tensor([math.log(variance), 0.0, 0.0], dtype=torch.float64) for variance in _VARIANCES]
    costs = [cost(shape) for shape in shapes]
    best = min(costs)
    shape = shapes[costs.index(best)]
    step = 0.3
    while step > 0.03:
        moved = False
        for axis in range(3):
            for sign in (1, -1):
                tried = shape.clone()
                tried[axis] += sign * step
                tried[0].clamp_(math.log(_LEAST), math.log(_MOST))
                tried[1:].clamp_(-_MOST_STRETCHED, _MOST_STRETCHED)
                found = cost(tried)
                if found < best - 1e-6:
                    best, shape, moved = found, tried, True
        if not moved:
            step /= 2
    return _covariance(shape)


def _covariance(shape: Tensor) -> Tensor:
    """exp of a symmetric matrix: positive definite whatever ``shape`` [3] is, its level and how it is stretched."""
    level, along, across = shape
    return torch.linalg.matrix_exp(
        torch.stack([torch.stack([level + along, across]), torch.stack([across, level - along])])
    )


def _gaussian(covariance: Tensor, size: int) -> Tensor:
    offsets = torch.arange(size, dtype=covariance.dtype) - size // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    inverse = torch.linalg.inv(covariance)
    kernel = torch.exp(-(inverse[0, 0] * x**2 + 2 * inverse[0, 1] * x * y + inverse[1, 1] * y**2) / 2)
    return kernel / kernel.sum()


def _luma(picture: Tensor) -> Tensor:
    height, width = (min(side, _SIDE_LOOKED_AT) for side in picture.shape[-2:])
    top, left = ((whole - kept) // 2 for whole, kept in zip(picture.shape[-2:], (height, width)))
    return picture[..., top : top + height, left : left + width].float().mean(dim=1, keepdim=True).cpu()


def _distance(grey: Tensor, kernel: Tensor, scale: int, wanted: Tensor) -> float:
    found = _sharpness(blur(grey, kernel.to(grey))[..., ::scale, ::scale])
    return float(((found - wanted).abs().mean(dim=1) / wanted.mean(dim=1)).mean())


def _sharpness(grey: Tensor) -> Tensor:
    """Quantiles of how sharp edges are along each direction, [directions, quantiles]; 1: a step between two pixels."""
    picture = grey[0, 0]
    height, width = (side - _LENGTH + 1 for side in picture.shape)
    places = torch.linspace(0.1, 0.95, _QUANTILES, dtype=picture.dtype)
    quantiles = []
    for down, right in _DIRECTIONS:
        rows = height if down else height + _LENGTH - 1
        columns = width if right else width + _LENGTH - 1
        first = _LENGTH - 1 if right < 0 else 0
        line = torch.stack(
            [
                picture[k * down : k * down + rows, first + k * right : first + k * right + columns]
                for k in range(_LENGTH)
            ]
        )
        spans = (line.amax(dim=0) - line.amin(dim=0)).flatten()
        steps = line.diff(dim=0).abs().amax(dim=0).flatten()
        widest = spans.topk(max(int(_SPANNING * len(spans)), 16)).indices
        sharp = (steps[widest] / spans[widest].clamp_min(1e-4)).sort().values
        quantiles.append(sharp[(places * (len(sharp) - 1)).long()])
    return torch.stack(quantiles)
