"""One file of every bad or odd kind that a crawl brings, with the fate that ``datagen.picture.decode`` promises it."""

import functools
import io
import random
import struct
import zipfile
import zlib

import numpy as np
import tifffile
from PIL import Image, ImageCms

from datagen.source.embedded import corpus_files

# Bytes, verdict (measured, rejected, failed), and the reason; for what is measured, the conversions.
Fate = tuple[bytes, str, str | tuple[str, ...]]

WIDTH, HEIGHT = 192, 128


@functools.cache
def bad_pictures() -> dict[str, Fate]:
    """File name to content and fate. Every picture has 192x128 pixels, beyond the usual limits of size, or no size.

    The limit of pixels must lie between 10^5 and Pillow's own of 178 million.
    """
    return {**_no_pictures(), **_jpegs(), **_pngs(), **_webps(), **_gifs(), **_tiffs(), **_plain(), **_turned()}


@functools.cache
def odd_shapes() -> dict[str, Fate]:
    """Good files whose shape a scan's limits of size or aspect refuse, and that must not break a decoder."""
    pixel, line = photo().resize((1, 1)), photo().resize((1, 300))
    strip = photo().resize((6000, 2))
    shapes: dict[str, Fate] = {}
    for format in ("PNG", "BMP", "TIFF", "PPM"):
        for name, image in (("pixel", pixel), ("line", line), ("strip", strip)):
            shapes[f"{name}.{format.lower()}"] = (encode(image, format), "measured", ())
    for name, image in (("pixel", pixel), ("line", line), ("strip", strip)):
        shapes[f"{name}.jpg"] = (encode(image, "JPEG"), "measured", ())
        shapes[f"{name}.webp"] = (encode(image, "WEBP", lossless=True), "measured", ())
        shapes[f"{name}.gif"] = (encode(image, "GIF"), "measured", ("palette_to_rgb",))
    return shapes


