"""64-bit DCT hashes of a picture in its eight orientations, and the search for hashes that lie near each other.

The hash is the sign of the 8x8 lowest DCT-II coefficients of a 32x32 luma thumbnail against their median (the "pHash"
of Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010). A flip of the picture only
changes signs of coefficients and a transposition only transposes them, so one DCT gives all eight hashes.
"""

from collections.abc import Iterator

import cv2
import numpy as np

THUMB = 32
ORIENTATIONS = 8
_BANDS, _BAND_BITS = 4, 16
MAX_RADIUS = 2 * _BANDS - 1


def grey_thumb(grey: np.ndarray) -> np.ndarray:
    """The whole picture squeezed to uint8 ``[32, 32]`` by area means, whatever its aspect ratio."""
    return cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA)


def orient(thumb: np.ndarray, orientation: int) -> np.ndarray:
    """One of the eight flips and rotations of ``[H, W]``: bit 0 mirrors columns, bit 1 rows, bit 2 transposes after."""
    if orientation & 1:
        thumb = thumb[:, ::-1]
    if orientation & 2:
        thumb = thumb[::-1]
    return thumb.T if orientation & 4 else thumb


def hashes(thumb: np.ndarray) -> np.ndarray:
    """Hashes, uint64 ``[8]``, of ``orient(thumb, o)`` for each orientation o, of a uint8 ``[32, 32]`` thumbnail."""
    low = cv2.dct(thumb.astype(np.float32))[:8, :8]
    odd = np.where(np.arange(8) % 2, -1.0, 1.0).astype(np.float32)
    result = np.empty(ORIENTATIONS, dtype=np.uint64)
    for orientation in range(ORIENTATIONS):
        turned = low
        if orientation & 1:
            turned = turned * odd
        if orientation & 2:
            turned = turned * odd[:, None]
        if orientation & 4:
            turned = turned.T
        # The first coefficient is the mean brightness, which says nothing of the content; its bit stays 0.
        values = turned.reshape(-1)[1:]
        bits = np.concatenate([[False], values > np.median(values)])
        result[orientation] = np.packbits(bits).view(">u8")[0]
    return result


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Normalised correlation, -1..1, of two thumbnails of equal shape; 0 when either is constant."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def near_pairs(queries: np.ndarray, base: np.ndarray, radius: int) -> np.ndarray:
    """Every pair whose hashes differ in at most ``radius`` bits under some orientation of the query.

    Exact multi-index hashing (Norouzi, Punjani & Fleet, CVPR 2012): of four 16-bit bands at least one differs in at
    most ``radius // 4`` bits, so only the buckets that near to the query's are compared in full.

    Args:
        queries: uint64 ``[N, 8]``, all orientations of each query.
        base: uint64 ``[M]``, the upright hashes searched.
        radius: 0..7.

    Returns:
        int64 ``[K, 4]`` rows (query, base index, orientation, distance), one row per pair, the nearest orientation
        (the first of equals), sorted by query and base index.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius must be 0..{MAX_RADIUS}, got {radius}")
    found = [np.empty((0, 4), dtype=np.int64)]
    flat = queries.reshape(-1)
    for band in range(_BANDS):
        shift, mask = np.uint64(band * _BAND_BITS), np.uint64((1 << _BAND_BITS) - 1)
        base_band = ((base >> shift) & mask).astype(np.int64)
        order = np.argsort(base_band, kind="stable")
        buckets = base_band[order]
        query_band = ((flat >> shift) & mask).astype(np.int64)
        for flip in _flips(radius // _BANDS):
            first = np.searchsorted(buckets, query_band ^ flip, side="left")
            count = np.searchsorted(buckets, query_band ^ flip, side="right") - first
            query = np.repeat(np.arange(flat.size), count)
            within = np.arange(query.size) - np.repeat(np.cumsum(count) - count, count)
            candidate = order[np.repeat(first, count) + within]
            distance = np.bitwise_count(flat[query] ^ base[candidate]).astype(np.int64)
            near = distance <= radius
            rows = (query[near] // ORIENTATIONS, candidate[near], query[near] % ORIENTATIONS, distance[near])
            found.append(np.stack(rows, axis=1))
    pairs = np.concatenate(found)
    pairs = pairs[np.lexsort((pairs[:, 2], pairs[:, 3], pairs[:, 1], pairs[:, 0]))]
    if not len(pairs):
        return pairs
    fresh = np.concatenate([[True], (pairs[1:, :2] != pairs[:-1, :2]).any(axis=1)])
    return pairs[fresh]


def _flips(bits: int) -> Iterator[int]:
    yield 0
    if bits:
        yield from (1 << bit for bit in range(_BAND_BITS))
