"""Depth of a scene: a plausible one for pictures that come without."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from datagen.degradations.random import field_generator

_COARSE = 32  # side of the grid that objects are laid out on: they are smooth, and its cost is small
_CLOSEST = 0.12  # drop below the horizon, in heights of the picture, at which the ground is half as far as it can be
_OCTAVES = (3, 5, 9)  # grid points a side of the noise that stands for objects
_WINDOW = 5  # coarse pixels: side of the window that follows the edges of the picture
_EDGE = 0.15  # share of the picture's variance below which an edge is taken for texture


def procedural_depth(
    x: Tensor,
    seed: Sequence[int],
    *,
    near: Sequence[float],
    far: Sequence[float],
    horizon: Sequence[float],
    relief: Sequence[float],
) -> Tensor:
    """A plausible depth map (N, 1, H, W) from ``near`` to ``far`` for pictures ``x`` (N, C, H, W) that have none.

    A ground plane seen in perspective, whose depth grows as one over the distance below the horizon and is ``far``
    above it, tilted by up to 10 degrees, mixed with smooth noise of three octaves (``relief``) that stands for
    objects. A guided filter (He, Sun & Tang, TPAMI 2013; on a coarse grid as in He & Sun, arXiv 1505.00996) makes the
    noise change where the picture has its edges, as the depth of objects does. Which part is near and which far is
    chance: what varies is how dense the haze is where, as a network must expect. A horizon outside [0, 1] gives
    crops without sky or without ground.

    Raises:
        ValueError: a ``far`` is smaller than its ``near``.
    """
    height, width = x.shape[-2:]
    noise, tilts = [], []
    for one, nearest, farthest in zip(seed, near, far, strict=True):
        if farthest < nearest:
            raise ValueError(f"far = {farthest:g}: must not be smaller than near = {nearest:g}")
        rng = field_generator(one)
        tilts.append(math.tan(math.radians(rng.uniform(-10, 10))))
        noise.append(_noise(rng, min(_COARSE, height), min(_COARSE, width)))
    rows = (torch.arange(height, device=x.device, dtype=torch.float32)[:, None] + 0.5) / height
    across = (torch.arange(width, device=x.device, dtype=torch.float32) + 0.5 - width / 2) / height
    below = (rows - _column(horizon, x) + _column(tilts, x) * across).clamp_min_(0)
    # The distance of a plane is one over the drop below the horizon; rounded off, so that no edge shows there.
    plane = _CLOSEST * torch.rsqrt(below.square_().add_(_CLOSEST**2))
    objects = _follow_edges(torch.from_numpy(np.stack(noise)[:, None]).to(x.device), x.float())
    mixed = plane.lerp_(objects, _column(relief, x)).clamp_(0, 1)
    start = _column(near, x)
    return mixed.mul_(_column(far, x) - start).add_(start)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=like.device).reshape(-1, 1, 1, 1)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise (height, width) in [0, 1], float32, with all of its range in use."""
    total = np.zeros((height, width))
    for octave, cells in enumerate(_OCTAVES):
        grid = rng.uniform(0, 1, (cells, cells))
        total += 0.5**octave * (_linear(cells, height) @ grid @ _linear(cells, width).T)
    low, high = total.min(), total.max()
    return np.asarray((total - low) / max(high - low, 1e-6), dtype=np.float32)


def _follow_edges(coarse: Tensor, x: Tensor) -> Tensor:
    """The guided filter: ``coarse`` (N, 1, h, w) as a locally linear function of the brightness of ``x``, full size."""
    height, width = x.shape[-2:]
    small = coarse.shape[-2:]
    guide = x.mean(dim=1, keepdim=True)
    shrink = _matrix("area", height, small[0], x.device), _matrix("area", width, small[1], x.device)
    enlarge = _matrix("linear", small[0], height, x.device), _matrix("linear", small[1], width, x.device)
    window = _matrix("window", small[0], small[0], x.device), _matrix("window", small[1], small[1], x.device)
    brightness = _both(shrink, guide)
    middle = brightness.mean(dim=(-2, -1), keepdim=True)
    low = brightness - middle
    variance = low.square().mean(dim=(-2, -1), keepdim=True).clamp_min(1e-4)  # without contrast: nothing to follow
    mean, level = _both(window, low), _both(window, coarse)
    covariance = _both(window, low * coarse) - mean * level
    slope = covariance / (_both(window, low.square()) - mean.square() + _EDGE * variance)
    offset = level - slope * (mean + middle)
    slope, offset = _both(window, slope), _both(window, offset)
    return (_both(enlarge, slope).mul_(guide)).add_(_both(enlarge, offset))


def _both(matrices: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Rows and columns of ``x`` each through its matrix."""
    down, across = matrices
    return (down @ x.to(down.dtype) @ across.t()).float()


@lru_cache(maxsize=64)
def _matrix(kind: str, given: int, wanted: int, device: torch.device) -> Tensor:
    kinds: dict[str, Callable[[int, int], np.ndarray]] = {"area": _area, "linear": _linear, "window": _window}
    made = kinds[kind](given, wanted)
    # float32 products on a GPU may be set to TF32, which keeps three digits.
    return torch.from_numpy(made).to(device, torch.float32 if device.type == "cpu" else torch.float64)


@lru_cache(maxsize=64)
def _linear(given: int, wanted: int) -> np.ndarray:
    """(wanted, given): linear interpolation between the centres of pixels."""
    place = np.clip((np.arange(wanted) + 0.5) / wanted * given - 0.5, 0, given - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(given)))


def _area(given: int, wanted: int) -> np.ndarray:
    """(wanted, given): means over the area of the new pixels."""
    ends = np.arange(wanted + 1) * given / wanted
    cells = np.arange(given)
    shared = np.minimum(ends[1:, None], cells + 1) - np.maximum(ends[:-1, None], cells)
    return np.maximum(shared, 0) * wanted / given


def _window(given: int, wanted: int) -> np.ndarray:
    """(wanted, given), equal numbers: means over a window that the edges of the picture cut."""
    near = np.abs(np.arange(wanted)[:, None] - np.arange(given)) <= _WINDOW // 2
    return near / near.sum(axis=1, keepdims=True)
