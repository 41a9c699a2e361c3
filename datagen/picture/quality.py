"""Measures of a picture's usefulness as a clean training target.

All are taken on the BT.601 luma at the picture's own pixels (values 0..255), because training reads crops of those
very pixels: a picture that is sharp only after shrinking is blurred to the network. Cells of the quality map are
``CELL`` pixels square (the last row and column take up the remainder), so that any tile's quality can be read from
the inventory without decoding again.

The work goes by strips of one cell row, which keeps the 16-bit intermediates in cache. All that is summed over pixels
is an integer, so the figures do not depend on how the picture was cut up.
"""

import itertools
import math
from dataclasses import dataclass

import cv2
import numpy as np

CELL = 128
# |Sobel_x| + |Sobel_y| below this is flat: the 3x3 kernel answers 8 to a ramp of one level a pixel.
_FLAT_GRADIENT = 16
# Pixels from one block edge of a JPEG to the next.
_PHASES = 8
# From the mean absolute response of Immerkaer's operator to the standard deviation of Gaussian noise.
_RESPONSE_TO_SIGMA = math.sqrt(math.pi / 2) / 6

WHOLE_PICTURE_MEASURES = (
    *("laplacian_variance", "flat_fraction", "blockiness", "entropy", "noise", "overexposed", "underexposed"),
)


@dataclass(frozen=True)
class CellMap:
    """The measures of every cell, each ``[rows, columns]`` float32; ``cell`` is the cell's side in pixels."""

    cell: int
    laplacian_variance: np.ndarray
    flat_fraction: np.ndarray
    blockiness: np.ndarray
    entropy: np.ndarray
    noise: np.ndarray
    overexposed: np.ndarray
    underexposed: np.ndarray


