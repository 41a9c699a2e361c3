"""Resampling with MATLAB's conventions, which the published super-resolution tables are measured with."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from datagen.degradations.blur import blur
from datagen.degradations.checks import Option, Parameter, check_images

__all__ = ["blur", "downsample_direct", "imresize", "resize"]

FACTOR = Parameter("factor", 0.05, 8, "output size over input size")
FILTER = Option("filter", ("cubic", "linear", "box"), default="cubic")
ANTIALIAS = Option("antialias", (True, False), default=True)
RELATIVE_TO = Option("relative_to", ("current", "output"), default="current")
SUBSAMPLING = Parameter("scale", 1, 16, "every scale-th pixel is kept", integer=True)


def imresize(
    x: Tensor,
    scale: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    filter: str = "cubic",
    antialias: bool = True,
    round_to_uint8: bool = False,
    from_corner: bool = False,
) -> Tensor:
    """Resize (N, C, H, W) as MATLAB's imresize does, to 1e-5 in float32.

    The filter (Keys' cubic with a = -0.5, triangle or box) is stretched by 1 / scale when shrinking and
    ``antialias`` is on; sampling points are centre-aligned, edges mirrored with the edge pixel repeated, weights
    normalised. With ``scale`` the output is ceil(H * scale) x ceil(W * scale); with ``size`` it is (H', W').
    The axis that shrinks most comes first, rows (the vertical axis) on a tie.

    ``round_to_uint8``: input holds 8-bit levels / 255, and the result is rounded to them after each of the two
    passes, as MATLAB does on uint8 images; a single rounding at the end differs by up to 2 levels. The output of a
    float resize is not clipped: cubic overshoots.

    ``from_corner``: output pixel u lies at u / scale of the input, both from 0, instead of centre-aligned: the inverse
    of ``downsample_direct``, whose pixels are the top-left ones of their cells.

    Raises:
        ValueError: not exactly one of ``scale`` and ``size``, or an output of no pixels.
    """
    if (scale is None) == (size is None):
        raise ValueError("imresize: give either scale or size")
    FILTER.check(filter)
    if scale is not None:
        if not 1 / 64 <= scale <= 64:
            raise ValueError(f"scale = {scale:g}: outside the allowed [0.015625, 64] (output size over input size)")
        scales = (float(scale), float(scale))
        lengths = (math.ceil(x.shape[-2] * scale), math.ceil(x.shape[-1] * scale))
    else:
        assert size is not None
        lengths = (int(size[0]), int(size[1]))
        if min(lengths) < 1:
            raise ValueError(f"size = {size}: must be at least 1x1")
        scales = (lengths[0] / x.shape[-2], lengths[1] / x.shape[-1])
    dtype = x.dtype
    if round_to_uint8:
        # MATLAB sums in double before it rounds; float32 would land on the other side of some ties.
        x = (x.double() * 255).round()
    for axis in sorted((0, 1), key=lambda axis: scales[axis]):
        if lengths[axis] == x.shape[axis - 2] and scales[axis] == 1:
            continue
        x = _resize_axis(x, axis - 2, lengths[axis], scales[axis], filter, antialias, from_corner)
        if round_to_uint8:
            # MATLAB rounds halves away from zero; after the clip that is up.
            x = (x.clamp(0, 255) + 0.5).floor()
    return (x / 255).to(dtype) if round_to_uint8 else x


def downsample_direct(x: Tensor, scale: int) -> Tensor:
    """Keep pixels 0, scale, 2 scale, ... of both axes: the 'direct' sub-sampling of ZSSR and MZSR, after a blur.

    The kept pixel is the top-left one of each cell, while ``imresize`` is centre-aligned: the two differ by
    (scale - 1) / 2 px, as in the published evaluation. ``imresize(..., from_corner=True)`` has the same alignment.
    """
    step = int(SUBSAMPLING.check(scale))
    return x[..., ::step, ::step]


def resize(x: Tensor, height: int, width: int, *, filter: str = "cubic", antialias: bool = True) -> Tensor:
    """A resize inside a degradation chain: ``imresize`` to (height, width), clipped to [0, 1]."""
    check_images(x)
    return imresize(x, size=(height, width), filter=filter, antialias=antialias).clamp(0, 1)


def _resize_axis(
    x: Tensor, axis: int, length: int, scale: float, filter: str, antialias: bool, from_corner: bool
) -> Tensor:
    weights, indices = _taps(x.shape[axis], length, scale, filter, antialias, from_corner)
    shape = (-1, 1) if axis == -2 else (-1,)
    total = None
    # Tap by tap instead of a matrix product: every output is the same sum in the same order in any batch.
    for weight, index in zip(weights.to(x), indices.to(x.device), strict=True):
        term = x.index_select(axis, index) * weight.reshape(shape)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


@functools.lru_cache(maxsize=256)
def _taps(
    length_in: int, length_out: int, scale: float, filter: str, antialias: bool, from_corner: bool
) -> tuple[Tensor, Tensor]:
    """Weights and source positions, each (taps, length_out), for one axis."""
    function, support = _FILTERS[filter]
    stretch = min(scale, 1.0) if antialias else 1.0
    width = support / stretch
    # MATLAB counts pixels from 1: output u sits at u / scale + (1 - 1 / scale) / 2 of the input.
    # From the corner it sits half a cell further: at (u - 1) / scale + 1.
    centres = torch.arange(1, length_out + 1, dtype=torch.float64) / scale + (1 if from_corner else 0.5) * (
        1 - 1 / scale
    )
    first = torch.floor(centres - width / 2)
    positions = first[None, :] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)[:, None]
    weights = stretch * function(stretch * (centres[None, :] - positions))
    weights = weights / weights.sum(dim=0, keepdim=True)
    mirrored = torch.remainder(positions.long() - 1, 2 * length_in)
    indices = torch.where(mirrored < length_in, mirrored, 2 * length_in - 1 - mirrored)
    used = (weights != 0).any(dim=1)
    return weights[used], indices[used]


def _cubic(x: Tensor) -> Tensor:
    a = x.abs()
    near = 1.5 * a**3 - 2.5 * a**2 + 1
    far = -0.5 * a**3 + 2.5 * a**2 - 4 * a + 2
    return torch.where(a <= 1, near, torch.where(a <= 2, far, 0.0))


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def _box(x: Tensor) -> Tensor:
    return ((x >= -0.5) & (x < 0.5)).double()


_FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "cubic": (_cubic, 4.0),
    "linear": (_triangle, 2.0),
    "box": (_box, 1.0),
}
