"""The leak guard: which pictures of a corpus are near copies of evaluation pictures, or crops of them, or contain them.

Nothing but the inventory is read. A copy of the whole picture has a near hash. For a crop, the windows that it may show
are hashed in the evaluation picture's thumbnail and looked up in the corpus, so that the corpus needs two hashes a
picture whatever the crop: a corpus picture that is a crop shows some window of the evaluation picture as a whole, and
one that holds the evaluation picture as a crop of at least 3/4 of each side shows, in its own centre [1/4, 3/4], some
window of the evaluation picture. What the hashes propose is aligned and compared on the thumbnails' pixels.

A window is given by its edges on both axes, in units of the picture; hashing them is separable, so that all windows of
a picture are two matrix products. Between the grid and the true edges lies up to half a step, which turns some bits of
the hash: those that were near to turning. So the lookup is by the low frequencies, that move the least, exactly, under
every turn of those ``_DOUBTFUL`` bits that lie nearest to the median (query-directed probing, Lv, Josephson, Wang,
Charikar & Li, "Multi-Probe LSH", VLDB 2007), and all bits must agree but for ``_CROP_RADIUS``. The figures were chosen
by the recall and the false proposals that ``benchmarks/datagen_leaks.py`` prints.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from datagen.config import SelectConfig
from datagen.picture.perceptual_hash import THUMB, orient
from datagen.select.neighbours import near_pairs

MIN_SIDE = 0.75  # The share of each side that a crop keeps, at the least, to be looked for.

# Steps from a crop of MIN_SIDE to the whole, an axis: (8 + 1)(8 + 2)/2 = 45 spans, squared for two axes. The centre of
# a picture is the smaller window, in which a step is larger.
_CROP_STEPS, _CONTAINED_STEPS = 8, 10
_DOUBTFUL = 6
_CROP_RADIUS = 8  # Hashes have equally many ones, so distances are even.
_MIN_CONTRAST = 2.0  # Grey levels: the hash of a flatter window is noise.

_FREQUENCY = np.add.outer(np.arange(8), np.arange(8)).reshape(-1)
_LOW = np.flatnonzero((_FREQUENCY > 0) & (_FREQUENCY <= 6))  # 27 bits, as many under transposition.
_BIT = np.uint64(1) << np.arange(63, -1, -1).astype(np.uint64)
_LOW_MASK = np.bitwise_or.reduce(_BIT[_LOW])
_TRANSPOSED = np.arange(64).reshape(8, 8).T.reshape(-1)

# cv2.dct of the unit vectors: float64 [8, 32].
_COSINES = np.stack([cv2.dct(unit)[:8, 0] for unit in np.eye(THUMB)[:, :, None]], axis=1)

_ROWS_AT_ONCE = 1024
_WINDOWS_AT_ONCE = 2048
_COMPARISONS_AT_ONCE = 1 << 20
_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)  # The top bits of a product with it depend on all bits of a key.

# Alignment: pixels of the longer side of the picture that contains the other.
_SIDE = 96
_MIN_OVERLAP = 0.9  # Share of the contained picture that the other covers, once aligned.
_MIN_PLACE = 0.7  # Share of each side that a crop keeps, as aligned: MIN_SIDE less what alignment may miss.
_MAX_SKEW = 0.03
_SCREEN = 0.5  # Correlation of 32x32 pixels before alignment.
_DETAIL_SIGMA = 3.0
_LUMA_CONTRAST, _DETAIL_CONTRAST = 0.5, 1.5  # Standard deviation, grey levels: less is noise.
_DETAIL_CORRELATION = 0.5
_WHOLE_TOLERANCE = 0.025

_TURNS = (
    *("", ", mirrored", ", mirrored top to bottom", ", rotated by 180 degrees"),
    *(", transposed", ", rotated by 90 degrees to the left", ", rotated by 90 degrees to the right"),
    ", transposed and rotated by 180 degrees",
)


class Match(NamedTuple):
    """A corpus picture that shows an evaluation picture."""

    row: int  # of the corpus
    guard: int  # row of the guard's table
    distance: int  # bits of 64 between the hashes that met
    correlation: float  # of the luma where both overlap, aligned, -1..1; NaN when a thumbnail was taken down
    how: str


class _Proposal(NamedTuple):
    """What the hashes say: the corpus picture, turned into the guard's frame, and the guard overlap like this."""

    row: int
    guard: int
    distance: int
    contains: bool  # the corpus picture contains the guard's
    orientation: int  # of the guard's picture, as in ``perceptual_hash.orient``, to look like the corpus picture
    box: tuple[float, float, float, float]  # x0, x1, y0, y1 of the contained in the containing, guard's frame


