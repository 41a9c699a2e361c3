"""Picture files: what is kept, what is applied, what is refused."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from pipeline.pictures import Picture, PictureError, find_pictures, read_picture, write_picture
from pipeline.samples import to_float, to_integers

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS = (".png", ".webp", ".tif", ".tiff")


def samples(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_samples_survive_the_way_through_floats(dtype: type) -> None:
    every = np.arange(np.iinfo(dtype).max + 1, dtype=dtype)
    assert (to_integers(to_float(every), dtype) == every).all()
    assert to_integers(np.float32([-0.2, 1.7]), dtype).tolist() == [0, np.iinfo(dtype).max]


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_lossless_formats_give_8_bit_pictures_back(tmp_path: Path, suffix: str, mode: str) -> None:
    stored = samples(20, 33, len(mode))
    source, copy = tmp_path / "a.png", tmp_path / f"b{suffix}"
    Image.fromarray(stored.squeeze(), mode).save(source, icc_profile=ICC)
    picture = read_picture(source)
    assert (picture.grey, picture.bits, picture.icc) == (mode in ("L", "LA"), 8, ICC)
    assert picture.pixels.shape == (20, 33, 3)
    assert (picture.alpha is not None) == mode.endswith("A")
    write_picture(copy, picture)
    with Image.open(copy) as image:
        assert image.info["icc_profile"] == ICC
        if suffix != ".webp":  # which stores grey as colours
            assert image.mode == mode
    again = read_picture(copy)
    assert (again.pixels == picture.pixels).all()
    if picture.alpha is not None:
        assert again.alpha is not None
        assert (again.alpha == picture.alpha).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_stay_16(tmp_path: Path, suffix: str, channels: int) -> None:
    values = to_float(samples(20, 33, channels, dtype=np.uint16))
    alpha = values[..., -1] if channels in (2, 4) else None
    pixels = np.repeat(values[..., :1], 3, axis=2) if channels <= 2 else values[..., :3]
    write_picture(tmp_path / f"a{suffix}", Picture(pixels, alpha, channels <= 2, 16, ICC))
    again = read_picture(tmp_path / f"a{suffix}")
    assert (again.bits, again.icc) == (16, ICC)
    assert (again.pixels == pixels).all()
    if alpha is not None:
        assert again.alpha is not None
        assert (again.alpha == alpha).all()


def test_16_bit_png_of_another_program(tmp_path: Path) -> None:
    stored = samples(12, 9, 3, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), stored[..., ::-1])
    picture = read_picture(tmp_path / "a.png")
    assert (to_integers(picture.pixels, np.uint16) == stored).all()


def test_grey_16_bit_png_with_transparency_stays_grey(tmp_path: Path) -> None:
    stored = samples(6, 5, 2, dtype=np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in stored)
    header = struct.pack(">IIBBBBB", 5, 6, 16, 4, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    picture = read_picture(tmp_path / "a.png")
    assert picture.grey
    assert (to_integers(picture.pixels[..., 0], np.uint16) == stored[..., 0]).all()
    assert picture.alpha is not None
    assert (to_integers(picture.alpha, np.uint16) == stored[..., 1]).all()


def test_jpeg_is_written_at_high_quality_with_its_profile(tmp_path: Path) -> None:
    smooth = np.stack(np.broadcast_arrays(np.linspace(0, 1, 64)[:, None], 0.5, np.linspace(1, 0, 48)), axis=2)
    write_picture(tmp_path / "a.jpg", Picture(smooth.astype(np.float32), icc=ICC))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "JPEG"
    again = read_picture(tmp_path / "a.jpg")
    assert again.icc == ICC
    assert np.abs(again.pixels - smooth).max() < 6 / 255


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[:8, 16:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How the file must store it, so that a reader who obeys the tag sees it upright.
    transpose = Image.Transpose
    inverse = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }
    image = Image.fromarray(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(inverse[orientation]) if orientation in inverse else image
    stored.save(tmp_path / f"a{suffix}", exif=exif, quality=100, subsampling=0)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.pixels.shape == upright.shape
    assert np.abs(picture.pixels - to_float(upright)).mean() < 0.05


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_of_16_bit_tiff_and_png(tmp_path: Path, orientation: int) -> None:
    upright = samples(16, 24, 3, dtype=np.uint16)
    stored = np.rot90(upright) if orientation == 6 else upright
    tag = [(0x0112, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extratags=tag, metadata=None)
    assert (to_integers(read_picture(tmp_path / "a.tif").pixels, np.uint16) == upright).all()


def test_the_first_picture_of_a_phones_jpeg_counts(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pictures[1:])
    assert to_integers(read_picture(tmp_path / "a.jpg").pixels)[0, 0].tolist() == [254, 0, 0]


def test_palette_bilevel_and_keyed_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(samples(8, 8, 3) // 64 * 64)
    image.quantize(16).save(tmp_path / "palette.png")
    assert not read_picture(tmp_path / "palette.png").grey
    Image.fromarray(samples(8, 8) > 127).save(tmp_path / "bilevel.png")
    bilevel = read_picture(tmp_path / "bilevel.png")
    assert bilevel.grey
    assert set(np.unique(bilevel.pixels)) == {0.0, 1.0}
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "keyed.png", transparency=(1, 2, 3))
    keyed = read_picture(tmp_path / "keyed.png")
    assert keyed.alpha is not None
    assert (keyed.alpha == 0).all()


def test_damaged_and_foreign_files_are_refused_by_name_of_the_fault(tmp_path: Path) -> None:
    Image.fromarray(samples(64, 64, 3)).save(tmp_path / "whole.jpg")
    cv2.imwrite(str(tmp_path / "whole16.png"), samples(64, 64, 3, dtype=np.uint16))
    Image.fromarray(samples(64, 64, 3)).save(tmp_path / "whole.tif")
    for name in ("whole.jpg", "whole16.png", "whole.tif"):
        cut = tmp_path / name.replace("whole", "cut")
        data = (tmp_path / name).read_bytes()
        cut.write_bytes(data[: len(data) // 2])
        with pytest.raises(PictureError, match="damaged"):
            read_picture(cut)
    (tmp_path / "text.png").write_text("no picture at all")
    with pytest.raises(PictureError, match="not a picture"):
        read_picture(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(PictureError, match="not a picture"):
        read_picture(tmp_path / "empty.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "cmyk.jpg")
    with pytest.raises(PictureError, match="CMYK"):
        read_picture(tmp_path / "cmyk.jpg")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="several pages"):
        read_picture(tmp_path / "two.tif")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.float32)
    with pytest.raises(PictureError, match="transparency"):
        write_picture(tmp_path / "a.jpg", Picture(pixels, alpha=pixels[..., 0]))
    with pytest.raises(PictureError, match="choose one of"):
        write_picture(tmp_path / "a.gif", Picture(pixels))
    assert list(tmp_path.iterdir()) == []


def test_find_pictures_is_sorted_recursive_and_blind_to_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/c.jpeg", "a/.tmp-x.png", ".cache/d.png", "notes.txt", "a/e.tiff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.as_posix() for path in find_pictures(tmp_path)] == ["a/c.jpeg", "a/e.tiff", "b.PNG"]
