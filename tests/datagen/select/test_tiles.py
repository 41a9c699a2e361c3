import numpy as np
import pytest

from datagen.config import TileConfig
from datagen.picture.quality import CELL
from datagen.select.tiles import Box, choose_tiles


def choose(width: int, height: int, sharpness: np.ndarray | None = None, **settings: object) -> list[Box]:
    shape = (max(1, height // CELL), max(1, width // CELL))
    sharp = np.full(shape, 1000.0) if sharpness is None else sharpness
    return choose_tiles(width, height, sharp.reshape(-1), np.zeros(shape).reshape(-1), TileConfig(**settings))


def test_small_pictures_stay_whole_and_large_ones_are_cut() -> None:
    assert choose(481, 321, size=256, whole_below=512) == [Box(0, 0, 481, 321)]
    assert choose(512, 512, size=256, whole_below=512) == [Box(x, y, 256, 256) for y in (0, 256) for x in (0, 256)]
    assert choose(4000, 3000, size=None) == [Box(0, 0, 4000, 3000)]


@pytest.mark.parametrize(("width", "height"), [(640, 427), (1411, 1411), (700, 200), (1024, 513)])
def test_tiles_lie_inside_aligned_and_apart(width: int, height: int) -> None:
    taken = np.zeros((height, width), dtype=int)
    for box in choose(width, height, size=256, whole_below=0):
        assert box.x % 16 == box.y % 16 == 0
        assert (box.width, box.height) == (256, min(256, height))
        assert box.x + box.width <= width and box.y + box.height <= height
        taken[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    assert taken.max() == 1
    assert taken.sum() == (width // 256) * max(1, height // 256) * 256 * min(256, height)


def test_blurred_and_flat_tiles_are_left_out() -> None:
    sharp = np.full((4, 4), 1000.0)
    sharp[:2, :2] = 10
    assert choose(512, 512, sharp, size=256, whole_below=0) == [
        Box(256, 0, 256, 256),
        Box(0, 256, 256, 256),
        Box(256, 256, 256, 256),
    ]
    assert choose(512, 512, size=256, whole_below=0, min_laplacian_variance=2000) == []
    flat = choose_tiles(512, 512, np.full(16, 1000.0), np.full(16, 0.99), TileConfig(size=256, whole_below=0))
    assert flat == []


def test_the_sharpest_are_taken_in_reading_order() -> None:
    sharp = np.repeat(np.repeat(np.array([[100.0, 400.0], [300.0, 200.0]]), 2, axis=0), 2, axis=1)
    assert choose(512, 512, sharp, size=256, whole_below=0, max_per_picture=2) == [
        Box(256, 0, 256, 256),
        Box(0, 256, 256, 256),
    ]


def test_a_tile_across_cells_weighs_each_by_its_share() -> None:
    # 320 wide: cells of 128 and 192; the tile of 256 from x=32 covers 96 of the first and 160 of the second.
    sharp = np.array([[0.0, 160.0]])
    below = choose(320, 128, sharp, size=256, whole_below=0, min_laplacian_variance=99.9)
    above = choose(320, 128, sharp, size=256, whole_below=0, min_laplacian_variance=100.1)
    assert below == [Box(32, 0, 256, 128)] and above == []
