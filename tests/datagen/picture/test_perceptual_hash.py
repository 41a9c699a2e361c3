import cv2
import numpy as np
import pytest

from datagen.picture.decode import decode, read_header
from datagen.picture.perceptual_hash import ORIENTATIONS, correlation, grey_thumb, hashes, near_pairs, orient
from datagen.picture.quality import luma
from datagen.source.embedded import corpus_files


def grey(name: str) -> np.ndarray:
    data = corpus_files("pictures")[name]
    return luma(decode(data, read_header(data, 10**7))[0])


@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_one_dct_gives_the_hash_of_every_orientation(orientation: int) -> None:
    thumb = grey_thumb(grey("astronaut.png"))
    turned = np.ascontiguousarray(orient(thumb, orientation))
    assert hashes(turned)[0] == hashes(thumb)[orientation]


def test_the_eight_orientations_are_all_the_flips_and_rotations() -> None:
    square = np.arange(9).reshape(3, 3)
    ours = {orient(square, o).tobytes() for o in range(ORIENTATIONS)}
    theirs = {np.rot90(s, k).tobytes() for s in (square, square[:, ::-1]) for k in range(4)}
    assert ours == theirs


@pytest.mark.parametrize("quality", [60, 90])
@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_reencoded_and_resized_copies_stay_near_and_others_far(quality: int, scale: float) -> None:
    original, other = grey("astronaut.png"), grey("camera.png")
    small = cv2.resize(original, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    copy = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)
    own, copied, foreign = (hashes(grey_thumb(picture))[0] for picture in (original, copy, other))
    assert np.bitwise_count(own ^ copied) <= 4
    assert np.bitwise_count(own ^ foreign) > 12
    assert correlation(grey_thumb(original), grey_thumb(copy)) > 0.99


@pytest.mark.parametrize("radius", [0, 3, 4, 7])
def test_search_finds_exactly_the_pairs_of_brute_force(radius: int) -> None:
    rng = np.random.default_rng(radius)
    base = rng.integers(0, 2**64, 300, dtype=np.uint64)
    queries = rng.integers(0, 2**64, (60, ORIENTATIONS), dtype=np.uint64)
    for query in range(60):  # Plant neighbours at every distance up to 9 bits, in random orientations.
        bits = rng.permutation(64)[: query % 10].astype(np.uint64)
        flips = np.bitwise_or.reduce(np.uint64(1) << bits) if len(bits) else np.uint64(0)
        queries[query, rng.integers(ORIENTATIONS)] = base[query * 2] ^ flips
    distances = np.bitwise_count(queries[:, :, None] ^ base[None, None]).astype(int).min(axis=1)
    expected = np.argwhere(distances <= radius)
    found = near_pairs(queries, base, radius)
    np.testing.assert_array_equal(found[:, :2], expected)
    np.testing.assert_array_equal(found[:, 3], distances[tuple(expected.T)])
    assert len(expected) >= 6 * radius


def test_search_of_nothing_finds_nothing_and_a_wide_radius_is_refused() -> None:
    assert near_pairs(np.empty((0, 8), np.uint64), np.empty(0, np.uint64), 7).shape == (0, 4)
    with pytest.raises(ValueError, match=r"0\.\.7"):
        near_pairs(np.empty((0, 8), np.uint64), np.empty(0, np.uint64), 8)


def test_correlation_of_a_constant_is_zero() -> None:
    assert correlation(np.ones((4, 4)), np.arange(16).reshape(4, 4)) == 0.0