@dataclass(frozen=True)
class Measures:
    """Whole-picture measures; see :func:`measure` for the definition of each."""

    laplacian_variance: float
    flat_fraction: float
    blockiness: float
    entropy: float
    noise: float
    overexposed: float
    underexposed: float
    cells: CellMap


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma, uint8 ``[H, W]``, of uint8 RGB ``[H, W, 3]``."""
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


def measure(grey: np.ndarray, cell: int = CELL) -> Measures:
    """Measure a luma picture, uint8 ``[H, W]`` with H, W >= 16, as a whole and in cells of ``cell`` pixels.

    - laplacian_variance: variance of the 4-neighbour Laplacian, in squared levels; low means blurred.
    - flat_fraction: share of pixels (0..1) whose 3x3 Sobel L1 magnitude is under 16.
    - blockiness: mean absolute step across the strongest 8-pixel column or row phase over the mean of the other
      phases; 1 without block edges, whatever the offset at which the picture was cropped. A step belongs to the cell
      of its left or upper pixel; the last ones, short of a whole group of 8, are left out.
    - entropy: of the 256-bin histogram, in bits (0..8).
    - noise: standard deviation in levels by Immerkaer's operator (CVIU 64(2), 1996). The picture's is the lowest
      decile over its cells, since texture counts as noise wherever there is texture.
    - overexposed, underexposed: share of pixels at 254..255 and at 0..1.

    The 3x3 operators see past the borders of a cell, and reflect at those of the picture without doubling its edge.

    Raises:
        ValueError: ``cell`` is no multiple of 8 from 16 on, or a side of the picture is below 16 pixels.
    """
    if cell < 2 * _PHASES or cell % _PHASES:
        raise ValueError(f"cell must be a multiple of {_PHASES} pixels and at least two, got {cell}")
    if min(grey.shape) < 2 * _PHASES:
        raise ValueError(f"the smaller side must be at least {2 * _PHASES} pixels, got {grey.shape}")
    rows, columns = cell_edges(grey.shape[0], cell), cell_edges(grey.shape[1], cell)
    shape = (len(rows) - 1, len(columns) - 1)
    sums = np.empty((4, *shape))
    steps = np.empty((2, _PHASES, *shape))
    histograms = np.empty((*shape, 256), dtype=np.float32)
    tallest = rows[-1] - rows[-2]
    wide = np.empty((3, tallest + 2, grey.shape[1] + 2), dtype=np.int16)
    narrow = np.empty((tallest, grey.shape[1]), dtype=np.int16)
    for i, (top, bottom) in enumerate(itertools.pairwise(rows)):
        sums[:, i] = np.add.reduceat(_column_sums(grey, top, bottom, wide, narrow), columns[:-1], axis=1)
        steps[0, :, i] = _steps_along_rows(grey[top:bottom], columns)
        steps[1, :, i] = _steps_along_columns(grey[top : bottom + 1], columns)
        for j in range(shape[1]):
            box = grey[top:bottom, columns[j] : columns[j + 1]]
            histograms[i, j] = cv2.calcHist([box], [0], None, [256], [0, 256]).reshape(-1)
    area = np.diff(rows)[:, None] * np.diff(columns)
    cells = _figures(sums, steps, histograms, area)
    whole_histogram = histograms.sum(axis=(0, 1), dtype=np.float64)
    whole = _figures(sums.sum(axis=(1, 2)), steps.sum(axis=(2, 3)), whole_histogram, np.array(grey.size))
    noise = np.sort(cells["noise"], axis=None)
    whole["noise"] = noise[(noise.size - 1) // 10]
    return Measures(
        **{name: float(value) for name, value in whole.items()},
        cells=CellMap(cell, **{name: value.astype(np.float32) for name, value in cells.items()}),
    )


def cell_edges(length: int, cell: int) -> np.ndarray:
    """Edges of the cells along one axis, int ``[count + 1]``; the last cell takes up the remainder."""
    edges = np.arange(max(1, length // cell) + 1) * cell
    edges[-1] = length
    return edges


def _column_sums(grey: np.ndarray, top: int, bottom: int, wide: np.ndarray, narrow: np.ndarray) -> np.ndarray:
    """Sums over rows ``top..bottom``, float64 ``[4, W]``: Laplacian, its square, abs. Immerkaer response, flatness.

    With v the vertical second difference and h the horizontal one, the Laplacian is v + h and Immerkaer's mask, which
    is [1, -2, 1] times its transpose, is h of v: ten additions of 16 bits make both. The largest value is 2040.
    """
    above, below = int(top == 0), int(bottom == grey.shape[0])
    strip = cv2.copyMakeBorder(grey[top - 1 + above : bottom + 1 - below], above, below, 1, 1, cv2.BORDER_REFLECT_101)
    level, other, vertical = (buffer[: bottom - top + 2] for buffer in wide)
    result = narrow[: bottom - top]
    np.copyto(level, strip)
    # cv2, because numpy is three times slower on such views, which begin at odd addresses.
    twice = cv2.add(level[1:-1], level[1:-1], dst=other[1:-1])
    vertical = cv2.add(level[:-2], level[2:], dst=vertical[1:-1])
    vertical = cv2.subtract(vertical, twice, dst=vertical)
    middle = vertical[:, 1:-1]
    cv2.add(vertical[:, :-2], vertical[:, 2:], dst=result)
    cv2.subtract(result, middle, dst=result)
    cv2.absdiff(result, middle, dst=result)
    noise = cv2.reduce(result, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32F)
    cv2.add(level[1:-1, :-2], level[1:-1, 2:], dst=result)
    cv2.subtract(result, twice[:, 1:-1], dst=result)
    cv2.add(result, middle, dst=result)
    plain = cv2.reduce(result, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32F)
    square = cv2.reduce(result, 0, cv2.REDUCE_SUM2, dtype=cv2.CV_64F)
    across, down = cv2.spatialGradient(strip, dx=level, dy=other)
    magnitude = cv2.add(np.abs(across, out=across), np.abs(down, out=down), dst=across)
    flat = (magnitude < _FLAT_GRADIENT).view(np.uint8)[1:-1, 1:-1]
    count = cv2.reduce(flat, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    return np.stack([sums.reshape(-1) for sums in (plain, square, noise, count)], dtype=np.float64)


def _steps_along_rows(strip: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Absolute steps from column to column by phase and cell, float64 ``[8, columns]``."""
    profile = cv2.reduce(cv2.absdiff(strip[:, 1:], strip[:, :-1]), 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S).reshape(-1)
    groups = profile[: profile.size // _PHASES * _PHASES].reshape(-1, _PHASES)
    return np.add.reduceat(groups, columns[:-1] // _PHASES, axis=0, dtype=np.float64).T


def _steps_along_columns(strip: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Absolute steps from row to row by phase and cell, float64 ``[8, columns]``; ``strip`` has one row more."""
    steps = cv2.absdiff(strip[1:], strip[:-1])
    groups = steps[: len(steps) // _PHASES * _PHASES].reshape(-1, _PHASES * strip.shape[1])
    profile = cv2.reduce(groups, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S).reshape(_PHASES, -1)
    return np.add.reduceat(profile, columns[:-1], axis=1, dtype=np.float64)


def _figures(sums: np.ndarray, steps: np.ndarray, histogram: np.ndarray, area: np.ndarray) -> dict[str, np.ndarray]:
    """The measures from what was summed: ``sums [4, ...]``, ``steps [2, 8, ...]``, ``histogram [..., 256]``."""
    laplacian, square, response, flat = sums / area
    strongest = steps.max(axis=1)
    rest = (steps.sum(axis=1) - strongest) / (_PHASES - 1)
    # Entropy as log2 n - sum(h log2 h) / n needs no division of every bin.
    spread = np.einsum("...i,...i->...", histogram, np.log2(np.maximum(histogram, 1)))
    return {
        "laplacian_variance": square - laplacian**2,
        "flat_fraction": flat,
        "blockiness": np.divide(strongest, rest, out=np.ones_like(rest), where=rest > 0).max(axis=0),
        "entropy": np.maximum(np.log2(area) - spread / area, 0),
        "noise": response * _RESPONSE_TO_SIGMA,
        "overexposed": histogram[..., 254:].sum(axis=-1) / area,
        "underexposed": histogram[..., :2].sum(axis=-1) / area,
    }