@functools.cache
def photo() -> Image.Image:
    """The photograph of which all others are made, RGB."""
    original = Image.open(io.BytesIO(corpus_files("pictures")["astronaut.png"]))
    # Through an array, or Pillow would put the original's profile into every file.
    return Image.fromarray(np.asarray(original.convert("RGB").resize((WIDTH, HEIGHT))))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def srgb_profile() -> bytes:
    """An ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def display_p3_profile() -> bytes:
    """That of sRGB with the primaries of Display P3 (SMPTE EG 432-1), adapted to D50."""
    return _with_primaries((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


def linear_profile(description: str) -> bytes:
    """Grey of gamma 1.0 under any description."""
    return _grey_profile(1.0, description)


def png(width: int, height: int, bits: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG of given chunks between its header and its end; ``colour`` is 0 grey, 2 RGB, 3 palette, 4 LA, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IEND", b"")])


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def inverted(data: bytes, position: int, count: int) -> bytes:
    """``data`` with ``count`` bytes from ``position`` on inverted."""
    middle = bytes(byte ^ 0xFF for byte in data[position : position + count])
    return data[:position] + middle + data[position + count :]


def scans_of(data: bytes) -> list[int]:
    """Where the scans of a JPEG without thumbnail begin."""
    return [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    whole = encode(photo(), "JPEG", progressive=True)
    last = whole[scans_of(whole)[-1] : -2]
    return whole[:-2] + last * scans + b"\xff\xd9"


def _no_pictures() -> dict[str, Fate]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("photo.jpg", encode(photo(), "JPEG"))
    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    box = b"\0\0\0\x20ftyp%s\0\0\0\0mif1miafMiHB\0\0\0\0" + bytes(400)
    return {
        "empty.jpg": (b"", "failed", "empty"),
        "one_byte.jpg": (b"\xff", "failed", "not_a_picture"),
        "zeros.jpg": (bytes(5000), "failed", "not_a_picture"),
        "noise.jpg": (random.Random(1).randbytes(5000), "failed", "not_a_picture"),
        "html.jpg": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "failed", "not_a_picture"),
        "text.png": (b"This is a text file with the name of a picture.\n", "failed", "not_a_picture"),
        "zip.png": (archive.getvalue(), "failed", "not_a_picture"),
        "svg.png": (svg, "rejected", "unsupported_format"),
        "heic.jpg": (box % b"heic", "rejected", "unsupported_format"),
        "avif.jpg": (box % b"avif", "rejected", "unsupported_format"),
        "jpeg2000.jpg": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "rejected", "unsupported_format"),
        "jpegxl.jpg": (b"\xff\x0a" + bytes(100), "rejected", "unsupported_format"),
        "photoshop.tif": (b"8BPS\0\1" + bytes(100), "rejected", "unsupported_format"),
    }


def _jpegs() -> dict[str, Fate]:
    whole = encode(photo(), "JPEG", quality=95)
    progressive = encode(photo(), "JPEG", quality=95, progressive=True)
    grey = encode(photo().convert("L"), "JPEG", quality=95)
    cmyk = encode(photo().convert("CMYK"), "JPEG")
    # The last byte of Adobe's segment says how the four channels are coded: 0 as they are, 2 as YCCK.
    adobe = cmyk.index(b"Adobe") + 11
    frame = whole.index(b"\xff\xc0")
    second, third = scans_of(progressive)[1:3]
    start = whole.index(b"\xff\xda") + 14
    files: dict[str, Fate] = {
        f"cut_{share}.jpg": (whole[: len(whole) * share // 100], "failed", "damaged") for share in (1, 10, 60, 99)
    }
    for seed in range(5):
        # Not in the last rows, where damage may end with the picture before a decoder could notice.
        position = random.Random(seed).randrange(start, len(whole) * 3 // 4)
        files[f"flipped_{seed}.jpg"] = (inverted(whole, position, 400), "failed", "damaged")
    broken_exif = b"\xff\xe1" + struct.pack(">H", 2 + 70) + b"Exif\0\0II*\0" + bytes([255] * 60)
    return files | {
        "baseline.jpg": (whole, "measured", ()),
        "named_wrongly.png": (whole, "measured", ()),
        "without_end_marker.jpg": (whole[:-2], "failed", "damaged"),
        "garbage_after_end.jpg": (whole + b"\0garbage\xff\xda" * 300, "measured", ()),
        "zeroed_half.jpg": (whole[: len(whole) // 2] + bytes(len(whole) // 2), "failed", "damaged"),
        "header_only.jpg": (whole[:start], "failed", "damaged"),
        "without_tables.jpg": (_without_segment(whole, 0xDB), "failed", "damaged"),
        "bomb.jpg": (_at(whole, frame + 5, struct.pack(">HH", 60000, 60000)), "rejected", "too_many_pixels"),
        "scan_bomb.jpg": (scan_bomb(2000), "rejected", "too_many_scans"),
        "zero_height.jpg": (_at(whole, frame + 5, struct.pack(">HH", 0, 192)), "failed", "damaged"),
        "twelve_bits.jpg": (_at(whole, frame + 4, b"\x0c"), "rejected", "unsupported_mode"),
        "lossless.jpg": (_at(whole, frame + 1, b"\xc3"), "rejected", "unsupported_mode"),
        "arithmetic.jpg": (_at(whole, frame + 1, b"\xc9"), "rejected", "unsupported_mode"),
        "progressive.jpg": (progressive, "measured", ()),
        "progressive_cut_between_scans.jpg": (progressive[:third], "failed", "damaged"),
        "progressive_cut_in_scan.jpg": (progressive[: (second + third) // 2], "failed", "damaged"),
        "grey.jpg": (grey, "measured", ("grey_to_rgb",)),
        "grey_cut.jpg": (grey[: len(grey) // 2], "failed", "damaged"),
        "rgb_coded.jpg": (encode(photo(), "JPEG", keep_rgb=True), "measured", ()),
        "cmyk.jpg": (cmyk, "rejected", "unsupported_mode"),
        "ycck.jpg": (_at(cmyk, adobe, b"\2"), "rejected", "unsupported_mode"),
        "multi_picture.jpg": (
            encode(photo(), "MPO", save_all=True, append_images=[photo().rotate(180)]),
            "measured",
            (),
        ),
        "broken_exif.jpg": (whole[:2] + broken_exif + whole[2:], "measured", ()),
        "srgb_profile.jpg": (encode(photo(), "JPEG", icc_profile=srgb_profile()), "measured", ()),
        "adobe_rgb.jpg": (encode(photo(), "JPEG", icc_profile=_adobe_rgb_profile()), "measured", ("icc_to_srgb",)),
        "display_p3.jpg": (encode(photo(), "JPEG", icc_profile=display_p3_profile()), "measured", ("icc_to_srgb",)),
        "broken_profile.jpg": (
            encode(photo(), "JPEG", icc_profile=srgb_profile()[:100] + bytes(300)),
            "measured",
            ("icc_ignored",),
        ),
        "cmyk_profile_on_rgb.jpg": (
            encode(photo(), "JPEG", icc_profile=_at(srgb_profile(), 16, b"CMYK")),
            "measured",
            ("icc_ignored",),
        ),
        "grey_profile.jpg": (
            encode(photo().convert("L"), "JPEG", icc_profile=linear_profile("grey")),
            "measured",
            ("grey_to_rgb", "icc_to_srgb"),
        ),
        "grey_rgb_profile.jpg": (
            encode(photo().convert("L"), "JPEG", icc_profile=srgb_profile()),
            "measured",
            ("grey_to_rgb",),
        ),
        "profiled_cut.jpg": (encode(photo(), "JPEG", icc_profile=srgb_profile())[:-900], "failed", "damaged"),
        "profiled_flipped.jpg": (
            inverted(encode(photo(), "JPEG", quality=95, icc_profile=_adobe_rgb_profile()), 9000, 400),
            "failed",
            "damaged",
        ),
    }


def _pngs() -> dict[str, Fate]:
    whole = encode(photo(), "PNG")
    stored = encode(photo(), "PNG", compress_level=0)
    pixels = np.asarray(photo())
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    good = chunk(b"IDAT", zlib.compress(rows))
    inflated = zlib.compressobj(1)
    bomb = b"".join(inflated.compress(bytes(1 << 20)) for _ in range(100)) + inflated.flush()
    wide = pixels.astype(np.uint16) * 257
    grey = photo().convert("L")
    palette = photo().quantize(64)
    opaque, clear = photo().copy(), photo().copy()
    opaque.putalpha(255)
    clear.putalpha(200)

    def sixteen(values: np.ndarray, colour: int, *extra: bytes) -> bytes:
        coded = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
        return png(WIDTH, HEIGHT, 16, colour, *extra, chunk(b"IDAT", zlib.compress(coded)))

    key = chunk(b"tRNS", struct.pack(">H", int(wide[0, 0, 0])))
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    return {
        "good.png": (whole, "measured", ()),
        "cut_in_pixels.png": (whole[: len(whole) // 2], "failed", "damaged"),
        "cut_in_header.png": (whole[:20], "failed", "damaged"),
        "without_end.png": (whole[:-12], "failed", "damaged"),
        "garbage_after_end.png": (whole + b"garbage" * 100, "measured", ()),
        "header_checksum.png": (_at(whole, 29, b"\0\0\0\0"), "failed", "damaged"),
        "pixel_checksum.png": (inverted(stored, len(stored) // 2, 1), "failed", "damaged"),
        "text_checksum.png": (
            png(WIDTH, HEIGHT, 8, 2, inverted(chunk(b"tEXt", b"a\0text"), 12, 1), good),
            "failed",
            "damaged",
        ),
        "wrong_zlib.png": (
            png(WIDTH, HEIGHT, 8, 2, chunk(b"IDAT", inverted(zlib.compress(rows), 3000, 9))),
            "failed",
            "damaged",
        ),
        "no_zlib.png": (png(WIDTH, HEIGHT, 8, 2, chunk(b"IDAT", rows)), "failed", "damaged"),
        "too_few_rows.png": (png(WIDTH, HEIGHT, 8, 2, chunk(b"IDAT", zlib.compress(rows[:5000]))), "failed", "damaged"),
        "no_pixels.png": (png(WIDTH, HEIGHT, 8, 2), "failed", "damaged"),
        "bomb.png": (png(60000, 60000, 8, 2, good), "rejected", "too_many_pixels"),
        "pixels_bomb.png": (png(WIDTH, HEIGHT, 8, 2, chunk(b"IDAT", bomb)), "measured", ()),
        "text_bomb.png": (
            png(WIDTH, HEIGHT, 8, 2, chunk(b"zTXt", b"a\0\0" + bomb), good),
            "rejected",
            "metadata_too_large",
        ),
        "profile_bomb.png": (
            png(WIDTH, HEIGHT, 8, 2, chunk(b"iCCP", b"a\0\0" + bomb), good),
            "rejected",
            "metadata_too_large",
        ),
        "text_bombs.png": (
            png(WIDTH, HEIGHT, 8, 2, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(999_999)))] * 99, good),
            "rejected",
            "metadata_too_large",
        ),
        "sixteen_bit_rgb.png": (sixteen(wide.reshape(HEIGHT, -1), 2), "measured", ("16bit_to_8bit",)),
        "sixteen_bit_grey.png": (sixteen(wide[..., 0], 0), "measured", ("16bit_to_8bit", "grey_to_rgb")),
        "sixteen_bit_key.png": (sixteen(wide[..., 0], 0, key), "rejected", "transparent"),
        "sixteen_bit_alpha.png": (
            sixteen(np.concatenate([wide, alpha], axis=2).reshape(HEIGHT, -1), 6),
            "measured",
            ("16bit_to_8bit", "opaque_alpha_dropped"),
        ),
        "sixteen_bit_grey_profile.png": (
            sixteen(wide[..., 0], 0, chunk(b"iCCP", b"a\0\0" + zlib.compress(linear_profile("grey")))),
            "measured",
            ("16bit_to_8bit", "grey_to_rgb", "icc_to_srgb"),
        ),
        "grey.png": (encode(grey, "PNG"), "measured", ("grey_to_rgb",)),
        "bilevel.png": (encode(photo().convert("1"), "PNG"), "rejected", "unsupported_mode"),
        "palette.png": (encode(palette, "PNG"), "measured", ("palette_to_rgb",)),
        "palette_transparent.png": (encode(palette, "PNG", transparency=palette.getpixel((9, 9))), *_TRANSPARENT),
        "palette_key_unused.png": (
            encode(palette, "PNG", transparency=255),
            "measured",
            ("opaque_alpha_dropped", "palette_to_rgb"),
        ),
        "grey_alpha_opaque.png": (
            encode(grey.convert("LA"), "PNG"),
            "measured",
            ("opaque_alpha_dropped", "grey_to_rgb"),
        ),
        "rgb_alpha_opaque.png": (encode(opaque, "PNG"), "measured", ("opaque_alpha_dropped",)),
        "rgb_alpha_clear.png": (encode(clear, "PNG"), *_TRANSPARENT),
        "rgb_key_used.png": (encode(photo(), "PNG", transparency=photo().getpixel((5, 5))), *_TRANSPARENT),
        "animated.png": (encode(photo(), "PNG", save_all=True, append_images=[photo().rotate(9)]), *_SEVERAL),
        "display_p3.png": (encode(photo(), "PNG", icc_profile=display_p3_profile()), "measured", ("icc_to_srgb",)),
        "srgb_profile.png": (encode(photo(), "PNG", icc_profile=srgb_profile()), "measured", ()),
    }


def _webps() -> dict[str, Fate]:
    lossy, lossless = encode(photo(), "WEBP", quality=90), encode(photo(), "WEBP", lossless=True)
    opaque, clear = photo().copy(), photo().copy()
    opaque.putalpha(255)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    size = lossless.index(b"VP8L") + 9
    bomb = _at(lossless, size, struct.pack("<I", 16382 | 16382 << 14))
    return {
        "lossy.webp": (lossy, "measured", ()),
        "lossless.webp": (lossless, "measured", ()),
        "cut.webp": (lossy[: len(lossy) // 2], "failed", "damaged"),
        "cut_at_end.webp": (lossy[:-1], "failed", "damaged"),
        "lossless_cut.webp": (lossless[: len(lossless) // 2], "failed", "damaged"),
        # Not noticed: WebP carries no checksum, and these zeros are codes like any other.
        "lossless_zeroed.webp": (lossless[:2000] + bytes(len(lossless) - 2000), "measured", ()),
        "garbage_after_end.webp": (lossy + b"garbage" * 100, "measured", ()),
        "opaque.webp": (encode(opaque, "WEBP", lossless=True), "measured", ()),  # libwebp drops such alpha itself.
        "transparent.webp": (encode(clear, "WEBP"), *_TRANSPARENT),
        "animated.webp": (encode(photo(), "WEBP", save_all=True, append_images=[photo().rotate(9)]), *_SEVERAL),
        "bomb.webp": (bomb, "rejected", "too_many_pixels"),
        "display_p3.webp": (encode(photo(), "WEBP", icc_profile=display_p3_profile()), "measured", ("icc_to_srgb",)),
    }


def _gifs() -> dict[str, Fate]:
    whole = encode(photo(), "GIF")
    first_block = whole.index(b",", 13 + 768) + 11
    palette = photo().quantize(64)
    animated = encode(photo(), "GIF", save_all=True, append_images=[photo().rotate(9)])
    return {
        "static.gif": (whole, "measured", ("palette_to_rgb",)),
        "cut.gif": (whole[: len(whole) // 2], "failed", "damaged"),
        "without_trailer.gif": (whole[:-1], "failed", "damaged"),
        "flipped.gif": (inverted(whole, first_block + 20 * 256 + 1, 200), "failed", "damaged"),
        "garbage_after_end.gif": (whole + b"garbage" * 100, "measured", ("palette_to_rgb",)),
        "animated.gif": (animated, *_SEVERAL),
        "transparent.gif": (encode(palette, "GIF", transparency=palette.getpixel((9, 9))), *_TRANSPARENT),
        "bomb.gif": (_at(whole, 6, struct.pack("<HH", 20000, 20000)), "rejected", "too_many_pixels"),
    }


def _tiffs() -> dict[str, Fate]:
    pixels = np.asarray(photo())
    grey = pixels[..., 1]
    wide = pixels.astype(np.uint16) * 257
    plain = encode(photo(), "TIFF")
    deflated = encode(photo(), "TIFF", compression="tiff_adobe_deflate")
    lzw = encode(photo(), "TIFF", compression="tiff_lzw")
    clear = photo().copy()
    clear.putalpha(200)

    def written(values: np.ndarray, **options: object) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, **options)
        return buffer.getvalue()

    return {
        "plain.tif": (plain, "measured", ()),
        "plain_cut.tif": (plain[: len(plain) // 2], "failed", "damaged"),
        "header_only.tif": (plain[:8], "failed", "damaged"),
        "lzw.tif": (lzw, "measured", ()),
        "lzw_cut.tif": (lzw[:8] + lzw[20000:], "failed", "damaged"),
        "deflate.tif": (deflated, "measured", ()),
        "deflate_flipped.tif": (inverted(deflated, 28000, 100), "failed", "damaged"),
        "packbits.tif": (encode(photo(), "TIFF", compression="packbits"), "measured", ()),
        "jpeg_inside.tif": (encode(photo(), "TIFF", compression="jpeg"), "rejected", "unsupported_format"),
        "zstd.tif": (encode(photo(), "TIFF", compression="zstd"), "rejected", "unsupported_format"),
        "tiled.tif": (written(pixels, tile=(64, 64)), "measured", ()),
        "planar.tif": (written(pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), "measured", ()),
        "big.tif": (written(pixels, bigtiff=True), "measured", ()),
        "pages.tif": (written(np.stack([pixels, pixels]), photometric="rgb"), *_SEVERAL),
        "white_is_zero.tif": (written(255 - grey, photometric="miniswhite"), "measured", ("grey_to_rgb",)),
        "white_is_zero_16.tif": (written(wide[..., 1], photometric="miniswhite"), *_MODE),
        "sixteen_bit.tif": (written(wide), "measured", ("16bit_to_8bit",)),
        "sixteen_bit_grey.tif": (written(wide[..., 1]), "measured", ("16bit_to_8bit", "grey_to_rgb")),
        "signed.tif": (written(wide[..., 1].astype(np.int16)), *_MODE),
        "thirty_two_bit.tif": (written(wide[..., 1].astype(np.uint32)), *_MODE),
        "float.tif": (written(grey.astype(np.float32)), *_MODE),
        "double.tif": (written(grey.astype(np.float64)), *_MODE),
        "float_rgb.tif": (written(pixels.astype(np.float32), photometric="rgb"), *_MODE),
        "bilevel.tif": (encode(photo().convert("1"), "TIFF"), *_MODE),
        "cmyk.tif": (encode(photo().convert("CMYK"), "TIFF"), *_MODE),
        "lab.tif": (encode(photo().convert("LAB"), "TIFF"), *_MODE),
        "transparent.tif": (encode(clear, "TIFF"), *_TRANSPARENT),
        "five_channels.tif": (
            written(np.dstack([pixels, grey, grey]), photometric="rgb", extrasamples=["unspecified"] * 2),
            "measured",
            ("extra_channels_dropped",),
        ),
        "raw_preview.tif": (encode(photo(), "TIFF", tiffinfo={254: 1}), "rejected", "unsupported_format"),
        "digital_negative.tif": (_digital_negative(), "rejected", "unsupported_format"),
        "canon_raw.tif": (b"II*\0\x10\0\0\0CR\2\0" + bytes(200), "rejected", "unsupported_format"),
        "bomb.tif": (_tiff_of_size(60000), "rejected", "too_many_pixels"),
    }


def _plain() -> dict[str, Fate]:
    pixels = np.asarray(photo())
    bitmap = encode(photo(), "BMP")
    opaque = photo().copy()
    opaque.putalpha(255)

    def portable(kind: bytes, maxval: int, samples: bytes) -> bytes:
        return b"%s\n# comment\n%d %d\n%d\n%s" % (kind, WIDTH, HEIGHT, maxval, samples)

    return {
        "good.bmp": (bitmap, "measured", ()),
        "cut.bmp": (bitmap[: len(bitmap) // 2], "failed", "damaged"),
        "palette.bmp": (encode(photo().quantize(64), "BMP"), "measured", ("palette_to_rgb",)),
        "bilevel.bmp": (encode(photo().convert("1"), "BMP"), *_MODE),
        "bomb.bmp": (_at(bitmap, 18, struct.pack("<ii", 60000, 60000)), "rejected", "too_many_pixels"),
        "good.ppm": (portable(b"P6", 255, pixels.tobytes()), "measured", ()),
        "cut.ppm": (portable(b"P6", 255, pixels.tobytes()[:-100]), "failed", "damaged"),
        "maxval_0.ppm": (portable(b"P6", 0, pixels.tobytes()), "failed", "damaged"),
        "maxval_70000.ppm": (portable(b"P6", 70000, pixels.tobytes()), "failed", "damaged"),
        "maxval_100.ppm": (portable(b"P6", 100, (pixels // 3).tobytes()), *_MODE),
        "sixteen_bit.ppm": (portable(b"P6", 65535, (pixels.astype(">u2") * 257).tobytes()), *_MODE),
        "text.ppm": (portable(b"P3", 255, b" ".join(b"%d" % value for value in pixels.ravel())), *_MODE),
        "grey.pgm": (portable(b"P5", 255, pixels[..., 1].tobytes()), "measured", ("grey_to_rgb",)),
        "sixteen_bit.pgm": (
            portable(b"P5", 65535, (pixels[..., 1].astype(">u2") * 257).tobytes()),
            "measured",
            ("16bit_to_8bit", "grey_to_rgb"),
        ),
        "bomb.ppm": (b"P6\n60000 60000\n255\n" + bytes(1000), "rejected", "too_many_pixels"),
    }


def _turned() -> dict[str, Fate]:
    files: dict[str, Fate] = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        conversions = ("exif_orientation",) if orientation > 1 else ()
        for format, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
            files[f"turned_{orientation}.{suffix}"] = (encode(photo(), format, exif=exif), "measured", conversions)
    return files


_TRANSPARENT = ("rejected", "transparent")
_SEVERAL = ("rejected", "several_frames")
_MODE = ("rejected", "unsupported_mode")


def _at(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


def _without_segment(data: bytes, marker: int) -> bytes:
    while (start := data.find(bytes([0xFF, marker]))) >= 0:
        data = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]
    return data


def _tiff_of_size(side: int) -> bytes:
    entries = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 99)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4)


def _digital_negative() -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.asarray(photo()), extratags=[(50706, 1, 4, (1, 4, 0, 0), True)])
    return buffer.getvalue()


def _adobe_rgb_profile() -> bytes:
    profile = Image.open(io.BytesIO(corpus_files("pictures")["rocket.jpg"])).info["icc_profile"]
    assert isinstance(profile, bytes)
    return profile


def _with_primaries(*primaries: tuple[float, float, float]) -> bytes:
    profile = bytearray(srgb_profile())
    for index in range(int.from_bytes(profile[128:132])):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            primary = primaries[(b"rXYZ", b"gXYZ", b"bXYZ").index(name)]
            struct.pack_into(">iii", profile, offset + 8, *(round(value * 65536) for value in primary))
    return bytes(profile)


def _grey_profile(gamma: float, description: str) -> bytes:
    """A minimal ICC profile, version 2.1 (ICC.1:1998-09): one curve for grey."""
    text = description.encode() + b"\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)),
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    offset = 132 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    header += struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body
