import cv2
import numpy as np
import pytest
import simplejpeg

from datagen.picture.decode import decode, read_header
from datagen.picture.perceptual_hash import (
    ORIENTATIONS,
    area_mean,
    center_hash,
    correlation,
    grey_thumb,
    hashes,
    orient,
)
from datagen.picture.quality import luma
from datagen.source.embedded import corpus_files


def grey(name: str) -> np.ndarray:
    data = corpus_files("pictures")[name]
    return luma(decode(data, read_header(data, 10**7))[0])


def jpeg_copy(picture: np.ndarray, quality: int) -> np.ndarray:
    code = simplejpeg.encode_jpeg(np.ascontiguousarray(picture)[..., None], quality, "GRAY")
    return simplejpeg.decode_jpeg(code, "GRAY")[..., 0]


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
    copy = jpeg_copy(small, quality)
    own, copied, foreign = (hashes(grey_thumb(picture))[0] for picture in (original, copy, other))
    assert np.bitwise_count(own ^ copied) <= 4
    assert np.bitwise_count(own ^ foreign) > 12
    assert correlation(grey_thumb(original), grey_thumb(copy)) > 0.99


def test_correlation_of_a_constant_is_zero() -> None:
    assert correlation(np.ones((4, 4)), np.arange(16).reshape(4, 4)) == 0.0


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(
    ("shape", "size"), [((97, 213), (32, 32)), ((512, 512), (32, 32)), ((100, 64), (10, 64)), ((40, 30), (32, 33))]
)
def test_area_mean_weighs_every_pixel_by_its_share(
    shape: tuple[int, int], size: tuple[int, int], channels: tuple[int, ...]
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, *channels), dtype=np.uint8)
    height, width = size
    found = area_mean(picture, width, height)
    assert found.shape == (height, width, *channels)
    assert found.dtype == np.uint8
    expected = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    if height <= shape[0] and width <= shape[1]:
        down, across = (shares(old, new) for old, new in zip(shape, size))
        expected = np.einsum("ih,hw...,jw->ij...", down, picture.astype(np.float64), across)
    assert np.abs(found - expected).max() <= 0.51


def shares(old: int, new: int) -> np.ndarray:
    """How much of each of ``new`` equal intervals each of ``old`` pixels makes up, ``[new, old]``."""
    edges, pixels = np.arange(new + 1) * old / new, np.arange(old)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * new / old


def test_the_centre_is_found_in_a_crop_and_in_no_other_picture() -> None:
    picture, other = grey("astronaut.png"), grey("camera.png")
    crop = picture[128:384, 128:384]
    coded = jpeg_copy(crop, 75)
    center = center_hash(picture)
    assert isinstance(center, np.uint64)
    assert center == hashes(grey_thumb(np.ascontiguousarray(crop)))[0]
    assert np.bitwise_count(center ^ hashes(grey_thumb(coded))[0]) <= 4
    assert np.bitwise_count(center ^ hashes(grey_thumb(picture))[0]) > 12
    assert np.bitwise_count(center ^ center_hash(other)) > 12


@pytest.mark.parametrize("shape", [(16, 16), (17, 500), (33, 35)])
def test_small_pictures_have_hashes_too(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert grey_thumb(picture).shape == (32, 32)
    assert center_hash(picture) != hashes(grey_thumb(picture))[0]
