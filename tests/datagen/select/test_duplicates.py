import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from datagen.config import SelectConfig
from datagen.picture.perceptual_hash import correlation, hashes, orient
from datagen.select.duplicates import Candidates, Copies, exact_copies, from_the_best_down, near_copies


def candidates(count: int, **columns: object) -> Candidates:
    """Pictures that differ in everything that makes a copy, and in nothing that makes one better."""
    own = np.arange(count, dtype=np.uint64)
    values = {
        "row": np.arange(count),
        "batch": np.zeros(count, np.int32),
        "width": np.full(count, 100, np.int32),
        "height": np.full(count, 100, np.int32),
        "jpeg_quality": np.full(count, 90, np.float32),
        "bits_per_pixel": np.ones(count, np.float32),
        "sha256": np.stack([own, own], axis=1),
        "pixel_sha256": np.stack([own, own], axis=1),
        "phash": np.repeat((own * np.uint64(0x9E3779B97F4A7C15))[:, None], 8, axis=1),
    }
    return Candidates(**values | {name: np.asarray(value) for name, value in columns.items()})


def test_the_best_is_of_the_earliest_batch_then_large_then_lossless_then_full_then_first() -> None:
    pictures = candidates(
        6,
        batch=[1, 0, 0, 0, 0, 0],
        width=[900, 100, 100, 100, 100, 200],
        jpeg_quality=np.array([90, 90, np.nan, 95, 90, 50], np.float32),
        bits_per_pixel=np.array([9, 1, 1, 1, 2, 1], np.float32),
    )
    assert from_the_best_down(pictures).row.tolist() == [5, 2, 3, 4, 1, 0]
    assert from_the_best_down(candidates(4)).row.tolist() == [0, 1, 2, 3]


def test_copies_by_file_and_by_pixels_go_to_one_keeper() -> None:
    # 2 has the file of 0, 3 the pixels of 2 (so those of 0), 4 the pixels of 1 in another shape, 5 those of 1.
    pictures = candidates(
        6,
        sha256=[[1, 1], [2, 2], [1, 1], [3, 3], [4, 4], [2, 9]],
        pixel_sha256=[[1, 1], [2, 2], [7, 7], [7, 7], [2, 2], [2, 2]],
        width=np.array([100, 100, 100, 100, 50, 100], np.int32),
    )
    found = exact_copies(pictures)
    assert dict(zip(found.copy.tolist(), found.keeper.tolist())) == {2: 0, 3: 0, 5: 1}
    assert found.same_file.tolist() == [True, False, False]


def pictures_like(photograph: np.ndarray, count: int) -> list[np.ndarray]:
    """Thumbnails of the photograph, each a little more changed than the one before."""
    noise = np.random.default_rng(0).normal(0, 4, photograph.shape)
    changed = [photograph + noise * i for i in range(count)]
    return [np.clip(cv2.GaussianBlur(c.astype(np.float32), (0, 0), 1), 0, 255).astype(np.uint8) for c in changed]


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    from datagen.source.embedded import corpus_files

    names = ("brick.png", "camera.png", "coins.png", "china.jpg", "astronaut.png", "motorcycle_left.png")
    decoded = [cv2.imdecode(np.frombuffer(corpus_files("pictures")[name], np.uint8), 0) for name in names]
    return [cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA) for picture in decoded]


def by_hand(thumbs: list[np.ndarray | None], phash: np.ndarray, config: SelectConfig) -> dict[int, int]:
    """What near_copies promises, pair by pair: the first kept picture that looks alike in any orientation."""
    keeper: dict[int, int] = {}
    for i in range(len(thumbs)):
        for j in range(i):
            if j in keeper:
                continue
            distances = np.bitwise_count(phash[j] ^ phash[i, 0])
            nearest = int(distances.argmin())
            if distances[nearest] > config.duplicate_radius:
                continue
            one, other = thumbs[i], thumbs[j]
            if one is None or other is None or correlation(orient(other, nearest), one) >= config.duplicate_correlation:
                keeper[i] = j
                break
    return keeper


