"""Which pictures are copies of a better one: the same file, the same pixels, or nearly the same picture."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from datagen.config import SelectConfig
from datagen.picture.perceptual_hash import THUMB, orient
from datagen.select.neighbours import ORIENTATIONS, near_pairs_among

# Grey thumbnails, 32x32 bytes row by row, of inventory rows, int64 ascending; None where one was taken down.
Thumbs = Callable[[np.ndarray], list[bytes | None]]

_PIXELS = THUMB * THUMB
_THUMBS_AT_A_TIME = 16384
_KEPT_AT_A_TIME = 256
# Bits at which two hashes alone say that it is the same picture: of 400 photographs, resized or encoded again, most
# copies lie within 2 and all within 4, and no two different ones within 11.
_HASH_ALONE = 4


@dataclass(frozen=True)
class Candidates:
    """Pictures that nothing has rejected, and what decides between copies: struct of arrays ``[K]``."""

    row: np.ndarray  # int64, position in the inventory
    batch: np.ndarray  # int32
    width: np.ndarray  # int32, pixels
    height: np.ndarray  # int32
    jpeg_quality: np.ndarray  # float32, NaN unless JPEG
    bits_per_pixel: np.ndarray  # float32
    sha256: np.ndarray  # uint64 [K, 2], of the file: hash_keys
    pixel_sha256: np.ndarray  # uint64 [K, 2]
    phash: np.ndarray  # uint64 [K, 8], by orientation

    def take(self, positions: np.ndarray) -> "Candidates":
        """Those at some positions, or where a mask is true."""
        return Candidates(*(values[positions] for values in vars(self).values()))


@dataclass(frozen=True)
class Copies:
    """Rejected candidates and what they repeat, struct of arrays ``[D]``; positions among the candidates."""

    copy: np.ndarray  # int64
    keeper: np.ndarray  # int64
    distance: np.ndarray  # int32, bits of 64
    correlation: np.ndarray  # float32, of the thumbnails; NaN where one is missing, or none was needed
    same_file: np.ndarray  # bool

    def take(self, positions: np.ndarray) -> "Copies":
        """Those at some positions, or where a mask is true."""
        return Copies(*(values[positions] for values in vars(self).values()))


def hash_keys(sha256: pa.ChunkedArray) -> np.ndarray:
    """The first 128 bits of hex sha256 digests, uint64 ``[N, 2]``: as good as unique, in a quarter of the memory."""
    digests = np.frombuffer(bytes.fromhex("".join(sha256.to_pylist())), dtype=">u8").reshape(-1, 4)
    return digests[:, :2].astype(np.uint64)


def from_the_best_down(candidates: Candidates) -> Candidates:
    """In the order of who is kept: earlier batch, larger, better, first.

    Better is the higher JPEG quality, lossless above all, then more bits per pixel. Batches come first so that what a
    finished dataset holds never depends on pictures added later.
    """
    pixels = candidates.width.astype(np.int64) * candidates.height
    quality = np.nan_to_num(candidates.jpeg_quality, nan=101.0)
    keys = (candidates.row, -candidates.bits_per_pixel, -quality, -pixels, candidates.batch)
    return candidates.take(np.lexsort(keys))


def exact_copies(ranked: Candidates) -> Copies:
    """Candidates, given from the best down, whose file or decoded pixels an earlier one has too."""
    by_file = _first_alike(*ranked.sha256.T)
    # The digest of pixels is of their bytes alone, so a picture of another shape could have it too.
    keeper = np.minimum(by_file, _first_alike(*ranked.pixel_sha256.T, ranked.width))
    while (keeper[keeper] != keeper).any():
        keeper = keeper[keeper]
    copy = np.flatnonzero(keeper != np.arange(len(keeper)))
    return Copies(
        copy=copy,
        keeper=keeper[copy],
        distance=np.zeros(len(copy), dtype=np.int32),
        correlation=np.full(len(copy), np.nan, dtype=np.float32),
        same_file=by_file[copy] == by_file[keeper[copy]],
    )


def near_copies(ranked: Candidates, thumbs: Thumbs, config: SelectConfig) -> Copies:
    """Candidates, given from the best down, that resemble an earlier, kept one.

    Near by hash under a flip or rotation, confirmed on thumbnails. A picture is compared with kept ones only, so that
    chains of likeness do not grow. Where a thumbnail is missing (taken down) the hash alone decides, within
    ``_HASH_ALONE`` bits. The thumbnails lie in a temporary file, of which the system keeps in memory what there is room
    for.
    """
    group, pairs = near_pairs_among(ranked.phash, config.duplicate_radius)
    size = np.bincount(group, minlength=len(group))
    paired = np.zeros(len(group), dtype=bool)
    paired[pairs[:, :2]] = True
    involved = np.flatnonzero((size[group] > 1) | paired[group])
    # From here on pictures and groups, named by their first, are places among those involved.
    shared = size[involved] > 1
    groups = np.searchsorted(involved, group[involved])
    neighbours = _Neighbours(np.searchsorted(involved, pairs[:, :2]), pairs[:, 2:], len(involved))
    del pairs, group, size, paired
    found: list[tuple[int, int, int, float]] = []
    if len(involved):
        with tempfile.TemporaryFile() as file:
            grey = np.memmap(file, np.uint8, "w+", shape=(len(involved), _PIXELS)).view(np.ndarray)
            there = _load(grey, ranked.row[involved], thumbs)
            alone = np.zeros(len(involved), dtype=bool)  # kept, the one picture of its group
            kept: dict[int, list[int]] = collections.defaultdict(list)  # of groups of several
            for place, name in enumerate(groups.tolist()):
                rivals = [(rival, 0, 0) for rival in kept.get(name, ())]
                for other, turn, distance in neighbours.of(name):
                    if alone[other]:
                        rivals.append((other, turn, distance))
                    else:
                        rivals += [(rival, turn, distance) for rival in kept.get(other, ())]
                match = _first_like(place, sorted(rivals), grey, there, config.duplicate_correlation)
                if match:
                    found.append((place, *match))
                elif shared[name]:
                    kept[name].append(place)
                else:
                    alone[place] = True
    columns = np.array(found, dtype=np.float64).reshape(-1, 4)
    return Copies(
        copy=involved[columns[:, 0].astype(np.int64)],
        keeper=involved[columns[:, 1].astype(np.int64)],
        distance=columns[:, 2].astype(np.int32),
        correlation=columns[:, 3].astype(np.float32),
        same_file=np.zeros(len(found), dtype=bool),
    )


def _first_alike(*keys: np.ndarray) -> np.ndarray:
    """For each position the first one with the same keys."""
    order = np.lexsort(keys)
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(fresh)[np.cumsum(fresh) - 1]]
    return first


class _Neighbours:
    """Of each group the others near to it, in 10 bytes each way: chance pairs grow with the square of the pictures."""

    def __init__(self, pairs: np.ndarray, told: np.ndarray, groups: int) -> None:
        """
        Args:
            pairs: int64 [K, 2], groups.
            told: int64 [K, 2], orientation of the first of a pair and distance.
        """
        owner = pairs.T.reshape(-1)
        order = np.argsort(owner, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=groups))])
        self._others = pairs[:, ::-1].T.reshape(-1)[order]
        orientation, distance = told.astype(np.uint8).T
        self._turns = np.concatenate([orientation, ORIENTATIONS + orientation])[order]
        self._distances = np.concatenate([distance, distance])[order]

    def of(self, group: int) -> Iterator[tuple[int, int, int]]:
        """(group, how to turn a member of this one to match it, distance)."""
        some = slice(self._starts[group], self._starts[group + 1])
        return zip(self._others[some].tolist(), self._turns[some].tolist(), self._distances[some].tolist())


def _turns() -> np.ndarray:
    """Pixel places, ``[16, 1024]``: the eight orientations, then what undoes each."""
    places = np.arange(_PIXELS).reshape(THUMB, THUMB)
    turns = np.stack([orient(places, orientation).reshape(-1) for orientation in range(ORIENTATIONS)])
    return np.concatenate([turns, np.argsort(turns, axis=1)])


_TURNS = _turns()


def _load(grey: np.ndarray, rows: np.ndarray, thumbs: Thumbs) -> np.ndarray:
    """Fill ``grey``, uint8 ``[K, 1024]``, with the thumbnails of rows in any order; bool ``[K]`` where there is one."""
    there = np.zeros(len(rows), dtype=bool)
    order = np.argsort(rows)  # Neighbours in the inventory lie in one part of it.
    for start in range(0, len(order), _THUMBS_AT_A_TIME):
        places = order[start : start + _THUMBS_AT_A_TIME]
        for place, thumb in zip(places, thumbs(rows[places])):
            if thumb is not None:
                grey[place], there[place] = np.frombuffer(thumb, dtype=np.uint8), True
    return there


def _first_like(
    place: int, rivals: list[tuple[int, int, int]], grey: np.ndarray, there: np.ndarray, least: float
) -> tuple[int, int, float] | None:
    """The first of the rivals (place, turn, distance) that a thumbnail confirms: (place, distance, correlation)."""
    for start in range(0, len(rivals), _KEPT_AT_A_TIME):
        some = rivals[start : start + _KEPT_AT_A_TIME]
        places = np.array([rival for rival, _, _ in some])
        likeness = _correlations(grey[place][_TURNS[[turn for _, turn, _ in some]]], grey[places])
        likeness[~(there[places] & there[place])] = np.nan
        by_hash = np.isnan(likeness) & (np.array([bits for _, _, bits in some]) <= _HASH_ALONE)
        confirmed = np.flatnonzero((likeness >= least) | by_hash)
        if len(confirmed):
            rival, _, distance = some[confirmed[0]]
            return rival, distance, float(likeness[confirmed[0]])
    return None


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Normalised correlation of each row, of uint8 ``[K, pixels]``; 0 where either is constant.

    The sums are of integers below 2^53, so their order does not matter: the same on any machine.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    count, sum_a, sum_b = a.shape[1], a.sum(axis=1), b.sum(axis=1)
    spread_a = count * np.einsum("ij,ij->i", a, a) - sum_a**2
    spread_b = count * np.einsum("ij,ij->i", b, b) - sum_b**2
    norm = np.sqrt(spread_a * spread_b)
    covariance = count * np.einsum("ij,ij->i", a, b) - sum_a * sum_b
    return np.divide(covariance, norm, out=np.zeros_like(norm), where=norm > 0)
