import numpy as np
import pyarrow as pa
import pytest

from datagen.config import TileConfig
from datagen.picture.quality import CELL
from datagen.select.tiles import COLUMNS, TILES_TYPE, Box, choose_all_tiles, choose_tiles


def choose(width: int, height: int, sharpness: np.ndarray | None = None, **settings: object) -> list[Box]:
    shape = (max(1, height // CELL), max(1, width // CELL))
    sharp = np.full(shape, 1000.0) if sharpness is None else sharpness
    boxes = choose_tiles(width, height, sharp.reshape(-1), np.zeros(shape).reshape(-1), TileConfig(**settings))
    return [Box(*box) for box in boxes.tolist()]


def test_small_pictures_stay_whole_and_large_ones_are_cut() -> None:
    assert choose(481, 321, size=256, whole_below=512) == [Box(0, 0, 481, 321)]
    assert choose(512, 512, size=256, whole_below=512) == [Box(x, y, 256, 256) for y in (0, 256) for x in (0, 256)]
    assert choose(4000, 3000, size=None) == [Box(0, 0, 4000, 3000)]


@pytest.mark.parametrize(("width", "height"), [(640, 427), (1411, 1411), (700, 200), (1024, 513)])
def test_tiles_lie_inside_aligned_and_apart(width: int, height: int) -> None:
    taken = np.zeros((height, width), dtype=int)
    for box in choose(width, height, size=256, whole_below=0, max_overlap=0.0):
        assert box.x % 16 == box.y % 16 == 0
        assert (box.width, box.height) == (256, min(256, height))
        assert box.x + box.width <= width and box.y + box.height <= height
        taken[box.y : box.y + box.height, box.x : box.x + box.width] += 1
    assert taken.max() == 1
    assert taken.sum() == (width // 256) * max(1, height // 256) * 256 * min(256, height)


def test_a_little_overlap_leaves_no_pixel_of_a_side_out() -> None:
    boxes = choose(2000, 1500, size=512)
    assert len(boxes) == 4 * 3
    taken = np.zeros((1500, 2000), dtype=int)
    for box in boxes:
        assert box.x % 16 == box.y % 16 == 0 and box.x + 512 <= 2000 and box.y + 512 <= 1500
        taken[box.y : box.y + 512, box.x : box.x + 512] += 1
    # All but what alignment costs at the far edges.
    assert (taken[:1488, :1984] > 0).all()
    # Three tiles of 512 in 1100 pixels would overlap by almost half.
    assert len(choose(1500, 1100, size=512, max_overlap=0.1)) == 3 * 2


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
    assert len(flat) == 0


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


def test_a_table_of_pictures_gets_the_tiles_that_each_gets_alone() -> None:
    rng = np.random.default_rng(0)
    config = TileConfig(size=256, whole_below=400, min_laplacian_variance=500, max_per_picture=3)
    rows = []
    for width, height in [(481, 321), (300, 200), (1411, 700), (1024, 1024), (640, 427)] * 3:
        count = max(1, width // CELL) * max(1, height // CELL)
        rows.append((width, height, rng.gamma(1, 500, count).astype(np.float32), rng.random(count, np.float32)))
    types = (pa.int32(), pa.int32(), pa.list_(pa.float32()), pa.list_(pa.float32()))
    table = pa.table([pa.array(column, kind) for column, kind in zip(zip(*rows), types)], names=list(COLUMNS))
    expected = [[Box(*box)._asdict() for box in choose_tiles(*row, config).tolist()] for row in rows]
    chosen = choose_all_tiles(table.slice(2), config)
    assert chosen.type == TILES_TYPE and chosen.to_pylist() == expected[2:]
    assert {len(tiles) for tiles in expected} >= {0, 1, 3}
    assert len(choose_all_tiles(table.slice(0, 0), config)) == 0
