import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from datagen.picture import crop
from datagen.picture.crop import JpegGrid, can_crop, crop_available, crop_jpeg, jpeg_grid
from datagen.picture.decode import PictureError
from datagen.source.embedded import corpus_files

pytestmark = pytest.mark.skipif(not crop_available(), reason="libturbojpeg is not installed")

MCU = {"Gray": (8, 8), "444": (8, 8), "422": (16, 8), "440": (8, 16), "420": (16, 16), "411": (32, 8)}
# Multiples of every MCU, of none, and smaller than two MCU.
SIZES = [(256, 192), (251, 187), (41, 23)]
PILLOW_SUBSAMPLING = {"444": 0, "422": 1, "420": 2}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """uint8 [427, 640, 3], all of it detail."""
    return np.asarray(Image.open(io.BytesIO(corpus_files("held_out")["flower.jpg"])).convert("RGB"))


@pytest.fixture
def coefficients(tmp_path: Path) -> Callable[[bytes], list[tuple[np.ndarray, np.ndarray]]]:
    """Reads each component, by another library: int16 [rows, columns, 8, 8] coefficients, quantisation table."""
    jpeglib = pytest.importorskip("jpeglib", reason="reads the coefficients that are compared")

    def read(data: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
        path = tmp_path / f"{hashlib.sha256(data).hexdigest()}.jpg"
        path.write_bytes(data)
        jpeg = jpeglib.read_dct(str(path))
        jpeg.load()
        planes = (jpeg.Y, jpeg.Cb, jpeg.Cr) if jpeg.has_chrominance else (jpeg.Y,)
        return [(plane, jpeg.get_component_qt(i)) for i, plane in enumerate(planes)]

    return read


def encode(pixels: np.ndarray, subsampling: str, quality: int = 90) -> bytes:
    if subsampling == "Gray":
        return pillow_jpeg(pixels, "L", quality=quality)
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", subsampling))


def pillow_jpeg(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def boxes_of(width: int, height: int, mcu: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """One MCU, the whole, up to each edge, inside, and inside with an end off the grid."""
    across, down = mcu
    x, y = (width - 1) // 2 // across * across, (height - 1) // 2 // down * down
    last_x, last_y = (width - 1) // across * across, (height - 1) // down * down
    boxes = [
        (0, 0, min(across, width), min(down, height)),
        (0, 0, width, height),
        (x, 0, width - x, height),
        (0, y, width, height - y),
        (last_x, last_y, width - last_x, height - last_y),
    ]
    if x and y:
        boxes += [(across, down, x, y), (across, down, x - 3, y - 5)]
    return boxes


def rgb(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", strict=True)


def require_same_coefficients(
    source: list[tuple[np.ndarray, np.ndarray]],
    tile: list[tuple[np.ndarray, np.ndarray]],
    box: tuple[int, int, int, int],
    mcu: tuple[int, int],
) -> None:
    x, y, width, height = box
    assert len(source) == len(tile)
    for i, ((from_source, source_table), (from_tile, tile_table)) in enumerate(zip(source, tile)):
        across, down = (8, 8) if i == 0 else mcu  # Pixels a block covers.
        rows = slice(y // down, -(-(y + height) // down))
        columns = slice(x // across, -(-(x + width) // across))
        np.testing.assert_array_equal(from_tile, from_source[rows, columns])
        np.testing.assert_array_equal(tile_table, source_table)


def require_same_pixels(source: np.ndarray, tile: np.ndarray, box: tuple[int, int, int, int], margin: int) -> None:
    """Equal but for ``margin`` pixels along those sides of the box that the picture goes on beyond."""
    x, y, width, height = box
    assert tile.shape == (height, width, 3)
    top, left = margin * (y > 0), margin * (x > 0)
    bottom = height - margin * (y + height < source.shape[0])
    right = width - margin * (x + width < source.shape[1])
    expected = source[y : y + height, x : x + width]
    np.testing.assert_array_equal(tile[top:bottom, left:right], expected[top:bottom, left:right])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("subsampling", MCU)
def test_tiles_hold_the_coefficients_and_pixels_of_their_source(
    photo: np.ndarray,
    coefficients: Callable[[bytes], list[tuple[np.ndarray, np.ndarray]]],
    subsampling: str,
    size: tuple[int, int],
) -> None:
    width, height = size
    data = encode(photo[100 : 100 + height, 200 : 200 + width], subsampling)
    assert jpeg_grid(data) == JpegGrid(width, height, *MCU[subsampling])
    boxes = boxes_of(width, height, MCU[subsampling])
    tiles = crop_jpeg(data, boxes)
    assert tiles is not None
    for box, tile in zip(boxes, tiles, strict=True):
        require_same_coefficients(coefficients(data), coefficients(tile), box, MCU[subsampling])
        # 4:1:1 chroma is replicated, 4:4:4 and grey have nothing to interpolate.
        require_same_pixels(rgb(data), rgb(tile), box, margin=subsampling in ("422", "440", "420"))
        assert simplejpeg.decode_jpeg_header(tile)[3] == subsampling


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}])
@pytest.mark.parametrize("subsampling", ["Gray", *PILLOW_SUBSAMPLING])
def test_every_huffman_coding_of_a_source_gives_the_same_baseline_tiles(
    photo: np.ndarray, subsampling: str, options: dict[str, Any]
) -> None:
    options = {"quality": 85} | options
    if subsampling == "Gray":
        plain, mode = pillow_jpeg(photo, "L", quality=85), "L"
    else:
        options["subsampling"] = PILLOW_SUBSAMPLING[subsampling]
        plain, mode = pillow_jpeg(photo, quality=85, subsampling=PILLOW_SUBSAMPLING[subsampling]), "RGB"
    coded = pillow_jpeg(photo, mode, **options)
    assert coded != plain
    boxes = boxes_of(photo.shape[1], photo.shape[0], MCU[subsampling])
    tiles = crop_jpeg(coded, boxes)
    assert tiles == crop_jpeg(plain, boxes)
    assert tiles is not None
    for tile in tiles:
        assert markers(tile) == [0xE0, *[0xDB] * (1 + (mode == "RGB")), 0xC0, *[0xC4] * (2 + 2 * (mode == "RGB")), 0xDA]


def markers(data: bytes) -> list[int]:
    """Second bytes of the markers from SOI, left out, to the first SOS."""
    found, at = [], 2
    while True:
        assert data[at] == 0xFF
        found.append(data[at + 1])
        if found[-1] == 0xDA:
            return found
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def test_arithmetic_coding_becomes_huffman(
    photo: np.ndarray, tmp_path: Path, coefficients: Callable[[bytes], list[tuple[np.ndarray, np.ndarray]]]
) -> None:
    jpeglib = pytest.importorskip("jpeglib", reason="writes the arithmetic coding")
    plain, path = tmp_path / "plain.jpg", tmp_path / "arithmetic.jpg"
    plain.write_bytes(encode(photo, "420"))
    jpeglib.version.set("turbo210")
    try:
        jpeglib.read_dct(str(plain)).write_dct(str(path), flags=["+ARITH_CODE"])
        data = path.read_bytes()
        assert b"\xff\xc9" in data
        tiles = crop_jpeg(data, [(16, 32, 128, 64)])
        assert tiles is not None
        require_same_coefficients(coefficients(data), coefficients(tiles[0]), (16, 32, 128, 64), (16, 16))
    finally:
        jpeglib.version.set("6b")
    assert 0xC0 in markers(tiles[0])


def test_metadata_is_dropped_and_the_jfif_header_kept(photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    data = pillow_jpeg(photo, quality=90, exif=exif, icc_profile=b"profile" * 9, comment=b"a comment", dpi=(300, 300))
    tiles = crop_jpeg(data, [(0, 0, 64, 64)])
    assert tiles is not None
    with Image.open(io.BytesIO(tiles[0])) as tile:
        assert set(tile.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi"}
        assert tile.size == (64, 64) and not tile.getexif()
    # Stored pixels, not turned ones: the box counts as the file does.
    np.testing.assert_array_equal(rgb(tiles[0])[:-1, :-1], rgb(data)[:63, :63])


def test_adobe_ycbcr_without_jfif_keeps_its_colours(photo: np.ndarray) -> None:
    data = encode(photo, "444")
    jfif = data.index(b"\xff\xe0")
    length = 2 + int.from_bytes(data[jfif + 2 : jfif + 4], "big")
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    source = data[:jfif] + adobe + data[jfif + length :]
    tiles = crop_jpeg(source, [(8, 8, 64, 64)])
    assert tiles is not None
    np.testing.assert_array_equal(rgb(tiles[0]), rgb(source)[8:72, 8:72])
    assert 0xEE not in markers(tiles[0]) and 0xE0 in markers(tiles[0])


def test_separate_and_coarse_quantisation_tables_are_kept(photo: np.ndarray) -> None:
    tables = [[1 + i for i in range(64)], [255 - i for i in range(64)], [3] * 64]
    data = pillow_jpeg(photo, qtables=tables, subsampling=0)
    tiles = crop_jpeg(data, [(16, 8, 96, 104)])
    assert tiles is not None
    np.testing.assert_array_equal(rgb(tiles[0]), rgb(data)[8:112, 16:112])
    with Image.open(io.BytesIO(data)) as source, Image.open(io.BytesIO(tiles[0])) as tile:
        assert tile.quantization == source.quantization  # type: ignore[attr-defined]


def test_grey_with_sampling_factors_of_its_own_has_8_pixel_units(photo: np.ndarray) -> None:
    data = bytearray(encode(photo, "Gray"))
    data[data.index(b"\xff\xc0") + 11] = 0x22  # A lone component's factors mean nothing; some encoders write 2x2.
    tiles = crop_jpeg(bytes(data), [(8, 24, 40, 48)])
    assert tiles is not None
    np.testing.assert_array_equal(rgb(tiles[0]), rgb(bytes(data))[24:72, 8:48])


def test_boxes_off_the_grid_or_the_picture_are_refused() -> None:
    grid = JpegGrid(251, 187, 16, 16)
    for box in [(0, 0, 251, 187), (16, 32, 235, 155), (240, 176, 11, 11), (16, 16, 1, 1)]:
        assert can_crop(grid, box)
    for box in [
        *((8, 0, 16, 16), (0, 8, 16, 16), (-16, 0, 16, 16), (0, -16, 32, 32)),
        *((240, 0, 12, 16), (0, 176, 16, 12), (256, 0, 16, 16), (0, 0, 0, 16), (0, 0, 16, -16)),
    ]:
        assert not can_crop(grid, box)


def test_one_box_that_cannot_be_cut_refuses_all(photo: np.ndarray) -> None:
    assert crop_jpeg(encode(photo, "420"), [(0, 0, 16, 16), (8, 0, 16, 16)]) is None
    assert crop_jpeg(encode(photo, "420"), []) == []


def test_other_colour_spaces_are_refused(photo: np.ndarray) -> None:
    cmyk = pillow_jpeg(photo, "CMYK")
    ycck = cmyk.replace(b"Adobe\x00\x64\x00\x00\x00\x00\x00", b"Adobe\x00\x64\x00\x00\x00\x00\x02")
    assert ycck != cmyk and simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    for data in (cmyk, ycck, pillow_jpeg(photo, keep_rgb=True)):
        assert jpeg_grid(data) is None
        assert crop_jpeg(data, [(0, 0, 64, 64)]) is None


@pytest.mark.parametrize(
    ("subsampling", "factors", "mcu"),
    [("444", [[1, 2], [1, 2], [1, 2]], (16, 8)), ("422", [[2, 2], [2, 1], [2, 1]], (16, 16))],
)
def test_unusual_sampling_factors_are_cut_on_their_own_grid_or_refused(
    photo: np.ndarray, tmp_path: Path, subsampling: str, factors: list[list[int]], mcu: tuple[int, int]
) -> None:
    jpeglib = pytest.importorskip("jpeglib", reason="writes the sampling factors")
    path = tmp_path / "factors.jpg"
    path.write_bytes(encode(photo[:192, :256], subsampling))
    jpeg = jpeglib.read_dct(str(path))
    jpeg.load()
    jpeg.content, jpeg.samp_factor = None, np.array(factors)
    jpeg.write_dct(str(path))
    data = path.read_bytes()
    assert simplejpeg.decode_jpeg_header(data)[3] == subsampling
    across, down = MCU[subsampling]
    assert mcu != (across, down)
    assert crop_jpeg(data, [(across * 3, down * 3, 64, 64)]) is None
    tiles = crop_jpeg(data, [(mcu[0] * 2, mcu[1] * 2, 64, 48)])
    if tiles is not None:
        x, y = mcu[0] * 2, mcu[1] * 2
        np.testing.assert_array_equal(rgb(tiles[0])[:, 1:-1], rgb(data)[y : y + 48, x + 1 : x + 63])


def test_a_quantisation_table_redefined_between_scans_is_refused(photo: np.ndarray) -> None:
    """Three grey JPEGs become the three scans of one: every component names table 0, each scan redefines it."""
    planes = np.asarray(Image.fromarray(photo).convert("YCbCr"))
    greys = [pillow_jpeg(planes[..., i], "L", quality=quality) for i, quality in enumerate((95, 60, 80))]

    def segment(data: bytes, marker: bytes) -> bytes:
        at = data.index(marker)
        return data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]

    frame = segment(greys[0], b"\xff\xc0")
    frame = b"\xff\xc0\x00\x11" + frame[4:9] + b"\x03" + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    data = b"\xff\xd8" + segment(greys[0], b"\xff\xe0") + segment(greys[0], b"\xff\xdb") + frame
    for component, grey in enumerate(greys, 1):
        huffman = grey[grey.index(b"\xff\xc4") : grey.index(b"\xff\xda")]
        scan = bytearray(grey[grey.index(b"\xff\xda") : -2])
        scan[5] = component
        data += segment(grey, b"\xff\xdb") + huffman + bytes(scan)
    data += b"\xff\xd9"
    assert np.abs(rgb(data).astype(int) - photo).mean() < 6
    assert crop_jpeg(data, [(0, 0, 64, 64)]) is None


def test_sixteen_bit_quantisation_tables_are_refused(photo: np.ndarray, tmp_path: Path) -> None:
    jpeglib = pytest.importorskip("jpeglib", reason="writes the quantisation tables")
    path = tmp_path / "coarse.jpg"
    path.write_bytes(encode(photo, "420"))
    jpeg = jpeglib.read_dct(str(path))
    jpeg.load()
    jpeg.content, jpeg.qt = None, jpeg.qt + 250
    jpeg.write_dct(str(path))
    assert 0xC1 in markers(path.read_bytes())
    assert crop_jpeg(path.read_bytes(), [(0, 0, 64, 64)]) is None


def test_twelve_bits_are_damage_to_an_eight_bit_decoder(photo: np.ndarray) -> None:
    data = bytearray(encode(photo, "420"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(PictureError, match="precision") as caught:
        crop_jpeg(bytes(data), [(0, 0, 64, 64)])
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_named_damaged_wherever_the_box_is(photo: np.ndarray, progressive: bool) -> None:
    data = pillow_jpeg(photo, quality=90, progressive=progressive)
    for length in [0, 1, 2, 20, 300, *range(700, len(data) - 2, len(data) // 23)]:
        with pytest.raises(PictureError) as caught:
            crop_jpeg(data[:length], [(0, 0, 16, 16)])
        assert caught.value.reason == "damaged" and caught.value.failed


def test_other_files_are_named_damaged() -> None:
    for data in (corpus_files("pictures")["text.png"], corpus_files("pictures")["moon.png"]):
        with pytest.raises(PictureError):
            crop_jpeg(data, [(0, 0, 16, 16)])


def mutate(data: bytes, seed: int) -> bytes:
    """Cut short, bits flipped, header bytes replaced, or a stretch taken out, in turn."""
    draw, mutated = random.Random(seed), bytearray(data)
    if seed % 4 == 0:
        return bytes(mutated[: draw.randrange(2, len(mutated))])
    if seed % 4 == 3:
        return bytes(mutated[: draw.randrange(len(mutated))] + mutated[draw.randrange(len(mutated)) :])
    for _ in range(draw.randrange(1, 20)):
        if seed % 4 == 1:
            mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)
        else:
            mutated[draw.randrange(2, 700)] = draw.randrange(256)
    return bytes(mutated)


def fuzz(count: int) -> None:
    """Print how many mutations were cut, refused and named damaged; anything else is an exception."""
    pixels = np.asarray(Image.open(io.BytesIO(corpus_files("held_out")["flower.jpg"])).convert("RGB"))[:256, :256]
    sources = [pillow_jpeg(pixels, progressive=progressive, quality=90) for progressive in (False, True)]
    outcomes = {"cut": 0, "refused": 0, "damaged": 0}
    for seed in range(count):
        data = mutate(sources[seed // 4 % 2], seed)
        try:
            tiles = crop_jpeg(data, [(0, 0, 64, 64), (32, 16, 80, 80)])
        except PictureError as error:
            outcomes[error.reason] += 1
        else:
            outcomes["refused" if tiles is None else "cut"] += 1
            for tile, side in zip(tiles or (), (64, 80)):
                assert simplejpeg.decode_jpeg(tile, strict=True).shape == (side, side, 3)
    print(json.dumps(outcomes))


def test_five_hundred_mutations_kill_no_process() -> None:
    code = "from tests.datagen.picture.test_crop import fuzz; fuzz(500)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    assert sum(outcomes.values()) == 500
    assert outcomes["damaged"] > 300 and outcomes["cut"] > 10


# Of rocket.jpg's tile at (128, 64), 256 x 192; the same with libturbojpeg 2.1.5 and 2.1.92 (3.0 beta).
PINNED = "57ab741067370ef1e0e3a745fd917a9952622e07a7fcbf8cb66be9e1bdea6c2f"


def test_the_bytes_are_the_same_in_every_thread_process_and_version(photo: np.ndarray) -> None:
    data = corpus_files("pictures")["rocket.jpg"]
    box = (128, 64, 256, 192)
    first = crop_jpeg(data, [box, (0, 0, 64, 64)])
    assert first is not None
    assert crop_jpeg(data, [box]) == first[:1]
    with ThreadPoolExecutor(4) as pool:
        assert all(tiles == first for tiles in pool.map(lambda _: crop_jpeg(data, [box, (0, 0, 64, 64)]), range(40)))
    code = (
        "import hashlib; from datagen.picture.crop import crop_jpeg; from datagen.source.embedded import corpus_files;"
        f"print(hashlib.sha256(crop_jpeg(corpus_files('pictures')['rocket.jpg'], [{box}])[0]).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.strip() == hashlib.sha256(first[0]).hexdigest() == PINNED, run.stderr


def test_a_machine_without_the_library_says_what_to_install(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop, "_library", lambda: None)
    assert not crop_available()
    assert crop_jpeg(encode(photo, "420"), [(8, 0, 16, 16)]) is None
    with pytest.raises(RuntimeError, match="libturbojpeg0"):
        crop_jpeg(encode(photo, "420"), [(0, 0, 16, 16)])
