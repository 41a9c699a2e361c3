"""Every pair of 64-bit hashes within a Hamming radius: exact, without comparing all with all.

Two hashes that differ in at most r bits agree on a whole half of the bits, for one of 2 (2^r - 1) fixed halves: give
every bit a point of the binary affine space of r dimensions; r points always lie in a common hyperplane, and the bits
outside of it are a half on which the hashes agree (the covering of Pagh, "CoveringLSH: Locality-sensitive hashing
without false negatives", SODA 2016, with hyperplanes that need not pass the origin, so that all halves are equal).
So there is one table a half, keyed by its bits, and only hashes that share a key are compared in full. A key of 32 bits
keeps the groups of equal keys small at hundreds of millions of hashes, where bands of 16 bits make them grow
with the number of hashes and the search with its square.

With fewer hashes fewer tables are cheaper, though their keys are shorter: the bits are split into parts and the radius
among them, since r differences cannot exceed all the shares. :func:`_plan` takes the cheapest split, by the rate of
equal keys in a sample of the hashes themselves, or compares all with all where that is cheaper still.
"""

from collections.abc import Iterator

import numpy as np

ORIENTATIONS = 8
MAX_RADIUS = 12

_BITS = 64
_MAX_PARTS = 3
_CHUNK = 1 << 20  # Pairs worked on at once.
_PIECE = 1 << 16  # Items hashed at once: what fits into the second-level cache.
_CROWD = 1 << 20  # Comparisons within one group of equal keys from which it is searched as a problem of its own.
_SAMPLE = 4096
_SAMPLED_TABLES = 16
# Relative CPU time, about ns: of one index entry, one probe, one comparison by key, one table, one comparison of all.
_ENTRY, _PROBE, _COMPARISON, _TABLE, _BRUTE = 100.0, 30.0, 50.0, 500_000.0, 2.0
# Fibonacci hashing: the top bits of the product depend on all the bits of the key.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(0xFFFFFFFF)
_ALL = ~np.uint64(0)

# Positions in the index, numbers of the items that met them, and the bits in which the two differ.
Met = tuple[np.ndarray, np.ndarray, np.ndarray]


