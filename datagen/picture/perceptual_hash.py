"""64-bit DCT hashes of a picture in its eight orientations, and what shrinks pictures for it.

The hash is the sign of the 8x8 lowest DCT-II coefficients of a 32x32 luma thumbnail against their median (the "pHash"
of Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010). A flip of the picture only
changes signs of coefficients and a transposition only transposes them, so one DCT gives all eight hashes.
"""

import cv2
import numpy as np

THUMB = 32
ORIENTATIONS = 8
# Bits: photographs as near as this may be copies. The nearest innocent pair of the 400 in BSD lies 12 bits apart.
MAX_RADIUS = 7
# What the four flips do to the coefficients: mirrored columns turn the odd ones along a row, mirrored rows the others.
_ODD = np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
_SIGNS = np.stack([np.outer(down, across) for down in (_ODD**2, _ODD) for across in (_ODD**2, _ODD)])


def grey_thumb(grey: np.ndarray) -> np.ndarray:
    """The whole picture squeezed to uint8 ``[32, 32]`` by area means, whatever its aspect ratio."""
    return area_mean(grey, THUMB, THUMB)


def area_mean(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize uint8 ``[H, W]`` or ``[H, W, C]`` by area means to ``height`` x ``width``, of the same type.

    The definition of ``cv2.INTER_AREA``, many times faster where the picture shrinks much: whole rows are summed
    first, as integers, and only what is left of them is weighed. A side that does not shrink is left to cv2.
    """
    rows, columns = picture.shape[:2]
    if height >= rows or width >= columns:
        return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    flat = picture.reshape(rows, -1)
    edges = np.arange(height + 1) * rows / height
    first = np.minimum(edges.astype(np.int64), rows - 1)
    fraction = (edges - first).astype(np.float32)
    sums = np.empty((height, flat.shape[1]), dtype=np.float32)
    for i in range(height):
        # The last edge lies after the last row, which it takes in whole.
        after = first[i + 1] if i < height - 1 else rows
        cv2.reduce(flat[first[i] : after], 0, cv2.REDUCE_SUM, dst=sums[i : i + 1], dtype=cv2.CV_32F)
        if fraction[i]:
            cut = flat[first[i]].astype(np.float32)
            cut *= fraction[i]
            sums[i] -= cut
            sums[i - 1] += cut
    means = cv2.resize(sums.reshape(height, *picture.shape[1:]), (width, height), interpolation=cv2.INTER_AREA)
    return np.rint(means * np.float32(height / rows)).astype(np.uint8)


def orient(thumb: np.ndarray, orientation: int) -> np.ndarray:
    """One of the eight flips and rotations of ``[H, W]``: bit 0 mirrors columns, bit 1 rows, bit 2 transposes after."""
    if orientation & 1:
        thumb = thumb[:, ::-1]
    if orientation & 2:
        thumb = thumb[::-1]
    return thumb.T if orientation & 4 else thumb


def hashes(thumb: np.ndarray) -> np.ndarray:
    """Hashes, uint64 ``[8]``, of ``orient(thumb, o)`` for each orientation o, of a uint8 ``[32, 32]`` thumbnail."""
    low = _low_frequencies(thumb)
    flips = low * _SIGNS
    return _hash(np.concatenate([flips, flips.transpose(0, 2, 1)]))


def center_hash(grey: np.ndarray) -> np.uint64:
    """The upright hash of the window [1/4, 3/4] of both axes (rounded inwards) of a luma picture, uint8 ``[H, W]``.

    A crop that keeps the middle of a picture changes the hash of the whole, and leaves this part of it to be found.
    """
    height, width = grey.shape
    window = grey[-(-height // 4) : height * 3 // 4, -(-width // 4) : width * 3 // 4]
    return _hash(_low_frequencies(grey_thumb(np.ascontiguousarray(window)))[None])[0]


def _low_frequencies(thumb: np.ndarray) -> np.ndarray:
    return cv2.dct(thumb.astype(np.float32))[:8, :8]


def _hash(coefficients: np.ndarray) -> np.ndarray:
    """Hashes, uint64 ``[N]``, of ``[N, 8, 8]`` coefficients."""
    bits = np.zeros((len(coefficients), 64), dtype=bool)
    # The first coefficient is the mean brightness, which says nothing of the content; its bit stays 0.
    values = coefficients.reshape(-1, 64)[:, 1:]
    bits[:, 1:] = values > np.partition(values, 31, axis=1)[:, 31:32]
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised correlation, -1..1, of two thumbnails of equal shape; 0 when either is constant."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0