def find_leaks(
    phash: np.ndarray,
    center_phash: np.ndarray,
    thumbnails: Callable[[np.ndarray], list[bytes | None]],
    guard: pa.Table,
    config: SelectConfig,
) -> list[Match]:
    """Corpus pictures that are copies of a guard picture under flips, rotations, resizing, encoding and crops.

    Crops, either way round, keep at least 3/4 of each side and are looked for when ``config.leak_crops``. A pair is
    confirmed by a correlation of at least ``config.leak_correlation`` and by its details, since all skies are alike;
    whole pictures that both have none, by the former alone. When either thumbnail was taken down, a hash within
    ``config.leak_radius`` is enough.

    Args:
        phash: uint64 ``[N]``, upright hashes of the whole corpus pictures.
        center_phash: uint64 ``[N]``, ``perceptual_hash.center_hash``.
        thumbnails: gives the inventory's thumbnails of rows int64 ``[K]``, rising, at most 1024 at a time.
        guard: inventory columns verdict, phash, thumbnail; only rows that were measured count.

    Returns:
        At most one match a row, that of the highest correlation (one confirmed on pixels before one that was not, the
        first guard picture of equals), by row.

    Memory: some 30 bytes a corpus picture, 256 MB, 26 kB a guard picture, and some 300 bytes a proposal.
    """
    measured = np.array([v == "measured" for v in guard.column("verdict").to_pylist()], dtype=bool)
    ours = np.flatnonzero(measured)
    if not len(ours) or not len(phash):
        return []
    guard_hashes = np.array(guard.column("phash").take(ours).to_pylist(), dtype=np.uint64)
    pictures = {int(i): _decode(guard.column("thumbnail")[int(i)].as_py()) for i in ours}
    proposals = _propose_wholes(phash, guard_hashes, ours, config.leak_radius)
    if config.leak_crops:
        shown = {i: picture for i, picture in pictures.items() if picture is not None}
        proposals += _propose_crops(phash, shown, contained=False)
        proposals += _propose_crops(center_phash, shown, contained=True)
    return _confirm_all(sorted(proposals), pictures, thumbnails, config.leak_correlation)


# --- proposals by hash ------------------------------------------------------------------------------------------------


def _propose_wholes(phash: np.ndarray, guard_hashes: np.ndarray, ours: np.ndarray, radius: int) -> list[_Proposal]:
    pairs = near_pairs(guard_hashes, phash, radius).tolist()
    return [_Proposal(row, int(ours[i]), d, False, orientation, (0, 1, 0, 1)) for i, row, orientation, d in pairs]