def near_pairs(queries: np.ndarray, base: np.ndarray, radius: int) -> np.ndarray:
    """Every pair whose hashes differ in at most ``radius`` bits under some orientation of the query.

    Args:
        queries: uint64 ``[N, 8]``, all orientations of each query.
        base: uint64 ``[M]``, the upright hashes searched.
        radius: 0..12 bits. Hashes of equally many ones, as nearly all perceptual hashes are, lie an even number of
            bits apart, so an odd radius costs twice as much as the even one below it and finds hardly more.

    Returns:
        int64 ``[K, 4]`` rows (query, base index, orientation, distance), one row per pair, the nearest orientation
        (the first of equals), sorted by query and base index. Equal hashes are searched once, but each has its rows.

    Raises:
        ValueError: the radius, a dtype or a shape is another.

    Memory beyond the arguments and the result (32 bytes a row, three times that while it is sorted): about 40 bytes a
    hash of the smaller side, 10 of the larger, and 300 MB for the work in hand.
    """
    _check(queries, radius)
    if base.dtype != np.uint64 or base.ndim != 1 or base.size > _LOW:
        raise ValueError(f"base must be uint64 [M] with M < 2^32, got {base.dtype} {list(base.shape)}")
    query_groups, base_groups = _representatives(queries), _representatives(base[:, None])
    asked, held = _firsts(query_groups), _firsts(base_groups)
    turned, upright = _take(queries, asked), _take(base, held)
    found = [np.empty((0, 4), dtype=np.int64)]
    if turned.size <= upright.size:
        for positions, numbers, _ in _search(turned.reshape(-1), upright[:, None], radius, False):
            found.append(_nearest(turned, upright, positions // ORIENTATIONS, positions % ORIENTATIONS, numbers))
    else:
        for positions, numbers, _ in _search(upright, turned, radius, False):
            found.append(_nearest(turned, upright, numbers // ORIENTATIONS, numbers % ORIENTATIONS, positions))
    pairs = np.concatenate(found)
    pairs[:, 0], pairs[:, 1] = asked[pairs[:, 0]], held[pairs[:, 1]]
    return _sorted(_to_members(_to_members(pairs, 0, query_groups), 1, base_groups))


def near_pairs_among(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair within one set of pictures, those of equal hashes taken together.

    Pictures alike in all eight hashes form a group, named by its first picture, and pairs are between groups. A
    thousand equal hashes are so one group and no row, not half a million rows. Distance and orientation of two
    members of one group are 0 and upright. To find the near copies of a picture, look at the members of its own group
    and at those of every group that shares a row with it, in either column. To keep the best of copies, give the
    pictures from the best to the worst, go through them in that order, and compare each with those already kept of
    these groups.

    Args:
        hashes: uint64 ``[N, 8]``, all orientations of each picture; column 0 is the picture upright.
        radius: 0..12 bits, as in :func:`near_pairs`.

    Returns:
        ``(representatives, pairs)``. Representatives: int64 ``[N]``, for each picture the index of the first with the
        same eight hashes, itself if there is none before. Pairs: int64 ``[K, 4]`` rows (first, second, orientation,
        distance) sorted by first and second, of representatives with first < second: ``hashes[first, orientation]``
        and ``hashes[second, 0]`` lie ``distance`` bits apart, the nearest orientation (the first of equals). A picture
        is never paired with itself.

    Raises:
        ValueError: the radius, the dtype or the shape is another.

    Memory beyond the argument and the result (32 bytes a row of pairs, three times that while they are sorted): about
    130 bytes a picture and 300 MB for the work in hand.
    """
    _check(hashes, radius)
    representatives = _representatives(hashes)
    firsts = _firsts(representatives)
    upright, turned = hashes[firsts, 0], hashes[:, 1:][firsts]
    found = [np.empty((0, 4), dtype=np.int64)]
    for positions, numbers, _ in _search(upright, turned, radius, True):
        first, second, orientation = firsts[numbers // ORIENTATIONS], firsts[positions], numbers % ORIENTATIONS
        found.append(_nearest(hashes, hashes[:, 0], first, orientation, second))
    return representatives, _sorted(np.concatenate(found))


def _check(hashes: np.ndarray, radius: int) -> None:
    if hashes.size > _LOW:
        raise ValueError(f"at most {int(_LOW) // ORIENTATIONS} pictures can be searched, got {len(hashes)}")
    if not 0 <= radius <= MAX_RADIUS:
        raise ValueError(f"radius must be 0..{MAX_RADIUS}, got {radius}")
    if hashes.dtype != np.uint64 or hashes.ndim != 2 or hashes.shape[1] != ORIENTATIONS:
        raise ValueError(f"hashes must be uint64 [N, {ORIENTATIONS}], got {hashes.dtype} {list(hashes.shape)}")


# --- equal hashes -----------------------------------------------------------------------------------------------------


def _representatives(rows: np.ndarray) -> np.ndarray:
    """The index of the first row equal to each, int64 ``[N]``."""
    result = np.arange(len(rows))
    order = np.argsort(rows[:, 0], kind="stable")
    leading = rows[order, 0]
    same = leading[1:] == leading[:-1]
    tied = order[np.concatenate([[False], same]) | np.concatenate([same, [False]])] if len(rows) else order
    tied = tied[np.lexsort(rows[tied].T)]  # Stable, so that of equal rows the first comes first.
    fresh = np.concatenate([[True], (rows[tied[1:]] != rows[tied[:-1]]).any(axis=1)])[: len(tied)]
    result[tied] = tied[fresh][np.cumsum(fresh) - 1]
    return result


def _firsts(representatives: np.ndarray) -> np.ndarray:
    return np.flatnonzero(representatives == np.arange(len(representatives)))


def _take(rows: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    return rows if len(firsts) == len(rows) else rows[firsts]


def _to_members(pairs: np.ndarray, column: int, representatives: np.ndarray) -> np.ndarray:
    """Rows of representatives repeated for every picture that they stand for."""
    members = np.argsort(representatives, kind="stable")
    first = np.searchsorted(representatives[members], pairs[:, column], side="left")
    count = np.searchsorted(representatives[members], pairs[:, column], side="right") - first
    row, member = _ranges(first, count)
    pairs = pairs[row]
    pairs[:, column] = members[member]
    return pairs


def _nearest(
    turned: np.ndarray, upright: np.ndarray, query: np.ndarray, orientation: np.ndarray, found: np.ndarray
) -> np.ndarray:
    """The rows whose orientation is the nearest of its pair, so that every pair is taken exactly once."""
    distances = np.bitwise_count(turned[query] ^ upright[found, None])
    nearest = distances.argmin(axis=1)
    taken = nearest == orientation
    rows = np.stack([query, found, orientation, distances[np.arange(len(query)), nearest]], axis=1)
    return rows[taken].astype(np.int64, copy=False)


def _sorted(pairs: np.ndarray) -> np.ndarray:
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


# --- the search -------------------------------------------------------------------------------------------------------


def _search(index: np.ndarray, stream: np.ndarray, radius: int, own: bool, free: np.uint64 = _ALL) -> Iterator[Met]:
    """Every pair of an index entry and a stream item within the radius, each exactly once, in batches.

    Args:
        index: uint64 ``[S]``.
        stream: uint64 ``[L, W]``. Item w of row i has the number i W + w.
        own: stream row i is index entry i in other orientations: the entry itself then counts as an item before its
            row, so that numbers are i (W + 1) + w, and only pairs whose entry comes after their row are found.
        free: the bits in which the pairs sought may differ.
    """
    if not index.size or not (stream.size or own):
        return
    masks = _plan(index, stream, radius, own, free)
    if masks is None:
        yield from _compare_all(index, stream, radius, own)
        return
    for turn, mask in enumerate(masks):
        for positions, numbers, difference in _agreeing(index, stream, radius, own, free, mask):
            # A pair is taken in the first table whose bits it agrees on: nothing is found twice, nothing remembered.
            fresh = (difference & mask) == 0
            for earlier in masks[:turn]:
                fresh &= (difference & earlier) != 0
            yield positions[fresh], numbers[fresh], difference[fresh]


def _compare_all(index: np.ndarray, stream: np.ndarray, radius: int, own: bool) -> Iterator[Met]:
    items = np.concatenate([index[:, None], stream], axis=1) if own else stream
    width = items.shape[1]
    values = items.reshape(-1)
    step = max(1, _CHUNK // len(index))
    for start in range(0, len(values), step):
        difference = (values[start : start + step, None] ^ index).reshape(-1)
        near = np.flatnonzero(np.bitwise_count(difference) <= radius)
        numbers, positions = near // len(index) + start, near % len(index)
        if own:
            later = numbers // width < positions
            near, numbers, positions = near[later], numbers[later], positions[later]
        if len(near):
            yield positions, numbers, difference[near]


def _agreeing(
    index: np.ndarray, stream: np.ndarray, radius: int, own: bool, free: np.uint64, mask: np.uint64
) -> Iterator[Met]:
    """The pairs within the radius that agree on the bits of ``mask`` (and a few, by chance, that do not)."""
    packed = _keys_and_numbers(index, mask, np.arange(len(index)))
    keys, places = (packed >> np.uint64(32)).astype(np.uint32), packed.astype(np.uint32)
    del packed
    width = stream.shape[1] + own

    if own:
        same = keys[1:] == keys[:-1]
        ends = np.append(np.flatnonzero(~same), len(keys) - 1) + 1
        lead = np.flatnonzero(same)  # Entries with a later one of the same key: places rise within a key.
        count = ends[np.searchsorted(ends, lead, side="right")] - lead - 1
        entries = places[lead].astype(np.int64)
        yield from _compare(
            index, places, radius, free & ~mask, index[entries], entries * width, width, lead + 1, count
        )

    values = stream.reshape(-1)
    for hit, wanted in _hits(values, mask, keys):
        first = np.searchsorted(keys, wanted)
        there = keys.take(first, mode="clip") == wanted
        hit, first, wanted = hit[there], first[there], wanted[there]
        count = np.searchsorted(keys, wanted, side="right") - first
        numbers = hit // stream.shape[1] * width + hit % stream.shape[1] + own
        least = width if own else 0
        yield from _compare(index, places, radius, free & ~mask, values[hit], numbers, least, first, count)


def _keys_and_numbers(values: np.ndarray, mask: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """The 32-bit key of each value over its number, sorted: one array sorts three times faster than by argsort."""
    packed = (values & mask) * _MULTIPLIER
    packed &= ~_LOW
    packed |= numbers.view(np.uint64)
    packed.sort()
    return packed


def _hits(values: np.ndarray, mask: np.uint64, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Where the values, uint64 ``[L]``, are that most probably have one of the sorted keys, and their keys.

    In batches of int64 and uint32 arrays, each in the order of the keys, so that a search for them walks through memory
    but once.
    """
    present, slot_bits = _key_set(keys)
    hits: list[np.ndarray] = []
    room = np.empty((2, min(_PIECE, len(values))), dtype=np.uint64)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        hashed, slot = room[:, : len(piece)]
        np.bitwise_and(piece, mask, out=hashed)
        np.multiply(hashed, _MULTIPLIER, out=hashed)
        np.right_shift(hashed, np.uint64(64 - slot_bits), out=slot)
        byte = present.take(slot.view(np.int64), mode="wrap")
        np.right_shift(hashed, np.uint64(61 - slot_bits), out=slot)
        hits.append(np.flatnonzero(byte >> (slot.astype(np.uint8) & np.uint8(7)) & np.uint8(1)) + start)
        if sum(map(len, hits)) >= _CHUNK or start + _PIECE >= len(values):
            hit = np.concatenate(hits)
            hits = []
            packed = _keys_and_numbers(values[hit], mask, hit)
            yield (packed & _LOW).view(np.int64), (packed >> np.uint64(32)).astype(np.uint32)


def _key_set(keys: np.ndarray) -> tuple[np.ndarray, int]:
    """A bitmap, uint8 ``[2^slot_bits]``, of the leading ``slot_bits + 3`` bits of sorted uint32 keys; 2% are set."""
    slot_bits = min(26, max(10, len(keys).bit_length() + 2))
    leading = keys >> np.uint32(29 - slot_bits)
    slots = leading >> np.uint32(3)
    starts = np.concatenate([[0], np.flatnonzero(slots[1:] != slots[:-1]) + 1])
    present = np.zeros(1 << slot_bits, dtype=np.uint8)
    bits = np.left_shift(1, leading & np.uint32(7)).astype(np.uint8)
    present[slots[starts]] = np.bitwise_or.reduceat(bits, starts)
    return present, slot_bits


def _compare(
    index: np.ndarray,
    places: np.ndarray,
    radius: int,
    free: np.uint64,
    values: np.ndarray,
    numbers: np.ndarray,
    own_width: int,
    first: np.ndarray,
    count: np.ndarray,
) -> Iterator[Met]:
    """Compare item k, of ``values`` and ``numbers``, with the entries ``places[first[k] : first[k] + count[k]]``.

    Items are in the order of their keys, so those of one key are neighbours. ``own_width`` is 0 unless only entries
    after the item's own row, number // own_width, count.
    """
    if not len(first):
        return
    ends = first + count
    starts = np.concatenate([[0], np.flatnonzero(ends[1:] != ends[:-1]) + 1])
    work = np.add.reduceat(count, starts)
    sizes = np.diff(np.append(starts, len(ends)))
    for group in np.flatnonzero(work >= _CROWD):
        items = slice(starts[group], starts[group] + sizes[group])
        crowd = places[first[items].min() : ends[starts[group]]].astype(np.int64)
        for inner, item, difference in _search(index[crowd], values[items, None], radius, False, free):
            positions, theirs = crowd[inner], numbers[items][item]
            if own_width:
                later = theirs // own_width < positions
                positions, theirs, difference = positions[later], theirs[later], difference[later]
            yield positions, theirs, difference
    usual = np.repeat(work < _CROWD, sizes)
    values, numbers, first, count = values[usual], numbers[usual], first[usual], count[usual]
    total = np.cumsum(count)
    start = 0
    while start < len(count):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
        item, place = _ranges(first[start:stop], count[start:stop])
        item += start
        positions = places[place].astype(np.int64)
        difference = values[item] ^ index[positions]
        near = np.bitwise_count(difference) <= radius
        if own_width:
            near &= numbers[item] // own_width < positions
        if near.any():
            yield positions[near], numbers[item[near]], difference[near]
        start = stop


def _ranges(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every member of the ranges ``first[k] .. first[k] + count[k]``: k, int64, and the member, int64."""
    which = np.repeat(np.arange(len(count)), count)
    return which, np.arange(len(which)) + np.repeat(first - (np.cumsum(count) - count), count)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(index: np.ndarray, stream: np.ndarray, radius: int, own: bool, free: np.uint64) -> np.ndarray | None:
    """The bits of each table's key, uint64 ``[T]``, that cost the least; None where comparing all with all does."""
    items = stream.size + (index.size // 2 if own else 0)
    best, cheapest = None, _BRUTE * index.size * items
    generator = np.random.default_rng(0)
    ours = generator.choice(index, min(_SAMPLE, index.size), replace=False)
    theirs = stream[generator.integers(len(stream), size=_SAMPLE), generator.integers(stream.shape[1], size=_SAMPLE)]
    positions = generator.permutation(_BITS)
    positions = positions[(free >> positions.astype(np.uint64) & np.uint64(1)).astype(bool)]
    for shares in _splits(radius):
        tables = sum(_table_count(share) for share in shares)
        fixed = tables * (_TABLE + _ENTRY * index.size + _PROBE * stream.size)
        if fixed >= cheapest:
            continue
        masks = _covering(positions, shares)
        if not masks.all():
            continue
        equal = 0
        sampled = masks[generator.permutation(len(masks))[:_SAMPLED_TABLES]]
        for mask in sampled:
            keys, wanted = np.sort(ours & mask), np.sort(theirs & mask)
            equal += (np.searchsorted(keys, wanted, "right") - np.searchsorted(keys, wanted, "left")).sum()
        rate = equal / (len(sampled) * ours.size * theirs.size)
        cost = fixed + tables * _COMPARISON * rate * index.size * items
        if cost < cheapest:
            best, cheapest = masks, cost
    return best


def _splits(radius: int) -> list[tuple[int, ...]]:
    """Shares of the radius, one a part, that no ``radius`` differences can all exceed: sum(share + 1) = radius + 1."""

    def parts(total: int, number: int, most: int) -> Iterator[tuple[int, ...]]:
        if number == 1:
            if 1 <= total <= most:
                yield (total,)
            return
        for size in range(min(most, total - number + 1), 0, -1):
            for rest in parts(total - size, number - 1, size):
                yield (size, *rest)

    return [
        tuple(size - 1 for size in sizes)
        for number in range(1, _MAX_PARTS + 1)
        for sizes in parts(radius + 1, number, radius + 1)
    ]


def _table_count(share: int) -> int:
    return 2 * ((1 << share) - 1) if share else 1


def _covering(positions: np.ndarray, shares: tuple[int, ...]) -> np.ndarray:
    """Masks, uint64 ``[T]``, one of which avoids any ``sum(share + 1) - 1`` of the bits at ``positions``."""
    # A part of share 0 has all its bits in its key, any other half of them: the sizes make all keys equally long.
    weights = np.array([1 if share == 0 else 2 for share in shares])
    edges = np.rint(np.concatenate([[0], np.cumsum(weights)]) * len(positions) / weights.sum()).astype(int)
    masks: list[np.uint64] = []
    for share, start, stop in zip(shares, edges, edges[1:]):
        bits = np.uint64(1) << positions[start:stop].astype(np.uint64)
        if share == 0:
            masks.append(np.bitwise_or.reduce(bits, initial=np.uint64(0)))
            continue
        points = np.random.default_rng(share).permutation(1 << share)[np.arange(len(bits)) % (1 << share)]
        for normal in range(1, 1 << share):
            side = np.bitwise_count(points & normal) & 1
            masks.extend(np.bitwise_or.reduce(bits[side == kept], initial=np.uint64(0)) for kept in (0, 1))
    return np.array(masks, dtype=np.uint64)
