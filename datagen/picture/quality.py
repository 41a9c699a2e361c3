"""Measures of a picture's usefulness as a clean training target.

All are taken on the BT.601 luma at the picture's own pixels (values 0..255), because training reads crops of those
very pixels: a picture that is sharp only after shrinking is blurred to the network. Cells of the quality map are
``CELL`` pixels square (the last row and column take up the remainder), so that any tile's quality can be read from
the inventory without decoding again.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

CELL = 128
# |Sobel_x| + |Sobel_y| below this is flat: the 3x3 kernel answers 8 to a ramp of one level a pixel.
_FLAT_GRADIENT = 16
_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)


WHOLE_PICTURE_MEASURES = (
    *("laplacian_variance", "flat_fraction", "blockiness", "entropy", "noise", "overexposed", "underexposed"),
)


@dataclass(frozen=True)
class CellMap:
    """Per-cell measures, both ``[rows, columns]`` float32; ``cell`` is the cell's side in pixels."""

    cell: int
    laplacian_variance: np.ndarray
    flat_fraction: np.ndarray


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
    """Measure a luma picture, uint8 ``[H, W]`` with H, W >= 16.

    - laplacian_variance: variance of the 4-neighbour Laplacian, in squared levels; low means blurred.
    - flat_fraction: share of pixels (0..1) whose 3x3 Sobel L1 magnitude is under 16.
    - blockiness: mean absolute step across the strongest 8-pixel column or row phase over the mean of the other
      phases; 1 without block edges, whatever the offset at which the picture was cropped.
    - entropy: of the 256-bin histogram, in bits (0..8).
    - noise: standard deviation in levels by Immerkaer's operator (CVIU 64(2), 1996), the lowest decile over the cells,
      since texture counts as noise wherever there is texture.
    - overexposed, underexposed: share of pixels at 254..255 and at 0..1.
    """
    laplacian = cv2.Laplacian(grey, cv2.CV_16S)
    gradient_x, gradient_y = cv2.spatialGradient(grey)
    flat = (cv2.add(np.abs(gradient_x), np.abs(gradient_y)) < _FLAT_GRADIENT).view(np.uint8)
    # Integers up to 2040: exact in 16 bits, and the sums do not depend on the order of addition.
    residual = np.abs(cv2.filter2D(grey, cv2.CV_16S, _IMMERKAER))
    histogram = np.bincount(grey.reshape(-1), minlength=256)
    cells, noise = _cell_map(laplacian, flat, residual, cell)
    return Measures(
        laplacian_variance=_variance(laplacian),
        flat_fraction=cv2.countNonZero(flat) / flat.size,
        blockiness=max(_phase_ratio(grey, axis) for axis in (0, 1)),
        entropy=_entropy(histogram),
        noise=noise,
        overexposed=float(histogram[254:].sum() / grey.size),
        underexposed=float(histogram[:2].sum() / grey.size),
        cells=cells,
    )


def _cell_map(laplacian: np.ndarray, flat: np.ndarray, residual: np.ndarray, cell: int) -> tuple[CellMap, float]:
    rows, columns = cell_edges(laplacian.shape[0], cell), cell_edges(laplacian.shape[1], cell)
    sharp = np.empty((len(rows) - 1, len(columns) - 1), dtype=np.float32)
    plain, noise = np.empty_like(sharp), np.empty_like(sharp)
    for i in range(len(rows) - 1):
        for j in range(len(columns) - 1):
            box = np.s_[rows[i] : rows[i + 1], columns[j] : columns[j + 1]]
            sharp[i, j] = _variance(laplacian[box])
            plain[i, j] = cv2.countNonZero(flat[box]) / flat[box].size
            noise[i, j] = cv2.mean(residual[box])[0]
    level = float(np.percentile(noise, 10, method="lower")) * math.sqrt(math.pi / 2) / 6
    return CellMap(cell, sharp, plain), level


def cell_edges(length: int, cell: int) -> np.ndarray:
    """Edges of the cells along one axis, int ``[count + 1]``; the last cell takes up the remainder."""
    edges = np.arange(max(1, length // cell) + 1) * cell
    edges[-1] = length
    return edges


def _variance(values: np.ndarray) -> float:
    return float(cv2.meanStdDev(values)[1][0, 0]) ** 2


def _entropy(histogram: np.ndarray) -> float:
    share = histogram[histogram > 0] / histogram.sum()
    return float(-(share * np.log2(share)).sum())


def _phase_ratio(grey: np.ndarray, axis: int) -> float:
    if axis == 0:
        steps = cv2.absdiff(grey[1:], grey[:-1])
    else:
        steps = cv2.absdiff(grey[:, 1:], grey[:, :-1])
    profile = cv2.reduce(steps, 1 - axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).reshape(-1)
    whole = profile[: profile.size // 8 * 8].reshape(-1, 8).mean(axis=0, dtype=np.float64)
    strongest = whole.max()
    rest = (whole.sum() - strongest) / 7
    return float(strongest / rest) if rest > 0 else 1.0