def _propose_crops(base: np.ndarray, pictures: dict[int, np.ndarray], *, contained: bool) -> list[_Proposal]:
    spans = contained_spans(_CONTAINED_STEPS) if contained else crop_spans(_CROP_STEPS)
    index = _Index.of(base)
    proposals = []
    for guard, picture in pictures.items():
        hashes, doubtful, windows = window_hashes(picture, spans)
        rows, found, distances = index.search(hashes, doubtful)
        for row, k, distance in zip(rows.tolist(), found.tolist(), distances.tolist()):
            orientation, window = divmod(int(windows[k]), len(spans) ** 2)
            down, across = spans[window // len(spans)], spans[window % len(spans)]
            box = (*across.tolist(), *down.tolist())
            if contained:
                box = (*_seen_from_outside(*across.tolist()), *_seen_from_outside(*down.tolist()))
            proposals.append(_Proposal(row, guard, distance, contained, orientation, box))
    return proposals


def crop_spans(steps: int) -> np.ndarray:
    """Where a crop of at least MIN_SIDE may begin and end on an axis: float64 ``[K, 2]``, 0..1."""
    lost = 1 - MIN_SIDE
    return np.array([(lost * i / steps, 1 - lost * j / steps) for i in range(steps + 1) for j in range(steps + 1 - i)])


def contained_spans(steps: int) -> np.ndarray:
    """Where the middle [1/4, 3/4] of a picture may lie, on an axis, in a crop of it: float64 ``[K, 2]``, 0..1."""
    crops = crop_spans(steps)
    start, size = crops[:, :1], crops[:, 1:] - crops[:, :1]
    return (np.array([0.25, 0.75]) - start) / size


def _seen_from_outside(start: float, stop: float) -> tuple[float, float]:
    """The crop's own place in the picture whose middle it shows at ``start``..``stop``."""
    size = 0.5 / (stop - start)
    return 0.25 - start * size, 0.25 + (1 - start) * size


def window_hashes(picture: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of all windows of a luma picture, uint8 ``[H, W]``, in eight orientations.

    Args:
        spans: float64 ``[K, 2]``, edges on either axis, 0..1; a window is one for the rows and one for the columns.

    Returns:
        Hashes, uint64 ``[M]``; the ``_DOUBTFUL`` low bits that are the likeliest to turn, uint64
        ``[M, _DOUBTFUL]``; and which they are, int64 ``[M]``, (orientation K + rows) K + columns. M is 8 K² less
        the windows that are flat.
    """
    count = len(spans)
    down, across = (_low_frequencies(spans, length) for length in picture.shape)
    low = (down @ picture.astype(np.float32) @ across.T).reshape(count, 8, count, 8).transpose(0, 2, 1, 3)
    low = np.ascontiguousarray(low).reshape(-1, 64)
    structured = np.flatnonzero((low[:, 1:] ** 2).sum(axis=1) >= (_MIN_CONTRAST * THUMB) ** 2)
    low = low[structured]
    odd = np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    hashes, doubtful = [], []
    for rows in (odd**2, odd):
        for columns in (odd**2, odd):
            values = low * np.outer(rows, columns).reshape(-1)
            values -= np.partition(values[:, 1:], 31, axis=1)[:, 31:32]
            bits = values > 0
            bits[:, 0] = False
            margins = np.abs(values[:, _LOW])
            nearest = _LOW[np.argpartition(margins, _DOUBTFUL - 1, axis=1)[:, :_DOUBTFUL]]
            hashes.append((bits, bits[:, _TRANSPOSED]))
            doubtful.append((nearest, _TRANSPOSED[nearest]))
    turned_bits = np.concatenate([pair[transposed] for transposed in (0, 1) for pair in hashes])
    turned_doubtful = np.concatenate([pair[transposed] for transposed in (0, 1) for pair in doubtful])
    packed = np.packbits(turned_bits, axis=1).view(">u8")[:, 0].astype(np.uint64)
    windows = (np.arange(8)[:, None] * count**2 + structured).reshape(-1)
    return packed, _BIT[turned_doubtful], windows


def _low_frequencies(spans: np.ndarray, length: int) -> np.ndarray:
    """Rows that take ``length`` pixels to 8 cosine coefficients of 32 area means, for each span: ``[8 K, length]``."""
    edges = spans[:, :1] * length + (spans[:, 1:] - spans[:, :1]) * length * np.arange(THUMB + 1) / THUMB
    pixel = np.arange(length)
    overlap = np.minimum(edges[:, 1:, None], pixel + 1) - np.maximum(edges[:, :-1, None], pixel)
    overlap = np.clip(overlap, 0, None)
    means = overlap / overlap.sum(axis=2, keepdims=True)
    return (_COSINES @ means).reshape(-1, length).astype(np.float32)


class _Index(NamedTuple):
    """The corpus hashes by their low bits, and a bitmap that says of most keys that they are not there."""

    base: np.ndarray  # uint64 [N]
    keys: np.ndarray  # uint64 [N], sorted low bits
    order: np.ndarray  # int64 [N], their rows
    present: np.ndarray  # bool [2^slot_bits]
    slot_bits: int

    @classmethod
    def of(cls, base: np.ndarray) -> "_Index":
        keys = base & _LOW_MASK
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        slot_bits = min(28, len(base).bit_length() + 6)
        present = np.zeros(1 << slot_bits, dtype=bool)
        present[(keys * _FIBONACCI) >> np.uint64(64 - slot_bits)] = True
        return cls(base, keys, order, present, slot_bits)

    def search(self, hashes: np.ndarray, doubtful: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, the nearest hash of each (the first of equals) and its distance, int64 ``[R]`` each, by row."""
        near = [np.empty((0, 3), dtype=np.int64)]
        for start in range(0, len(hashes), _WINDOWS_AT_ONCE):
            stop = start + _WINDOWS_AT_ONCE
            found, first, count = self._meet(hashes[start:stop], doubtful[start:stop])
            for which, place in _ranges(first, count):
                row, window = self.order[place], found[which] + start
                distance = np.bitwise_count(hashes[window] ^ self.base[row]).astype(np.int64)
                near.append(np.stack([row, window, distance], axis=1)[distance <= _CROP_RADIUS])
        pairs = np.concatenate(near)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 2], pairs[:, 0]))]
        pairs = pairs[np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))]
        return pairs[:, 0], pairs[:, 1], pairs[:, 2]

    def _meet(self, hashes: np.ndarray, doubtful: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes that have an equal key under some turn of the doubtful bits, and the ranges of ``order`` that do."""
        turns = np.zeros((len(hashes), 1), dtype=np.uint64)
        for bit in doubtful.T:
            turns = np.concatenate([turns, turns | bit[:, None]], axis=1)
        probes = ((hashes & _LOW_MASK)[:, None] ^ turns).reshape(-1)
        slots = ((probes * _FIBONACCI) >> np.uint64(64 - self.slot_bits)).view(np.int64)
        alive = np.flatnonzero(self.present.take(slots))
        wanted = probes[alive]
        first = np.searchsorted(self.keys, wanted)
        there = self.keys.take(first, mode="clip") == wanted
        alive, wanted, first = alive[there], wanted[there], first[there]
        count = np.searchsorted(self.keys, wanted, side="right") - first
        return alive // turns.shape[1], first, count


def _ranges(first: np.ndarray, count: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Members of the ranges ``first[k] .. first[k] + count[k]``, with k, a bounded number at a time."""
    total = np.cumsum(count)
    for start in range(0, int(total[-1]) if len(total) else 0, _COMPARISONS_AT_ONCE):
        member = np.arange(start, min(start + _COMPARISONS_AT_ONCE, int(total[-1])))
        which = np.searchsorted(total, member, side="right")
        yield which, member - (total - count)[which] + first[which]


# --- confirmation on pixels -------------------------------------------------------------------------------------------


def _confirm_all(
    proposals: list[_Proposal],
    pictures: dict[int, np.ndarray | None],
    thumbnails: Callable[[np.ndarray], list[bytes | None]],
    least: float,
) -> list[Match]:
    rows = sorted({proposal.row for proposal in proposals})
    best: dict[int, Match] = {}
    position = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        here = rows[start : start + _ROWS_AT_ONCE]
        decoded = dict(zip(here, map(_decode, thumbnails(np.array(here, dtype=np.int64)))))
        while position < len(proposals) and proposals[position].row <= here[-1]:
            proposal = proposals[position]
            match = _confirm(proposal, pictures[proposal.guard], decoded[proposal.row], least)
            if match:
                best[match.row] = min(best.get(match.row, match), match, key=_rank)
            position += 1
    return [best[row] for row in sorted(best)]


def _rank(match: Match) -> tuple[float, int, int]:
    return (2.0 if np.isnan(match.correlation) else -match.correlation, match.guard, match.distance)


def _confirm(proposal: _Proposal, guard: np.ndarray | None, corpus: np.ndarray | None, least: float) -> Match | None:
    row, guard_row, distance, contains, orientation, box = proposal
    whole = box == (0, 1, 0, 1)
    if guard is None or corpus is None:
        how = f"copy{_TURNS[orientation]}"
        return Match(row, guard_row, distance, float("nan"), how) if whole else None
    turned = _turn_back(corpus, orientation)
    inner, outer = (guard, turned) if contains else (turned, guard)
    aligned = align(inner, outer, box)
    if aligned is None:
        return None
    place, correlation, detail = aligned
    if correlation < least or not (detail >= _DETAIL_CORRELATION or (whole and np.isnan(detail))):
        return None
    return Match(row, guard_row, distance, correlation, _describe(place, contains, orientation))


def align(
    inner: np.ndarray, outer: np.ndarray, box: tuple[float, float, float, float]
) -> tuple[tuple[float, float, float, float], float, float] | None:
    """Refine where ``inner`` lies in ``outer``, both luma uint8 ``[H, W]``, by the enhanced correlation coefficient.

    Evangelidis & Psarakis, "Parametric Image Alignment Using Enhanced Correlation Coefficient Maximization", PAMI 2008.

    Args:
        box: x0, x1, y0, y1 in ``outer``, 0..1, right to some hundredths.

    Returns:
        The refined box; the correlation of luma where both overlap; and that of what is left of both without their low
        frequencies, NaN when hardly anything is. None when they are not alike.
    """
    height, width = outer.shape
    scale = min(1.0, _SIDE / max(outer.shape))
    large = _resize(outer, max(8, round(width * scale)), max(8, round(height * scale)))
    height, width = large.shape
    x0, x1, y0, y1 = box
    small = _resize(inner, max(8, round((x1 - x0) * width)), max(8, round((y1 - y0) * height)))
    # Of pixel indices, whose centres lie half a pixel inwards.
    across, down = (x1 - x0) * width / small.shape[1], (y1 - y0) * height / small.shape[0]
    warp = np.array(
        [[across, 0, x0 * width + across / 2 - 0.5], [0, down, y0 * height + down / 2 - 0.5]], dtype=np.float32
    )
    compared = _compare(small, large, warp)
    if not compared[0] >= _SCREEN:
        return None
    # Two bare pictures have nothing that holds them in place.
    refined = None if np.isnan(compared[1]) else _refine(small, large, warp)
    if refined is not None:
        compared, warp = max((compared, warp), (_compare(small, large, refined), refined), key=lambda pair: pair[0][0])
    correlation, detail, overlap = compared
    return (_place(warp, small.shape, large.shape), correlation, detail) if overlap >= _MIN_OVERLAP else None


def _refine(small: np.ndarray, large: np.ndarray, warp: np.ndarray) -> np.ndarray | None:
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)
    everywhere = np.ones(large.shape, dtype=np.uint8)
    try:
        found = cv2.findTransformECC(small, large, warp.copy(), cv2.MOTION_AFFINE, criteria, everywhere, 5)[1]
    except cv2.error:  # It says so when it does not converge.
        return None
    refined = np.asarray(found)
    skew = max(
        abs(refined[0, 1]) * small.shape[0] / large.shape[1], abs(refined[1, 0]) * small.shape[1] / large.shape[0]
    )
    x0, x1, y0, y1 = _place(refined, small.shape, large.shape)
    return refined if skew <= _MAX_SKEW and min(x1 - x0, y1 - y0) >= _MIN_PLACE else None


