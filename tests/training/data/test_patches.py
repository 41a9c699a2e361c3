"""Patches: where they are cut, how they are turned, and that a map of detail draws them."""

import json

import cv2
import numpy as np
import pytest
from skimage import data

from datagen.picture.region import decode_whole
from training.data.patches import DetailMap, cut_patches, detail_map, draw_place, turn


def encoded(picture: np.ndarray, suffix: str = ".jpg") -> bytes:
    channels = cv2.COLOR_RGB2BGR if picture.ndim == 3 else cv2.COLOR_GRAY2BGR
    pixels = cv2.cvtColor(picture, channels) if picture.dtype == np.uint8 else picture
    return bytes(cv2.imencode(suffix, pixels)[1])


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_eight_orientations_are_all_different() -> None:
    patch = np.arange(9, dtype=np.uint8).reshape(3, 3)
    for orientation in range(8):
        turned = np.rot90(patch, orientation % 4)
        assert (turn(patch, orientation) == (turned[:, ::-1] if orientation >= 4 else turned)).all()
    assert len({turn(patch, orientation).tobytes() for orientation in range(8)}) == 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_patches_are_places_of_the_decoded_picture(suffix: str) -> None:
    image = encoded(data.astronaut()[:300, :200], suffix)
    whole = decode_whole(image)
    patches, depths = cut_patches(image, b"", 64, 4, rng())
    assert depths is None and len(patches) == 4
    places = rng()
    for patch in patches:
        place = draw_place(300, 200, 64, places)
        window = whole[place.top : place.top + 64, place.left : place.left + 64]
        assert patch.shape == (64, 64, 3) and (patch == turn(window, place.orientation)).all()


def test_a_small_picture_is_mirrored_outwards() -> None:
    (patch,), _ = cut_patches(encoded(data.astronaut()[:20, :30], ".png"), b"", 48, 1, rng())
    assert patch.shape == (48, 48, 3)


def test_a_depth_map_is_cut_and_turned_with_its_picture() -> None:
    ramp = np.arange(80 * 100, dtype=np.uint16).reshape(80, 100)
    picture = np.stack([ramp // 256, ramp % 256, 0 * ramp], axis=2).astype(np.uint8)
    patches, depths = cut_patches(encoded(picture, ".png"), encoded(ramp, ".png"), 32, 6, rng())
    assert depths is not None
    for patch, depth in zip(patches, depths):
        assert (np.round(depth * 65535) == patch[..., 0] * 256.0 + patch[..., 1]).all()


def test_a_depth_map_of_another_size_or_kind_is_refused() -> None:
    image = encoded(data.astronaut()[:80, :100])
    with pytest.raises(ValueError, match="depth map is 90x80, its picture 100x80"):
        cut_patches(image, encoded(np.zeros((80, 90), np.uint16), ".png"), 32, 1, rng())
    with pytest.raises(ValueError, match="one channel of 8 or 16 bits"):
        cut_patches(image, image, 32, 1, rng())
    with pytest.raises(ValueError, match="not a picture"):
        cut_patches(b"no picture", b"", 32, 1, rng())


def test_detail_draws_patches_in_proportion() -> None:
    """Left half flat, right half with twice the detail of a third kind of cell: frequencies follow the shares."""
    detail = DetailMap(np.array([[0.0, 0.4, 0.8]] * 3), 64)
    draws = rng()
    lefts = np.array([draw_place(192, 192, 64, draws, detail).left for _ in range(4000)])
    assert (lefts <= 16).mean() < 0.05
    # At left = 64 the patch covers the middle cells, at 128 the right ones, twice as likely.
    near, far = (np.abs(lefts - 64) < 8).sum() / 15, (np.abs(lefts - 124) < 5).sum() / 9
    assert 1.5 < far / near < 2.5


def test_the_share_inside_a_patch_weighs_cells_by_area() -> None:
    detail = DetailMap(np.array([[0.0, 1.0], [0.5, 0.5]]), 10)
    assert detail.inside(0, 0, 10) == 0.0
    assert detail.inside(0, 5, 10) == pytest.approx(0.5)
    assert detail.inside(5, 5, 10) == pytest.approx(0.5)
    # Beyond the last whole cell its value holds on.
    assert detail.inside(0, 14, 10) == pytest.approx(1.0)


def test_the_map_is_read_from_a_samples_json() -> None:
    found = detail_map(
        json.dumps({"quality_map": {"cell": 128, "rows": 1, "columns": 2, "flat_fraction": [1, 0.25]}}).encode()
    )
    assert found is not None and found.cell == 128 and found.share.tolist() == [[0.0, 0.75]]
    assert detail_map(b"") is None and detail_map(b'{"caption": "x"}') is None and detail_map(b"[]") is None
