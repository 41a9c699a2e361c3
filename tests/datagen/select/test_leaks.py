import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from datagen.config import ScanConfig, SelectConfig
from datagen.picture.decode import decode, read_header
from datagen.picture.perceptual_hash import grey_thumb, hashes, orient
from datagen.scan.row import measure_picture
from datagen.select.leaks import MIN_SIDE, Match, align, contained_spans, crop_spans, find_leaks, window_hashes
from datagen.source.embedded import corpus_files

NAMES = ("astronaut.png", "camera.png", "coins.png", "ihc.png", "motorcycle_left.png", "rocket.jpg")
Picture = np.ndarray  # uint8 RGB [H, W, 3]
Find = Callable[..., list[Match]]


@pytest.fixture(scope="module")
def photographs() -> list[Picture]:
    return [pixels(corpus_files("pictures")[name]) for name in NAMES]


def pixels(data: bytes) -> Picture:
    return decode(data, read_header(data, 10**8))[0]


def turned(picture: Picture, orientation: int) -> Picture:
    return np.stack([orient(picture[..., i], orientation) for i in range(3)], axis=-1)


def cut(picture: Picture, x0: float, x1: float, y0: float, y1: float) -> Picture:
    height, width = picture.shape[:2]
    return picture[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)]


def resaved(picture: Picture, scale: float = 0.7, quality: int = 70) -> bytes:
    small = cv2.resize(np.ascontiguousarray(picture[..., ::-1]), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def rows_of(files: list[bytes]) -> list[dict[str, Any]]:
    return [measure_picture(data, ScanConfig(niqe_patches=0)) for data in files]


def find(corpus: list[dict[str, Any]], guard: list[dict[str, Any]], **settings: Any) -> list[Match]:
    """The matches of inventory rows."""
    columns = ("verdict", "phash", "grey_thumb", "thumbnail")
    table = {name: [row[name] for row in guard] for name in columns}
    table["phash"] = pa.array([None if v is None else v.tolist() for v in table["phash"]], pa.list_(pa.uint64()))
    table["source"] = [f"guard-0/{i}" for i in range(len(guard))]
    for name in ("grey_thumb", "thumbnail"):
        table[name] = pa.array(table[name], pa.binary())

    def thumbnails(indices: np.ndarray) -> list[bytes | None]:
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()
        return [corpus[i]["thumbnail"] for i in indices]

    whole = np.array([row["phash"][0] for row in corpus], dtype=np.uint64)
    center = np.array([row["center_phash"] for row in corpus], dtype=np.uint64)
    return find_leaks(whole, center, thumbnails, pa.table(table), SelectConfig(**settings))


def test_copies_are_found_in_every_orientation_and_said_so(photographs: list[Picture]) -> None:
    guard = rows_of([resaved(picture, 1.0, 95) for picture in photographs])
    corpus = rows_of([resaved(turned(photographs[0], orientation)) for orientation in range(8)])
    matches = find(corpus, guard, leak_crops=False)
    assert [(match.row, match.guard) for match in matches] == [(i, 0) for i in range(8)]
    assert all(match.correlation > 0.97 and match.distance <= 6 for match in matches)
    assert [match.how for match in matches[:4]] == [
        *("copy", "copy, mirrored", "copy, mirrored top to bottom", "copy, rotated by 180 degrees"),
    ]
    # Against numpy's own word for a rotation to the left.
    left = next(o for o in range(8) if (turned(photographs[0], o) == np.rot90(photographs[0])).all())
    assert matches[left].how == "copy, rotated by 90 degrees to the left"


@pytest.mark.parametrize("orientation", [0, 1, 6])
def test_crops_are_found_either_way_round_with_their_place(photographs: list[Picture], orientation: int) -> None:
    boxes = [(0.0, 0.75, 0.25, 1.0), (0.1, 0.9, 0.05, 0.95), (0.2, 0.97, 0.0, 0.8), (0.13, 0.99, 0.19, 0.95)]
    # Not the rocket: one thin light in a dark sky, whose hash hangs on few pixels, so that a box may be missed.
    photographs = photographs[:-1]
    wholes = rows_of([resaved(turned(picture, orientation), 1.0, 90) for picture in photographs])
    for box in boxes:
        crops = rows_of([resaved(cut(picture, *box)) for picture in photographs])
        for corpus, guard, word in ((crops, wholes, "crop of"), (wholes, crops, "contains")):
            matches = find(corpus, guard)
            assert [(match.row, match.guard) for match in matches] == [(i, i) for i in range(len(photographs))]
            for match in matches:
                assert match.correlation > 0.95
                assert match.how.startswith(f"{word} the evaluation picture (")
                told = match.how.split("(")[1].split(")")[0].replace("..", ",").split(",")
                # The place is told in the whole picture, which here is the one that was turned.
                np.testing.assert_allclose([float(edge) for edge in told], box_after(box, orientation), atol=0.021)
    assert find(crops, wholes, leak_crops=False) == []


def box_after(box: tuple[float, ...], orientation: int) -> tuple[float, ...]:
    mask = np.zeros((1000, 1000), dtype=np.uint8)
    x0, x1, y0, y1 = (round(1000 * edge) for edge in box)
    mask[y0:y1, x0:x1] = 1
    rows, columns = np.nonzero(orient(mask, orientation))
    return (columns.min() / 1000, (columns.max() + 1) / 1000, rows.min() / 1000, (rows.max() + 1) / 1000)


def test_random_crops_are_nearly_all_found(photographs: list[Picture]) -> None:
    rng = np.random.default_rng(0)
    found = total = 0
    wholes = rows_of([resaved(picture, 1.0, 90) for picture in photographs])
    for _ in range(8):
        crops = []
        for picture in photographs:
            (width, height), (left, top) = rng.uniform(MIN_SIDE, 1, 2), rng.uniform(0, 1, 2)
            left, top = left * (1 - width), top * (1 - height)
            crop = turned(cut(picture, left, left + width, top, top + height), int(rng.integers(8)))
            crops.append(resaved(crop, rng.uniform(0.6, 1.1), int(rng.integers(60, 96))))
        rows = rows_of(crops)
        for matches in (find(rows, wholes), find(wholes, rows)):
            assert all(match.row == match.guard for match in matches)
            found, total = found + len(matches), total + len(rows)
    assert found >= 0.96 * total


def test_what_is_alike_only_in_its_coarse_shape_is_no_leak(photographs: list[Picture]) -> None:
    def blurred(picture: Picture) -> Picture:
        return cv2.GaussianBlur(cv2.resize(picture, (512, 512)).astype(np.float32), (0, 0), 20)

    first, second = (cv2.resize(photographs[i], (512, 512)) for i in (0, 1))
    chimera = np.clip(blurred(first) + (second - blurred(second)), 0, 255).astype(np.uint8)
    corpus, guard = rows_of([resaved(chimera)]), rows_of([resaved(first)])
    greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (chimera, first)]
    likeness = align(greys[0], greys[1], (0, 1, 0, 1))
    assert likeness is not None
    assert likeness[2] < 0.3
    low = likeness[1] - 0.01
    assert find(corpus, guard, leak_correlation=low, leak_radius=12) == []
    assert find(guard, guard, leak_correlation=low, leak_radius=12)[0].how == "copy"


