from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datagen.select import neighbours
from datagen.select.neighbours import MAX_RADIUS, ORIENTATIONS, near_pairs, near_pairs_among


def brute_force(queries: np.ndarray, base: np.ndarray, radius: int) -> np.ndarray:
    distances = np.bitwise_count(queries[:, :, None] ^ base).astype(np.int64)
    nearest, orientation = distances.min(axis=1), distances.argmin(axis=1)
    query, found = np.nonzero(nearest <= radius)
    return np.stack([query, found, orientation[query, found], nearest[query, found]], axis=1)


def skewed_hashes(count: int, seed: int) -> np.ndarray:
    """Hashes [count, 8] as hard as real ones get: unlikely bits, clusters, near copies at 0..13 bits, equal rows."""
    rng = np.random.default_rng(seed)
    chance = np.concatenate([[0.0], np.full(15, 0.03), rng.uniform(0.1, 0.9, 48)])
    bits = rng.random((count, ORIENTATIONS, 64)) < chance
    rows = np.packbits(bits, axis=2).view(">u8")[..., 0].astype(np.uint64)
    for row in range(count // 2, count):  # Copies of the first half, turned, at every distance around the radii.
        flips = rng.permutation(64)[: row % 14].astype(np.uint64)
        changed = np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
        rows[row, 0] = rows[rng.integers(count // 2), rng.integers(ORIENTATIONS)] ^ changed
    rows[rng.integers(count, size=count // 10)] = 0  # Constant pictures.
    rows[rng.integers(count, size=count // 20)] = rows[rng.integers(count)]
    crowd = rng.integers(count, size=count // 10)  # Nearly constant ones: all near each other.
    rows[crowd] = np.uint64(1) << rng.integers(64, size=(len(crowd), ORIENTATIONS)).astype(np.uint64)
    return rows


# At wider radii crowds of so few are never divided by tables.
WAYS = [
    *(("planned", radius) for radius in range(MAX_RADIUS + 1)),
    *(("tables", radius) for radius in range(MAX_RADIUS + 1)),
    *(("crowds", radius) for radius in range(1, 6)),
]


@pytest.fixture
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Hashes to search. So few would all be compared with all: make every way through the search be taken."""
    if request.param == "planned":
        yield 800
        return
    monkeypatch.setattr(neighbours, "_PIECE", 1000)
    monkeypatch.setattr(neighbours, "_TABLE", 1.0)
    if request.param == "tables":
        monkeypatch.setattr(neighbours, "_BRUTE", 1e9)
    else:
        monkeypatch.setattr(neighbours, "_ENTRY", 1.0)
        monkeypatch.setattr(neighbours, "_PROBE", 1.0)
        monkeypatch.setattr(neighbours, "_BRUTE", 20.0)
        monkeypatch.setattr(neighbours, "_CROWD", 2000)
        monkeypatch.setattr(neighbours, "_CHUNK", 500)
    keyed = []  # Of every search, outer and within crowds: whether it went by tables.
    plan = neighbours._plan

    def noted(*arguments: Any) -> np.ndarray | None:
        masks = plan(*arguments)
        keyed.append(masks is not None)
        return masks

    monkeypatch.setattr(neighbours, "_plan", noted)
    yield 600
    assert keyed[0]
    assert (len(keyed) > 2) == (request.param == "crowds")


@pytest.mark.parametrize("radius", range(MAX_RADIUS + 1))
def test_hashes_searched_are_hard(radius: int) -> None:
    rows = skewed_hashes(600, seed=radius)
    assert set(range(radius + 1)) <= set(brute_force(rows, rows[:, 0], radius)[:, 3])


@pytest.mark.parametrize(("size", "radius"), WAYS, indirect=["size"])
def test_search_finds_exactly_the_pairs_of_brute_force(radius: int, size: int) -> None:
    rows = skewed_hashes(size, seed=radius)
    base = np.ascontiguousarray(rows[::-1, 0])
    expected = brute_force(rows, base, radius)
    np.testing.assert_array_equal(near_pairs(rows, base, radius), expected)
    few = rows[:: size // 40]
    np.testing.assert_array_equal(near_pairs(few, base, radius), brute_force(few, base, radius))


@pytest.mark.parametrize(("size", "radius"), WAYS, indirect=["size"])
def test_search_among_finds_each_pair_of_groups_once(radius: int, size: int) -> None:
    rows = skewed_hashes(size, seed=100 + radius)
    representatives, pairs = near_pairs_among(rows, radius)
    first_of: dict[bytes, int] = {}
    np.testing.assert_array_equal(
        representatives, [first_of.setdefault(row.tobytes(), i) for i, row in enumerate(rows)]
    )
    expected = brute_force(rows, rows[:, 0], radius)
    first, second = expected[:, 0], expected[:, 1]
    stands = (representatives[first] == first) & (representatives[second] == second)
    np.testing.assert_array_equal(pairs, expected[stands & (first < second)])


@pytest.mark.parametrize("radius", [4, 6, 7, 10])
def test_thousands_of_hashes_in_the_plan_of_their_number(radius: int) -> None:
    rows = skewed_hashes(4000, seed=radius)
    _, pairs = near_pairs_among(rows, radius)
    expected = brute_force(rows[:400], rows[:, 0], radius)
    expected = expected[expected[:, 0] < expected[:, 1]]
    representatives = neighbours._representatives(rows)
    stands = (representatives[expected[:, 0]] == expected[:, 0]) & (representatives[expected[:, 1]] == expected[:, 1])
    np.testing.assert_array_equal(pairs[pairs[:, 0] < 400], expected[stands])


@settings(max_examples=60, deadline=None)
@given(
    queries=hnp.arrays(np.uint64, st.tuples(st.integers(0, 5), st.just(8)), elements=st.integers(0, 2**64 - 1)),
    base=hnp.arrays(np.uint64, st.integers(0, 20), elements=st.sampled_from([0, 1, 3, 255, 2**63, 2**64 - 1])),
    radius=st.integers(0, MAX_RADIUS),
)
def test_search_of_any_hashes_equals_brute_force(queries: np.ndarray, base: np.ndarray, radius: int) -> None:
    np.testing.assert_array_equal(near_pairs(queries, base, radius), brute_force(queries, base, radius))


@pytest.mark.parametrize("shares", sorted({s for r in range(9) for s in neighbours._splits(r)}))
def test_some_table_avoids_any_differing_bits(shares: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    positions = rng.permutation(64)
    masks = neighbours._covering(positions, shares)
    assert len(masks) == sum(neighbours._table_count(share) for share in shares)
    radius = sum(share + 1 for share in shares) - 1
    differing = rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (2000, 1)), axis=1)[:, :radius]
    differences = np.bitwise_or.reduce(np.uint64(1) << differing, axis=1, initial=np.uint64(0))
    assert (differences[:, None] & masks == 0).any(axis=1).all()


def test_equal_hashes_are_one_group_and_no_pair() -> None:
    rows = np.zeros((50_000, ORIENTATIONS), dtype=np.uint64)
    rows[49_999] = np.uint64(7)
    representatives, pairs = near_pairs_among(rows, 6)
    assert representatives.tolist() == [0] * 49_999 + [49_999]
    assert pairs.tolist() == [[0, 49_999, 0, 3]]


def test_crowd_of_equal_keys_is_searched_exactly() -> None:
    rng = np.random.default_rng(5)
    # Twelve bits of freedom: thousands share every key, of tables that cover all 64 bits.
    rows = rng.integers(0, 2**12, (1500, ORIENTATIONS), dtype=np.uint64)
    _, pairs = near_pairs_among(rows, 2)
    representatives = neighbours._representatives(rows)
    expected = brute_force(rows, rows[:, 0], 2)
    assert (representatives == np.arange(1500)).all()
    np.testing.assert_array_equal(pairs, expected[expected[:, 0] < expected[:, 1]])


def test_search_of_nothing_finds_nothing() -> None:
    nobody = np.empty((0, ORIENTATIONS), np.uint64)
    some = skewed_hashes(20, seed=0)
    assert near_pairs(nobody, some[:, 0], 7).shape == (0, 4)
    assert near_pairs(some, nobody[:, 0], 7).shape == (0, 4)
    representatives, pairs = near_pairs_among(nobody, 7)
    assert representatives.shape == (0,)
    assert pairs.shape == (0, 4)
    assert near_pairs_among(some[:1], 7)[1].shape == (0, 4)


def test_wrong_arguments_are_refused() -> None:
    rows = skewed_hashes(4, seed=0)
    with pytest.raises(ValueError, match=r"radius must be 0\.\.12, got 13"):
        near_pairs(rows, rows[:, 0], 13)
    with pytest.raises(ValueError, match="radius"):
        near_pairs_among(rows, -1)
    with pytest.raises(ValueError, match=r"uint64 \[N, 8\], got int64 \[4, 8\]"):
        near_pairs_among(rows.astype(np.int64), 3)
    with pytest.raises(ValueError, match=r"base must be uint64 \[M\] with M < 2\^32, got uint64 \[4, 8\]"):
        near_pairs(rows, rows, 3)
