import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datagen.picture import region
from datagen.picture.region import (
    Box,
    decode_region,
    decode_regions,
    decode_whole,
    picture_size,
    region_decode_available,
)
from datagen.source.embedded import corpus_files
from tests.datagen.picture.test_crop import mutate

needs_library = pytest.mark.skipif(not region_decode_available(), reason="libturbojpeg 3 is not installed")

SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
# Multiples of every MCU, of none, two MCU and a bit, one MCU, less than one.
SIZES = [(192, 160), (187, 151), (41, 33), (16, 16), (7, 5)]
CODINGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "optimised": {"optimize": True},
}


def reference(data: bytes) -> np.ndarray:
    """The decode that all others are held against, called here and nowhere else in this file."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return pixels


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """uint8 [427, 640, 3], all of it detail."""
    return np.asarray(Image.open(io.BytesIO(corpus_files("held_out")["flower.jpg"])).convert("RGB"))


def encode(pixels: np.ndarray, subsampling: str, quality: int = 90, **options: Any) -> bytes:
    if subsampling == "Gray":
        return saved(Image.fromarray(pixels).convert("L"), "JPEG", quality=quality, **options)
    if subsampling in ("440", "411") and not options:  # Pillow's encoder has no 4:4:0.
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling))
    name = ":".join(subsampling)
    return saved(Image.fromarray(pixels), "JPEG", quality=quality, subsampling=name, **options)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def placements(height: int, width: int, side: int) -> list[Box]:
    """A square at every place where left or top meets the picture's border or an MCU's, or is one pixel beside it."""
    side_y, side_x = min(side, height), min(side, width)

    def starts(length: int, part: int) -> list[int]:
        near = {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, length // 2, length - part - 1, length - part}
        return sorted(start for start in near if 0 <= start <= length - part)

    return [(top, left, side_y, side_x) for top in starts(height, side_y) for left in starts(width, side_x)]


def require_exact(data: bytes, boxes: list[Box]) -> None:
    whole = reference(data)
    assert picture_size(data) == whole.shape[:2]
    for top, left, height, width in boxes:
        part = decode_region(data, top, left, height, width)
        assert part.dtype == np.uint8 and part.shape == (height, width, 3)
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(part, expected, err_msg=f"{(top, left, height, width)}")


@pytest.fixture
def count_whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the length of every file that is decoded whole."""
    lengths: list[int] = []
    real = region.decode_whole

    def counted(data: bytes) -> np.ndarray:
        lengths.append(len(data))
        return real(data)

    monkeypatch.setattr(region, "decode_whole", counted)
    return lengths


@needs_library
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_region_is_bit_for_bit_that_of_the_whole(
    photo: np.ndarray, subsampling: str, size: tuple[int, int], count_whole: list[int]
) -> None:
    width, height = size
    data = encode(photo[100 : 100 + height, 200 : 200 + width], subsampling)
    assert simplejpeg.decode_jpeg_header(data)[3] == subsampling
    for side in (1, 8, 33, 128):
        require_exact(data, placements(height, width, side))
    require_exact(data, [(0, 0, height, width)])
    assert not count_whole  # The library did all of it.


@needs_library
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "Gray"])
def test_every_coding_of_a_jpeg_gives_the_same_region(
    photo: np.ndarray, subsampling: str, coding: str, count_whole: list[int]
) -> None:
    data = encode(photo[:151, :187], subsampling, **CODINGS[coding])
    require_exact(data, placements(151, 187, 50))
    assert not count_whole


@needs_library
@pytest.mark.parametrize("quality", [1, 30, 95, 100])
def test_every_quality_gives_the_same_region(photo: np.ndarray, quality: int, count_whole: list[int]) -> None:
    for subsampling in ("444", "420"):
        require_exact(encode(photo[:151, :187], subsampling, quality), placements(151, 187, 50))
    assert not count_whole


