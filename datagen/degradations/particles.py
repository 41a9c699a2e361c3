"""Falling drops and flakes: where they are is drawn on the CPU, how much light they stop is worked out on the device.

A particle is a capsule: a disk that moved along a straight path while the shutter was open. Each is laid down as
optical depth, and opacity is 1 - exp(-depth), so that any number of particles cover each other as independent ones do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LAYER_RATIO = 0.62
"""How much smaller each layer looks than the one before it; an own choice, made by eye."""

Numbers = NDArray[np.float64]

_SIZES = 3  # sizes that the depths within a layer give
_SHAPES = 6  # shapes of each size: more are not told apart in a picture, fewer are seen to repeat
_DENSEST = 0.995  # opacity 1 is an infinite optical depth
_NARROWEST = 1.2  # px: a narrower profile would flicker with its place on the grid; it gets fainter instead
_HALF_WAY = 0.92  # radius of a profile that is one pixel wide at half of its height
_GROWTH = 2.2  # shapes whose areas differ by up to 2^2.2 are laid down in one go, all in the box of the largest
_CACHED = 1 << 14  # pixels worked on at once by a CPU, so that they stay in its cache


@dataclass(frozen=True)
class Shower:
    """The particles of one picture.

    ``shapes`` (S, 7): half of the path in px; its direction, the cosines of its angles with y and x; radius in px, at
    which nothing is left; how much the ends of the path fade, 0 or 1; y and x of the centre within its pixel.
    ``shape`` (P,): which one a particle has; ``places`` (P, 2): row and column of its centre, whole numbers;
    ``depths`` (P,): its optical depth in the middle.
    """

    shapes: Numbers
    shape: NDArray[np.int64]
    places: Numbers
    depths: Numbers


def streaks(
    rng: np.random.Generator,
    height: int,
    width_px: int,
    *,
    density: float,
    length: float,
    angle: float,
    width: float,
    opacity: float,
    layers: int,
) -> Shower:
    """Drops; see ``weather.rain_streaks`` for what the parameters mean."""
    scales = np.repeat(_scales(layers), _SHAPES)
    half = length * scales * rng.uniform(0.8, 1.2, len(scales)) / 2
    turned = np.radians(angle + 1.5 * rng.standard_normal(len(scales)))
    wide = _HALF_WAY * width * scales * rng.uniform(0.7, 1.3, len(scales))
    radius = np.maximum(wide, _NARROWEST)
    shapes = _shapes(rng, half, turned, radius, fade=1)
    shape, places = _scatter(rng, scales, shapes, density, height, width_px)
    strength = opacity * rng.uniform(0.3, 1, len(shape)) * (wide / radius)[shape]
    return Shower(shapes, shape, places, _optical_depth(strength))


def flakes(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    density: float,
    size: float,
    angle: float,
    drift: float,
    opacity: float,
    layers: int,
) -> Shower:
    """Flakes; see ``weather.snow_flakes`` for what the parameters mean."""
    scales = np.repeat(_scales(layers), _SHAPES)
    whole = size * scales / 2 * np.exp(0.3 * rng.standard_normal(len(scales))).clip(0.6, 1.6)
    half = drift * scales * rng.uniform(0.5, 1.5, len(scales)) / 2
    turned = np.radians(angle + 25 * rng.standard_normal(len(scales)))
    # A crystal is no disk: what is large enough to show it is made of pieces about its centre.
    pieces = np.where(whole > 2, 3, 1)
    sharp = whole * np.where(pieces > 1, 0.7, 1)
    # The lens is focused on the scene: the circle of confusion grows as fast as a flake comes nearer.
    radius = np.maximum(sharp + whole * 0.5 * np.minimum(scales, 1), _NARROWEST)
    # What a piece stops is spread over the disk that its blur makes of it, and over its path.
    spread = (sharp / radius) ** 2 * (math.pi * radius) / (math.pi * radius + 4 * half)
    shapes = _shapes(rng, half, turned, radius, fade=0)
    shape, places = _scatter(rng, scales, shapes, density, height, width)
    depths = _optical_depth(opacity * rng.uniform(0.75, 1, len(shape))) * spread[shape]
    owner = np.repeat(np.arange(len(shape)), pieces[shape])
    aside = np.where(pieces > 1, 0.3 * whole, 0)[shape][owner]
    places = places[owner] + np.rint(aside[:, None] * rng.standard_normal((len(owner), 2)))
    depths = depths[owner] * rng.uniform(0.6, 1.4, len(owner))
    return Shower(shapes, shape[owner], places, depths)


def lay_down(showers: Sequence[Shower], height: int, width: int, like: Tensor) -> Tensor:
    """Opacity (N, 1, height, width) in [0, 1] of N showers, float32 on the device of ``like``.

    On the CPU that of a shower is the same to the bit whatever the others are.
    """
    shapes = np.concatenate([one.shapes for one in showers])
    half, along, sideways, radius = shapes[:, 0], np.abs(shapes[:, 1]), np.abs(shapes[:, 2]), shapes[:, 3]
    reach_y = math.ceil((half * along + radius).max()) + 1
    reach_x = math.ceil((half * sideways + radius).max()) + 1
    # A margin takes what falls beside the picture, of the particles whose middle is far enough outside as well.
    rows, columns = height + 4 * reach_y, width + 4 * reach_x
    depth = torch.zeros(len(showers), 1, rows, columns, dtype=torch.float32, device=like.device)
    shape, middle, strength, known = [], [], [], 0
    for sample, one in enumerate(showers):
        y, x = one.places.T
        near = (np.abs(2 * y - height + 1) < height + 2 * reach_y) & (np.abs(2 * x - width + 1) < width + 2 * reach_x)
        shape.append(one.shape[near] + known)
        middle.append((sample * rows + 2 * reach_y + y[near]) * columns + 2 * reach_x + x[near])
        strength.append(one.depths[near])
        known += len(one.shapes)
    _paste(depth, shapes, np.concatenate(shape), np.concatenate(middle), np.concatenate(strength))
    inside = depth[..., 2 * reach_y : 2 * reach_y + height, 2 * reach_x : 2 * reach_x + width]
    return 1 - inside.neg().exp_()


def _paste(depth: Tensor, shapes: Numbers, shape: NDArray[np.int64], middle: Numbers, strength: Numbers) -> None:
    """Add each particle to ``depth`` (N, 1, H, W): its shape, times its strength, about its middle (flat position)."""
    half, along, sideways, radius = shapes[:, 0], np.abs(shapes[:, 1]), np.abs(shapes[:, 2]), shapes[:, 3]
    steep = along >= sideways
    main = np.maximum(along, sideways)  # the cosine of the angle with the nearer of the two axes
    down = np.floor(2 * (half * main + radius)).astype(np.int64) + 1
    across = np.floor(2 * radius / main).astype(np.int64) + 1
    alike = np.floor(np.log2(down * across) / _GROWTH).astype(np.int64) * 2 + steep
    for group in np.unique(alike):
        members = np.flatnonzero(alike == group)
        extent = int(down[members].max()), int(across[members].max())
        table = torch.from_numpy(np.ascontiguousarray(shapes[members].T, dtype=np.float32)).to(depth.device)
        profiles, pixels = _profiles(table, extent, depth.shape[-1], steep=bool(steep[members[0]]))
        own = np.flatnonzero(alike[shape] == group)
        _add(depth, profiles, pixels, np.searchsorted(members, shape[own]), middle[own], strength[own])


def _add(
    depth: Tensor, profiles: Tensor, pixels: Tensor, shape: NDArray[np.int64], middle: Numbers, strength: Numbers
) -> None:
    device = depth.device
    which = torch.from_numpy(shape).to(device)
    places = torch.from_numpy(middle.astype(np.int32)).to(device)[:, None]
    times = torch.from_numpy(strength.astype(np.float32)).to(device)[:, None]
    at_once = max(1, _CACHED // profiles.shape[1]) if device.type == "cpu" else max(1, len(shape))
    for start in range(0, len(shape), at_once):
        some = slice(start, start + at_once)
        covered = pixels.index_select(0, which[some]).add_(places[some])
        added = profiles.index_select(0, which[some]).mul_(times[some])
        depth.view(-1).index_add_(0, covered.view(-1), added.view(-1))


def _profiles(shapes: Tensor, extent: tuple[int, int], columns: int, *, steep: bool) -> tuple[Tensor, Tensor]:
    """What shapes (7, S) cover, of 0 to 1, in slanted boxes of ``extent`` pixels; and where, from their middle.

    Two tensors (S, down * across), the second in flat positions of a picture that is ``columns`` wide. A steep shape
    is gone through row by row, a flat one column by column: what is written of rows holds for columns there.
    """
    # Shapes last: the innermost loop of every operation is then the longest.
    half, along, sideways, radius, fade, y, x = shapes
    row_step, column_step = columns, 1
    if not steep:
        along, sideways, y, x = sideways, along, x, y
        row_step, column_step = column_step, row_step
    length = half * along.abs()
    row = torch.ceil(y - length - radius) + torch.arange(extent[0], dtype=y.dtype, device=y.device)[:, None, None]
    dy = row - y
    first = torch.ceil(x + dy * (sideways / along) - radius / along.abs())
    column = first + torch.arange(extent[1], dtype=y.dtype, device=y.device)[:, None]
    dx = column - x
    off = (dx * along).sub_(dy * sideways)
    on = dx.mul_(sideways).add_(dy * along)
    beyond = on.sub_(torch.clamp(on, -half, half))
    # Falls off as (1 - (distance / radius)^2)^2; what is opaque in the middle has a clear edge all the same.
    near = off.mul_(off).add_(beyond.mul_(beyond)).mul_(-1 / (radius * radius)).add_(1).clamp_min_(0)
    # Where a drop's path ends the shutter saw it for a shorter time.
    end = (dy / length.clamp_min(1e-3)).clamp_(-1, 1)
    profile = near.mul_(near).mul_(1 - fade * (end * end * end * end))
    # The box of a smaller shape reaches beyond it, and perhaps beyond the margin.
    pixel = (row.int() * row_step + column.int() * column_step).mul_(profile > 0)
    return profile.flatten(0, 1).t().contiguous(), pixel.flatten(0, 1).t().contiguous()


def _scales(layers: int) -> Numbers:
    """Apparent sizes from the nearest to the farthest, 1 in the middle of the nearest layer, evenly spread in each."""
    within = (np.arange(layers * _SIZES) + 0.5) / _SIZES - 0.5
    return np.asarray(LAYER_RATIO**within)


def _shapes(rng: np.random.Generator, half: Numbers, angle: Numbers, radius: Numbers, fade: float) -> Numbers:
    centre = rng.uniform(-0.5, 0.5, (2, len(half)))
    return np.stack([half, np.cos(angle), -np.sin(angle), radius, np.full(len(half), fade), *centre], axis=1)


def _scatter(
    rng: np.random.Generator, scales: Numbers, shapes: Numbers, density: float, height: int, width: int
) -> tuple[NDArray[np.int64], Numbers]:
    """Which shape each particle has, and its place: ``density`` a pixel, over the picture and as far as they reach in.

    The number of a shape grows with the volume seen, as one over the square of its scale.
    """
    half, along, sideways, radius = shapes[:, 0], np.abs(shapes[:, 1]), np.abs(shapes[:, 2]), shapes[:, 3]
    high, wide = height + 2 * (half * along + radius), width + 2 * (half * sideways + radius)
    wanted = density * high * wide * scales**-2 / (scales**-2).sum()
    ends = np.cumsum(wanted)
    shape = np.searchsorted(ends, rng.uniform(0, ends[-1], round(ends[-1])), side="right") if ends[-1] else np.arange(0)
    places = rng.uniform(-0.5, 0.5, (len(shape), 2)) * np.stack([high, wide], axis=1)[shape]
    return shape, np.rint(places + np.array([height - 1, width - 1]) / 2)


def _optical_depth(opacity: Numbers) -> Numbers:
    return np.asarray(-np.log1p(-np.minimum(opacity, _DENSEST)))