def _compare(small: np.ndarray, large: np.ndarray, warp: np.ndarray) -> tuple[float, float, float]:
    """Correlations of luma and details where ``large``, through the warp, covers ``small``; and how much it does."""
    size, flags = small.shape[::-1], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    seen = cv2.warpAffine(large, warp, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.warpAffine(np.ones_like(large), warp, size, flags=flags) > 0.99
    if not covered.any():
        return 0.0, 0.0, 0.0
    details = [picture - cv2.GaussianBlur(picture, (0, 0), _DETAIL_SIGMA) for picture in (small, seen)]
    luma = _correlation(small[covered], seen[covered], _LUMA_CONTRAST)
    detail = _correlation(details[0][covered], details[1][covered], _DETAIL_CONTRAST)
    return luma, detail, float(covered.mean())


def _correlation(first: np.ndarray, second: np.ndarray, least_contrast: float) -> float:
    """-1..1, nearer to 0 when either has a lower standard deviation than the least; NaN when both have."""
    first, second = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    contrasts = [float(np.sqrt((values**2).mean())) for values in (first, second)]
    if max(contrasts) < least_contrast:
        return float("nan")
    return float((first * second).mean()) / (max(contrasts[0], least_contrast) * max(contrasts[1], least_contrast))


def _place(warp: np.ndarray, small: tuple[int, ...], large: tuple[int, ...]) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of the small picture in the large one, 0..1, by the middles of its sides."""
    height, width = small
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    centre = warp[:, :2] @ middle + warp[:, 2] + 0.5
    half = np.array([warp[0, 0] * width / 2, warp[1, 1] * height / 2])
    (x0, y0), (x1, y1) = (centre - half) / large[::-1], (centre + half) / large[::-1]
    return float(x0), float(x1), float(y0), float(y1)


def _describe(place: tuple[float, float, float, float], contains: bool, orientation: int) -> str:
    turn = _TURNS[orientation]
    if max(abs(place[0]), abs(1 - place[1]), abs(place[2]), abs(1 - place[3])) <= _WHOLE_TOLERANCE:
        return f"copy{turn}"
    x0, x1, y0, y1 = np.clip(place, 0, 1).tolist()
    if not contains:
        return f"crop of the evaluation picture ({x0:.2f}..{x1:.2f}, {y0:.2f}..{y1:.2f}){turn}"
    # So far in the frame of the evaluation picture; told in that of the corpus picture, which is at hand.
    if orientation & 1:
        x0, x1 = 1 - x1, 1 - x0
    if orientation & 2:
        y0, y1 = 1 - y1, 1 - y0
    if orientation & 4:
        x0, x1, y0, y1 = y0, y1, x0, x1
    return f"contains the evaluation picture ({x0:.2f}..{x1:.2f}, {y0:.2f}..{y1:.2f}){turn}"


def _turn_back(picture: np.ndarray, orientation: int) -> np.ndarray:
    """What ``orient`` turned into this picture."""
    if orientation & 4:
        picture = picture.T
    return np.ascontiguousarray(orient(picture, orientation & 3))


def _resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = width <= picture.shape[1] and height <= picture.shape[0]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(picture.astype(np.float32), (width, height), interpolation=interpolation)


def _decode(thumbnail: bytes | None) -> np.ndarray | None:
    if thumbnail is None:
        return None
    return cv2.imdecode(np.frombuffer(thumbnail, np.uint8), cv2.IMREAD_GRAYSCALE)