@pytest.fixture(scope="module")
def files(photo: np.ndarray) -> dict[str, bytes]:
    """Files of 320 x 240 by what they are."""
    pixels = np.ascontiguousarray(photo[100:340, 200:520])
    jpegs = {f"{s} {c}": encode(pixels, s, **CODINGS[c]) for s in ("444", "420", "Gray") for c in CODINGS}
    jpegs |= {s: encode(pixels, s) for s in ("422", "440", "411")}
    return jpegs | {"png": saved(Image.fromarray(pixels), "PNG"), "webp": saved(Image.fromarray(pixels), "WEBP")}


@pytest.fixture(scope="module")
def wholes(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {name: reference(data) for name, data in files.items()}


def boxes_inside(height: int, width: int) -> st.SearchStrategy[Box]:
    def interval(length: int) -> st.SearchStrategy[tuple[int, int]]:
        pairs = st.tuples(st.integers(0, length), st.integers(0, length)).filter(lambda pair: pair[0] != pair[1])
        return pairs.map(lambda pair: (min(pair), abs(pair[1] - pair[0])))

    return st.tuples(interval(height), interval(width)).map(lambda it: (it[0][0], it[1][0], it[0][1], it[1][1]))


@given(st.data())
def test_any_boxes_of_any_file_are_parts_of_the_whole(
    files: dict[str, bytes], wholes: dict[str, np.ndarray], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    boxes = data.draw(st.lists(boxes_inside(240, 320), min_size=1, max_size=5))
    parts = decode_regions(files[name], boxes)
    for (top, left, height, width), part in zip(boxes, parts, strict=True):
        np.testing.assert_array_equal(part, wholes[name][top : top + height, left : left + width])


def test_no_boxes_need_no_decode(count_whole: list[int]) -> None:
    assert decode_regions(b"never looked at", []) == []
    assert not count_whole


def test_real_photographs() -> None:
    folder = os.environ.get("IRD_REAL_DATA")
    if not folder:
        pytest.skip("IRD_REAL_DATA names no folder of photographs")
    paths = sorted(Path(folder).glob("bsd400/*.jpg"))
    assert paths
    for index, path in enumerate(paths[::8]):
        data, rng = path.read_bytes(), np.random.default_rng(index)
        height, width = reference(data).shape[:2]
        sides = [int(side) for side in rng.integers(1, 129, 6)]
        require_exact(data, [(int(rng.integers(height - s)), int(rng.integers(width - s)), s, s) for s in sides])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_exif_turns_is_cut_upright(photo: np.ndarray, file_format: str, orientation: int) -> None:
    image = Image.fromarray(photo[:50, :100])
    exif = image.getexif()
    exif[274] = orientation
    data = saved(image, file_format, exif=exif)
    assert decode_whole(data).shape == ((100, 50, 3) if orientation >= 5 else (50, 100, 3))
    require_exact(data, placements(reference(data).shape[0], reference(data).shape[1], 20))


def test_modes_that_only_opencv_makes_rgb_of(photo: np.ndarray, count_whole: list[int]) -> None:
    image = Image.fromarray(photo[:64, :80])
    rgba = image.copy()
    rgba.putalpha(image.convert("L"))
    for data in (
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "JPEG", keep_rgb=True),
        saved(image.convert("L"), "PNG"),
        saved(image.convert("P"), "PNG"),
        saved(rgba, "PNG"),
        saved(image, "BMP"),
        saved(image, "WEBP", lossless=True),
    ):
        require_exact(data, [(3, 5, 40, 50), (0, 0, 64, 80)])
    assert count_whole


@pytest.mark.parametrize("factors", [b"\x21\x12\x11", b"\x22\x21\x21"])
def test_sampling_factors_that_are_no_usual_subsampling(photo: np.ndarray, factors: bytes) -> None:
    data = bytearray(encode(photo[:64, :80], "420"))
    for i, factor in enumerate(factors):
        data[data.index(b"\xff\xc0") + 11 + 3 * i] = factor
    require_exact(bytes(data), placements(64, 80, 20))


@pytest.mark.parametrize(
    "box", [(-1, 0, 8, 8), (0, -1, 8, 8), (0, 0, 0, 8), (0, 0, 8, 0), (33, 0, 32, 8), (0, 73, 8, 8)]
)
@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_a_region_outside_is_refused_with_the_size(photo: np.ndarray, name: str, box: Box) -> None:
    data = encode(photo[:64, :80], "444") if name == "jpeg" else saved(Image.fromarray(photo[:64, :80]), "PNG")
    with pytest.raises(ValueError, match=r"not inside a picture of height 64 and width 80"):
        decode_region(data, *box)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"<html></html>", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_picture_is_said_to_be_none(data: bytes) -> None:
    for call in (decode_whole, picture_size, lambda it: decode_region(it, 0, 0, 1, 1)):
        with pytest.raises(ValueError, match="not a picture"):
            call(data)


@pytest.mark.parametrize("coding", ["baseline", "progressive"])
@pytest.mark.parametrize("box", [(0, 0, 16, 16), (100, 100, 28, 28)])
def test_a_file_cut_short_is_refused_wherever_the_region_lies(photo: np.ndarray, coding: str, box: Box) -> None:
    data = encode(photo[:128, :128], "444", **CODINGS[coding])
    for length in [0, 1, 2, 20, 300, *range(700, len(data) - 2, len(data) // 23)]:
        with pytest.raises(ValueError, match="not a picture"):
            decode_region(data[:length], *box)


def fuzz(count: int) -> None:
    """Print how many mutations were decoded alike, otherwise (they have damage), and refused; all else raises."""
    pixels = np.asarray(Image.open(io.BytesIO(corpus_files("held_out")["flower.jpg"])).convert("RGB"))[:256, :256]
    sources = [encode(pixels, "420", progressive=progressive) for progressive in (False, True)]
    outcomes = {"alike": 0, "otherwise": 0, "refused": 0}
    for seed in range(count):
        data = mutate(sources[seed // 4 % 2], seed)
        try:
            part = decode_region(data, 40, 48, 64, 64)
        except ValueError:
            outcomes["refused"] += 1
            continue
        whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        alike = whole is not None and np.array_equal(part, whole[40:104, 48:112])
        outcomes["alike" if alike else "otherwise"] += 1
    # What damage did to the handle must not show in the next picture.
    assert np.array_equal(decode_region(sources[0], 40, 48, 64, 64), reference(sources[0])[40:104, 48:112])
    print(json.dumps(outcomes))


def test_six_hundred_mutations_kill_no_process() -> None:
    code = "from tests.datagen.picture.test_region import fuzz; fuzz(600)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 600
    assert outcomes["refused"] > 150 and outcomes["alike"] > 100


@needs_library
def test_threads_and_forks_have_handles_of_their_own(files: dict[str, bytes], wholes: dict[str, np.ndarray]) -> None:
    def many(seed: int) -> bool:
        draw, names = random.Random(seed), sorted(files)
        for _ in range(20):
            name, top, left = draw.choice(names), draw.randrange(140), draw.randrange(220)
            part = decode_region(files[name], top, left, 100, 100)
            if not np.array_equal(part, wholes[name][top : top + 100, left : left + 100]):
                return False
        return True

    def in_a_fork(seed: int, answers: Any) -> None:
        answers.put(many(seed))

    assert many(0)
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    with ThreadPoolExecutor(4) as pool:
        busy = pool.map(many, range(1, 17))
        children = [fork.Process(target=in_a_fork, args=(seed, answers), daemon=True) for seed in range(4)]
        for child in children:
            child.start()
        assert all(busy)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert all(answers.get() for _ in children)
    assert many(17)


def test_a_machine_without_the_library_gives_the_same_pixels(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, count_whole: list[int]
) -> None:
    monkeypatch.setattr(region, "_library", lambda: None)
    assert not region_decode_available()
    require_exact(encode(photo[:64, :80], "420"), [(3, 5, 40, 50), (0, 0, 64, 80)])
    assert len(count_whole) == 2
