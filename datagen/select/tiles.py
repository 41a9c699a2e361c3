"""Which crops of a picture are worth training on, read from its quality map."""

from typing import NamedTuple

import numpy as np

from datagen.config import TileConfig
from datagen.picture.quality import CELL, cell_edges


class Box(NamedTuple):
    """A crop in the upright picture, pixels."""

    x: int
    y: int
    width: int
    height: int


def choose_tiles(width: int, height: int, sharpness: np.ndarray, flatness: np.ndarray, config: TileConfig) -> list[Box]:
    """The crops of one picture, from top left to bottom right; empty when none passes.

    Args:
        width, height: of the picture, pixels.
        sharpness, flatness: Laplacian variance and flat fraction of its cells, row by row, as the inventory has them.

    A picture smaller than ``whole_below`` is one crop, itself; its whole-picture measures have judged it already.
    """
    if config.size is None or max(width, height) < config.whole_below:
        return [Box(0, 0, width, height)]
    rows, columns = cell_edges(height, CELL), cell_edges(width, CELL)
    shape = (len(rows) - 1, len(columns) - 1)
    passing: list[tuple[float, Box]] = []
    for box in _grid(width, height, config.size, config.align):
        down, across = _overlap(rows, box.y, box.height), _overlap(columns, box.x, box.width)
        sharp = float(down @ sharpness.reshape(shape) @ across)
        flat = float(down @ flatness.reshape(shape) @ across)
        if sharp >= config.min_laplacian_variance and flat <= config.max_flat_fraction:
            passing.append((sharp, box))
    if config.max_per_picture is not None:
        passing = sorted(passing, key=lambda tile: (-tile[0], tile[1].y, tile[1].x))[: config.max_per_picture]
    return sorted((box for _, box in passing), key=lambda box: (box.y, box.x))


def _grid(width: int, height: int, size: int, align: int) -> list[Box]:
    return [Box(x, y, w, h) for y, h in _places(height, size, align) for x, w in _places(width, size, align)]


def _places(length: int, size: int, align: int) -> list[tuple[int, int]]:
    """Start and length of the tiles along one axis: as many as fit, side by side, in the middle."""
    if length <= size:
        return [(0, length)]
    count = length // size
    start = (length - count * size) // 2 // align * align
    return [(start + i * size, size) for i in range(count)]


def _overlap(edges: np.ndarray, start: int, length: int) -> np.ndarray:
    """Share of ``[start, start + length)`` that lies in each cell; sums to 1."""
    low, high = np.maximum(edges[:-1], start), np.minimum(edges[1:], start + length)
    return np.maximum(high - low, 0) / length