def test_a_bare_picture_is_found_as_a_copy_but_never_as_a_crop() -> None:
    # A sky: it has a shape, and no details that could tell it from another.
    x, y = np.meshgrid(np.linspace(-1, 1, 480), np.linspace(-1, 1, 320))
    rng = np.random.default_rng(0)
    waves = sum(
        rng.normal() * np.cos(np.pi * (i * x + j * y) / 2 + rng.uniform(0, 6)) for i in range(3) for j in range(3)
    )
    sky = np.repeat((128 + 6 * np.asarray(waves))[..., None], 3, axis=2).astype(np.uint8)
    guard = rows_of([resaved(sky, 1.0, 95)])
    corpus = rows_of([resaved(sky), resaved(cut(sky, 0.0, 0.75, 0.25, 1.0))])
    assert [(match.row, match.how) for match in find(corpus, guard)] == [(0, "copy")]


def test_without_thumbnails_the_hash_alone_decides_on_whole_copies(photographs: list[Picture]) -> None:
    guard = rows_of([resaved(photographs[0], 1.0, 95)])
    corpus = rows_of([resaved(photographs[0]), resaved(cut(photographs[0], 0.1, 0.9, 0.1, 0.9))])
    taken_down = [row | {"thumbnail": None, "grey_thumb": None} for row in corpus]
    matches = find(taken_down, guard)
    assert [(match.row, match.guard, match.how) for match in matches] == [(0, 0, "copy")]
    assert math.isnan(matches[0].correlation)
    blind = find(corpus, [guard[0] | {"thumbnail": None, "grey_thumb": None}])
    assert [match.row for match in blind] == [0]
    assert math.isnan(blind[0].correlation)


