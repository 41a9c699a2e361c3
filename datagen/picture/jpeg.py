"""The compression history that a JPEG's quantisation tables tell."""

from collections.abc import Mapping, Sequence

import numpy as np

# ITU-T T.81 (1992), table K.1: the luma table that the Independent JPEG Group scales with its quality.
_K1 = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


def _scaled_tables() -> np.ndarray:
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((_K1.reshape(1, 64) * scale[:, None] + 50) // 100, 1, 255)


_TABLES = _scaled_tables()


def estimate_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """IJG quality 1..100 whose luma table lies nearest (L1) to table 0 of a JPEG header.

    Args:
        tables: quantisation tables by id, 64 values each in row order, as ``PIL.Image.Image.quantization`` gives them.

    Cameras and editors use tables of their own; for those the figure is the nearest IJG equivalent.
    """
    luma = np.asarray(tables[min(tables)])
    return int(np.abs(_TABLES - luma).sum(axis=1).argmin()) + 1
