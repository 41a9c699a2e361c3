"""Which crops of a picture are worth training on, read from its quality map."""

import functools
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from datagen.config import TileConfig
from datagen.picture.quality import CELL, cell_edges

# What of the inventory the choice needs.
COLUMNS = ("width", "height", "cell_laplacian_variance", "cell_flat_fraction")


class Box(NamedTuple):
    """A crop in the upright picture, pixels."""

    x: int
    y: int
    width: int
    height: int


TILES_TYPE = pa.list_(pa.struct([(name, pa.int32()) for name in Box._fields]))


def choose_tiles(
    width: int, height: int, sharpness: np.ndarray, flatness: np.ndarray, config: TileConfig
) -> np.ndarray:
    """The crops of one picture, int32 ``[T, 4]`` in the order of :class:`Box`, from top left to bottom right.

    Args:
        width, height: of the picture, pixels.
        sharpness, flatness: Laplacian variance and flat fraction of its cells, row by row, as the inventory has them.

    ``[0, 4]`` when none passes. A picture smaller than ``whole_below`` is one crop, itself; its whole-picture measures
    have judged it already.
    """
    if config.size is None or max(width, height) < config.whole_below:
        return np.array([[0, 0, width, height]], dtype=np.int32)
    tops, rows = _tiling(height, config.size, config.align, config.max_overlap)
    lefts, columns = _tiling(width, config.size, config.align, config.max_overlap)
    shape = (rows.shape[1], columns.shape[1])
    sharp = rows @ sharpness.reshape(shape).astype(np.float64) @ columns.T
    flat = rows @ flatness.reshape(shape).astype(np.float64) @ columns.T
    down, across = np.nonzero((sharp >= config.min_laplacian_variance) & (flat <= config.max_flat_fraction))
    if config.max_per_picture is not None and len(down) > config.max_per_picture:
        best = np.sort(np.argsort(-sharp[down, across], kind="stable")[: config.max_per_picture])
        down, across = down[best], across[best]
    boxes = np.empty((len(down), 4), dtype=np.int32)
    boxes[:, 0], boxes[:, 2] = lefts[across].T
    boxes[:, 1], boxes[:, 3] = tops[down].T
    return boxes


def choose_all_tiles(pictures: pa.Table, config: TileConfig) -> pa.Array:
    """The crops of every picture of a table with :data:`COLUMNS`, :data:`TILES_TYPE` ``[N]``."""
    width, height = (pictures.column(name).to_numpy() for name in ("width", "height"))
    maps = [pictures.column(name).combine_chunks() for name in COLUMNS[2:]]
    edges = [column.offsets.to_numpy() for column in maps]
    cells = [column.values.to_numpy() for column in maps]
    chosen = [np.empty((0, 4), dtype=np.int32)]  # Offsets of a list array begin with 0.
    for i in range(pictures.num_rows):
        sharp, flat = (values[edge[i] : edge[i + 1]] for values, edge in zip(cells, edges))
        chosen.append(choose_tiles(int(width[i]), int(height[i]), sharp, flat, config))
    boxes = np.concatenate(chosen)
    offsets = np.cumsum([len(tiles) for tiles in chosen], dtype=np.int32)
    fields = [pa.array(np.ascontiguousarray(boxes[:, i])) for i in range(4)]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(TILES_TYPE.value_type)))


@functools.lru_cache(maxsize=4096)
def _tiling(length: int, size: int, align: int, max_overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Tiles along one axis: start and length, int ``[T, 2]``, and the share of each in each cell, ``[T, cells]``."""
    edges = cell_edges(length, CELL)
    places = _places(length, size, align, max_overlap)
    return np.array(places), np.stack([_overlap(edges, start, extent) for start, extent in places])


def _places(length: int, size: int, align: int, max_overlap: float) -> list[tuple[int, int]]:
    """Start and length of the tiles along one axis.

    One more than fit when it covers the axis whole and they overlap by a share of ``max_overlap`` at most; else as many
    as fit, side by side, in the middle.
    """
    if length <= size:
        return [(0, length)]
    count = -(-length // size)
    if (count * size - length) / (count - 1) <= max_overlap * size:
        return [(i * (length - size) // (count - 1) // align * align, size) for i in range(count)]
    count = length // size
    start = (length - count * size) // 2 // align * align
    return [(start + i * size, size) for i in range(count)]


def _overlap(edges: np.ndarray, start: int, length: int) -> np.ndarray:
    """Share of ``[start, start + length)`` that lies in each cell; sums to 1."""
    low, high = np.maximum(edges[:-1], start), np.minimum(edges[1:], start + length)
    return np.maximum(high - low, 0) / length