def test_a_row_has_its_best_match_and_unmeasured_guards_none(photographs: list[Picture]) -> None:
    picture = photographs[0]
    failed = dict.fromkeys(rows_of([resaved(picture)])[0]) | {"verdict": "failed"}
    crop = resaved(cut(picture, 0.1, 0.9, 0.1, 0.9))
    guard = [failed, *rows_of([crop, resaved(picture, 1.0, 95), resaved(picture, 1.0, 95)])]
    corpus = rows_of([resaved(photographs[1]), resaved(picture), crop])
    matches = find(corpus, guard)
    assert [(match.row, match.guard) for match in matches] == [(1, 2), (2, 1)]
    assert matches == find(corpus, guard)
    assert find(corpus, [failed]) == []
    assert find([], guard) == []


@pytest.mark.parametrize("orientation", range(8))
def test_window_hashes_are_those_of_the_cut_out_windows(photographs: list[Picture], orientation: int) -> None:
    grey = cv2.cvtColor(cv2.resize(photographs[1], (160, 128)), cv2.COLOR_RGB2GRAY)
    spans = np.array([(0.0, 1.0), (0.25, 1.0), (0.125, 0.875)])
    packed, doubtful, windows = window_hashes(grey, spans)
    assert windows.tolist() == list(range(8 * 9))
    for down in range(3):
        for across in range(3):
            rows, columns = np.rint(spans[down] * 128).astype(int), np.rint(spans[across] * 160).astype(int)
            window = np.ascontiguousarray(grey[slice(*rows), slice(*columns)])
            place = (orientation * 3 + down) * 3 + across
            # Area means are rounded in the one and not in the other.
            difference = packed[place] ^ hashes(grey_thumb(window))[orientation]
            assert np.bitwise_count(difference) <= 2
            assert len(set(doubtful[place].tolist())) == doubtful.shape[1]


def test_flat_windows_have_no_hash() -> None:
    grey = np.full((120, 160), 90, dtype=np.uint8)
    assert len(window_hashes(grey, crop_spans(4))[0]) == 0
    grey[:, 140:] = np.arange(20) * 12
    windows = window_hashes(grey, crop_spans(4))[2]
    edges = crop_spans(4)
    assert (edges[windows % len(edges), 1] > 140 / 160).all()
    assert len(windows) > 0


def test_the_grid_lies_within_half_a_step_of_every_crop() -> None:
    rng = np.random.default_rng(0)
    spans, middles = crop_spans(6), contained_spans(6)
    half = (1 - MIN_SIDE) / 6 / 2
    for size, place in rng.uniform(0, 1, (500, 2)):
        size = MIN_SIDE + size * (1 - MIN_SIDE)
        start = place * (1 - size)
        crop = np.array([start, start + size])
        distance = np.abs(spans - crop).max(axis=1)
        # Where begin and end both lie between, the triangle's own edge may cut off the nearest corner.
        assert distance.min() <= 2 * half + 1e-9
        middle = (np.array([0.25, 0.75]) - start) / size
        assert np.abs(middles[distance.argmin()] - middle).max() <= 0.06
    assert np.ptp(spans, axis=1).min() == pytest.approx(MIN_SIDE)
    assert middles.min() >= 0
    assert middles.max() <= 1


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("IRD_REAL_DATA")
    if not folder:
        pytest.skip("IRD_REAL_DATA names no folder with bsd400/ and benchmarks/")
    return Path(folder)


def test_of_real_photographs_exactly_the_known_leak_is_found(real: Path) -> None:
    paths = sorted((real / "bsd400").glob("*.jpg"))
    guards = [*sorted((real / "benchmarks/set5").glob("*.png")), *sorted((real / "benchmarks/cbsd68").glob("*.png"))]
    corpus, guard = (rows_of([path.read_bytes() for path in part]) for part in (paths, guards))
    matches = find(corpus, guard)
    assert [(paths[match.row].name, guards[match.guard].name, match.how) for match in matches] == [
        ("302003.jpg", "img_005.png", "copy")
    ]
    assert matches[0].distance == 2
    assert matches[0].correlation > 0.99


def test_random_crops_of_real_photographs_are_nearly_all_found(real: Path) -> None:
    rng = np.random.default_rng(1)
    pictures = [pixels(path.read_bytes()) for path in sorted((real / "bsd400").glob("*.jpg"))[::10]]
    crops = []
    for picture in pictures:
        (width, height), (left, top) = rng.uniform(MIN_SIDE, 1, 2), rng.uniform(0, 1, 2)
        left, top = left * (1 - width), top * (1 - height)
        crops.append(resaved(turned(cut(picture, left, left + width, top, top + height), int(rng.integers(8))), 0.8))
    whole, cropped = rows_of([resaved(picture, 1.0, 90) for picture in pictures]), rows_of(crops)
    for corpus, guard in ((cropped, whole), (whole, cropped)):
        matches = find(corpus, guard)
        assert all(match.row == match.guard for match in matches)
        assert len(matches) >= 0.95 * len(pictures)