def found_by(thumbs: list[np.ndarray | None], phash: np.ndarray, config: SelectConfig, order: np.ndarray) -> Copies:
    asked: list[np.ndarray] = []

    def read(rows: np.ndarray) -> list[bytes | None]:
        asked.append(rows)
        return [None if (thumb := thumbs[np.flatnonzero(order == row)[0]]) is None else thumb.tobytes() for row in rows]

    found = near_copies(dataclasses.replace(candidates(len(thumbs), phash=phash), row=order), read, config)
    assert all((np.diff(rows) > 0).all() for rows in asked)
    return found


@pytest.mark.parametrize("radius", [0, 3, 6])
def test_near_copies_are_those_found_pair_by_pair(photographs: list[np.ndarray], radius: int) -> None:
    rng = np.random.default_rng(1)
    series = [picture for photograph in photographs for picture in pictures_like(photograph, 10)]
    thumbs = [np.ascontiguousarray(orient(picture, int(rng.integers(8)))) for picture in series]
    # Noise that has the hash of a photograph, and groups of equal hashes.
    thumbs += [np.ascontiguousarray(photographs[0]), np.ascontiguousarray(photographs[0].T)]
    mixed = [thumbs[i] for i in rng.permutation(len(thumbs))]
    phash = np.stack([hashes(thumb) for thumb in mixed])
    config = SelectConfig(duplicate_radius=radius, duplicate_correlation=0.97)
    order = rng.permutation(len(mixed))
    found = found_by(list(mixed), phash, config, order)
    expected = by_hand(list(mixed), phash, config)
    assert dict(zip(found.copy.tolist(), found.keeper.tolist())) == expected
    assert len(expected) > 5 * radius
    for copy, keeper, distance, likeness in zip(found.copy, found.keeper, found.distance, found.correlation):
        turns = np.bitwise_count(phash[keeper] ^ phash[copy, 0])
        assert distance == turns.min() <= radius
        assert likeness == pytest.approx(correlation(orient(mixed[keeper], int(turns.argmin())), mixed[copy]), abs=1e-6)


def test_equal_hashes_of_unlike_pictures_are_no_copies(photographs: list[np.ndarray]) -> None:
    phash = np.repeat(hashes(photographs[0])[None], 3, axis=0)
    thumbs: list[np.ndarray | None] = [photographs[0], photographs[1], photographs[0]]
    found = found_by(thumbs, phash, SelectConfig(), np.arange(3))
    assert (found.copy.tolist(), found.keeper.tolist()) == ([2], [0])


def test_without_a_thumbnail_the_hash_alone_decides(photographs: list[np.ndarray]) -> None:
    phash = np.repeat(hashes(photographs[0])[None], 2, axis=0)
    found = found_by([None, photographs[1]], phash, SelectConfig(), np.arange(2))
    assert (found.copy.tolist(), found.keeper.tolist()) == ([1], [0])
    assert np.isnan(found.correlation).all()


def test_constant_pictures_resemble_nothing() -> None:
    flat = np.full((32, 32), 7, np.uint8)
    found = found_by([flat, flat], np.repeat(hashes(flat)[None], 2, axis=0), SelectConfig(), np.arange(2))
    assert len(found.copy) == 0


def test_chains_of_likeness_do_not_grow(photographs: list[np.ndarray]) -> None:
    # Three pictures of which only neighbours are alike: the middle one goes, and so does not take the last with it.
    a = photographs[3].astype(np.float64)
    b = photographs[4].astype(np.float64)
    chain = [np.clip(a * (1 - t) + b * t, 0, 255).astype(np.uint8) for t in (0.0, 0.15, 0.3)]
    limit = (
        correlation(chain[0], chain[2]) + min(correlation(chain[0], chain[1]), correlation(chain[1], chain[2]))
    ) / 2
    phash = np.repeat(hashes(chain[0])[None], 3, axis=0)
    found = found_by(list(chain), phash, SelectConfig(duplicate_correlation=limit), np.arange(3))
    assert (found.copy.tolist(), found.keeper.tolist()) == ([1], [0])


def test_nothing_among_nothing(tmp_path: Path) -> None:
    none = candidates(0, phash=np.empty((0, 8), np.uint64), sha256=np.empty((0, 2), np.uint64))
    assert len(exact_copies(none).copy) == len(near_copies(none, lambda rows: [], SelectConfig()).copy) == 0
