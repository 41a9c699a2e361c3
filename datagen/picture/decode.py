"""From a file's bytes to sRGB pixels: header first, then a strict decode in which damage is never passed over.

cv2 and ``PIL.verify()`` both let damaged files pass; simplejpeg in strict mode and a full Pillow load do not, and
``datagen.picture.structure`` checks what Pillow leaves out. Every unusual kind of picture has one fate, and the row
says which. Damage is *failed*, a rule *rejected*:

==============================================  ==========================================================
kind                                            fate
==============================================  ==========================================================
no byte at all                                  failed: ``empty``
nothing that is known by its first bytes        failed: ``not_a_picture`` (the name of a file says nothing)
cut, changed, or without its end marker         failed: ``damaged``
memory ran out while it was read                failed: ``out_of_memory``; the file may be good
HEIF, AVIF, SVG, JPEG XL or 2000, raw, DNG …     rejected: ``unsupported_format``
JPEG, WebP, Zstandard or LZMA inside TIFF       rejected: ``unsupported_format`` (libtiff hides their damage)
reduced copy as the first page of a TIFF        rejected: ``unsupported_format`` (a raw file's preview)
CMYK, bilevel, float, signed, 12 or 32 bits     rejected: ``unsupported_mode``
JPEG: arithmetic, lossless, 12 bits             rejected: ``unsupported_mode``
PPM: text, or maxval not 255 (grey: or 65535)   rejected: ``unsupported_mode``
JPEG with over 100 scans                        rejected: ``too_many_scans`` (a bomb: each costs a full pass)
more pixels than the limit                      rejected by the header alone: ``too_many_pixels``
text or profile that inflates beyond 1 MiB      rejected: ``metadata_too_large`` (PNG)
animated, or several pages                      rejected: ``several_frames``
alpha, somewhere transparent                    rejected: ``transparent`` (blending would invent edges)
alpha, everywhere opaque                        dropped: ``opaque_alpha_dropped``
grey                                            ``grey_to_rgb``
palette                                         ``palette_to_rgb``
16 bits a sample                                ``16bit_to_8bit``
further TIFF channels that are no alpha         ``extra_channels_dropped``
EXIF orientation                                applied: ``exif_orientation``; broken EXIF is as none
ICC profile that is sRGB, to 2 levels of 255    left alone
any other ICC profile                           converted to sRGB: ``icc_to_srgb``
ICC profile that is broken or of other colours  left alone: ``icc_ignored``
bytes after the end marker                      ignored; so is what follows the first picture of an MPO
PNG gAMA, cHRM and cICP                         not looked at
==============================================  ==========================================================

A missing end marker counts as damage although every pixel may be there: a progressive JPEG or an animation that was
cut between two parts looks the same. What no format's checksum covers cannot be noticed: single changed bits in the
samples of BMP, PPM, plain, LZW or PackBits TIFF and WebP, and those that leave a JPEG's Huffman code valid.
"""

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from datagen.picture import structure
from datagen.picture.jpeg import count_scans, estimate_quality, read_frame

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MODES = {"RGB", "L", "LA", "P", "PA", "RGBA", "RGBX", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N"}
_MAX_SCANS = 100  # Encoders write 10; the standard allows 64 coefficients x 14 bits x components.
_JPEG_PROCESSES = (0xC0, 0xC1, 0xC2)  # Baseline, extended and progressive, each with Huffman codes.
_SRGB = ImageCms.createProfile("sRGB")
# Makers' variants of sRGB differ by rounding and black point.
_SRGB_TOLERANCE = 2
_RAMP = np.arange(256, dtype=np.uint8)
_SIXTEEN_TO_EIGHT = ((np.arange(1 << 16) + 128) // 257).astype(np.uint8)

# Tags of TIFF 6.0 (1992), of EXIF (CIPA DC-008), and of DNG 1.7.
_NEW_SUBFILE_TYPE, _PHOTOMETRIC, _SAMPLES_PER_PIXEL, _SAMPLE_FORMAT = 254, 262, 277, 339
_STRIPS, _TILES = (273, 279), (324, 325)
_ORIENTATION, _DNG_VERSION = 274, 50706
_TIFF_DEFLATE = ("tiff_deflate", "tiff_adobe_deflate")
_TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "packbits", *_TIFF_DEFLATE)


class PictureError(ValueError):
    """A picture cannot be used. ``reason`` is a short stable name; ``failed`` tells damage from refusal by rule."""

    def __init__(self, reason: str, message: str, *, failed: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.failed = failed


@dataclass(frozen=True)
class Header:
    """What a file says before a pixel is decoded.

    ``width`` and ``height`` are as stored, in pixels. ``orientation`` is that of a JPEG, and 1 for other formats.
    """

    format: str
    width: int
    height: int
    mode: str
    orientation: int
    jpeg_quality: int | None
    subsampling: str | None
    profiled: bool


def read_header(data: bytes, max_pixels: int) -> Header:
    """Parse the header of a picture file.

    Raises:
        PictureError: and nothing else; the module's table says which reason for what.
    """
    if not data:
        raise PictureError("empty", "the file has no bytes", failed=True)
    if name := structure.other_format(data):
        raise _rejected("unsupported_format", f"{name} is not read; convert it to one of {', '.join(FORMATS)}")
    with _damage_named(data):
        _require_usual_jpeg(data)
        with _open(data) as image:
            width, height = _tiff_stored_size(image)
            if width * height > max_pixels:
                raise _rejected("too_many_pixels", f"{width}x{height} exceeds {max_pixels} pixels")
            # A multi-picture JPEG (MPO) is what phones write: its first picture is the photograph.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise _rejected("several_frames", "animated, or several pages")
            _require_known_mode(image)
            jpeg = image.format in ("JPEG", "MPO")
            return Header(
                format=str(image.format),
                width=width,
                height=height,
                mode=image.mode,
                orientation=_orientation(image) if jpeg else 1,
                jpeg_quality=estimate_quality(image.quantization) if jpeg else None,  # type: ignore[attr-defined]
                subsampling=_subsampling(data, image.size) if jpeg else None,
                profiled="icc_profile" in image.info,
            )


def decode(data: bytes, header: Header) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode the whole picture strictly.

    Returns:
        pixels: uint8 ``[height, width, 3]``, sRGB, upright.
        conversions: what was done on the way besides decoding, in order; empty when the stored pixels are these.

    Raises:
        PictureError: and nothing else; the module's table says which reason for what.
    """
    with _damage_named(data):
        if header.format in ("JPEG", "MPO"):
            return _decode_jpeg(data, header)
        if header.format == "PNG":
            structure.check_png(data)
        elif header.format == "GIF":
            structure.check_gif(data)
        return _decode_with_pillow(data)


def _decode_jpeg(data: bytes, header: Header) -> tuple[np.ndarray, tuple[str, ...]]:
    # Pillow forgives damage inside the scan, of which libjpeg merely warns; simplejpeg does not.
    conversions = ["grey_to_rgb"] if header.mode == "L" else []
    if header.profiled:
        with _open(data) as image:
            profile = image.info["icc_profile"]
        grey = header.mode == "L" and _is_of_grey(profile)
        stored = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGB", strict=True)
        pixels, conversion = _to_srgb(stored.squeeze(2) if grey else stored, profile)
        conversions += conversion
    else:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    if header.orientation != 1:
        pixels = _upright(pixels, header.orientation)
        conversions.append("exif_orientation")
    return pixels, tuple(conversions)


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    with _open(data) as image:
        # Pillow reduces 16-bit RGB to 8 bits unasked; only its plan for reading the file tells.
        sixteen_bit = ";16" in str(getattr(image, "tile", ""))
        conversions = ["16bit_to_8bit"] if sixteen_bit else []
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image, data)
            if image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) > len(image.getbands()):
                conversions.append("extra_channels_dropped")
        # Pillow turns a TIFF while it loads, and drops the tag.
        turned = _orientation(image) if image.format == "TIFF" else 1
        image.load()
        orientation = _orientation(image) if image.format != "TIFF" else 1
        pixels, conversion = _to_rgb(image)
        conversions += conversion
        if orientation != 1:
            pixels = _upright(pixels, orientation)
        if (orientation, turned) != (1, 1):
            conversions.append("exif_orientation")
        return np.ascontiguousarray(pixels), tuple(conversions)


def _to_rgb(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    conversions: list[str] = []
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if (values == image.info.get("transparency", -1)).any():
            raise _rejected("transparent", "some pixels have the colour that stands for transparent")
        image = Image.fromarray(_SIXTEEN_TO_EIGHT[values])
    elif image.has_transparency_data:
        banded = image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")
        if banded.getchannel("A").getextrema() != (255, 255):
            raise _rejected("transparent", "some pixels are not opaque")
        conversions.append("opaque_alpha_dropped")
        image.info.pop("transparency", None)
    if image.mode in ("P", "PA"):
        conversions.append("palette_to_rgb")
    elif image.mode in ("RGBX", "YCbCr"):
        conversions.append(f"{image.mode.lower()}_to_rgb")
    grey = image.mode in ("L", "LA")
    if grey:
        conversions.append("grey_to_rgb")
    if profile:
        mode = "L" if grey and _is_of_grey(profile) else "RGB"
        pixels, conversion = _to_srgb(np.asarray(_as(mode, image)), profile)
        return pixels, conversions + conversion
    return np.asarray(_as("RGB", image)), conversions


def _as(mode: str, image: Image.Image) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _is_of_grey(profile: bytes) -> bool:
    """ICC.1:2022, section 7.2.6: the colour space that a profile is for."""
    return profile[16:20] == b"GRAY"


def _to_srgb(pixels: np.ndarray, profile: bytes) -> tuple[np.ndarray, list[str]]:
    """RGB ``[height, width, 3]`` or grey ``[height, width]`` to sRGB ``[height, width, 3]``."""
    grey = pixels.ndim == 2
    try:
        transform = _transform(profile, "L" if grey else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        transform, ignored = None, ["icc_ignored"]
    else:
        ignored = []
    if transform is None:
        return np.repeat(pixels[..., None], 3, axis=2) if grey else pixels, ignored
    if grey:
        return _applied(transform, _RAMP[None])[0][pixels], ["icc_to_srgb"]
    return _applied(transform, pixels), ["icc_to_srgb"]


def _applied(transform: ImageCms.ImageCmsTransform, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))


@functools.lru_cache(maxsize=8)  # A profile may have megabytes.
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From RGB or L of the profile to sRGB; None where the profile already is sRGB, whatever it is called."""
    # LittleCMS' shortcut is 1 level off for colours and 10 for grey; grey goes through a table, so time is no matter.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB", flags=flags)
    greys = np.stack([_RAMP] * 3, -1)
    colours = np.stack(np.meshgrid(*[_RAMP[::15]] * 3), -1).reshape(-1, 3)
    before = _RAMP[None] if mode == "L" else np.concatenate([greys, colours])[None]
    expected = greys[None] if mode == "L" else before
    change = np.abs(_applied(transform, before).astype(int) - expected).max()
    return None if change <= _SRGB_TOLERANCE else transform


def _require_usual_jpeg(data: bytes) -> None:
    frame = read_frame(data) if data.startswith(b"\xff\xd8\xff") else None
    if frame is None:
        return
    if frame.process not in _JPEG_PROCESSES or frame.bits != 8 or frame.components not in (1, 3, 4):
        described = f"process {frame.process:#x}, {frame.bits} bits, {frame.components} components"
        raise _rejected("unsupported_mode", f"JPEG that is arithmetic, lossless or not of 8 bits ({described})")
    if frame.process == 0xC2 and (scans := count_scans(data)) > _MAX_SCANS:
        raise _rejected("too_many_scans", f"{scans} scans exceed {_MAX_SCANS}")


def _require_known_mode(image: Image.Image) -> None:
    layout = str(getattr(image, "tile", ""))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if _DNG_VERSION in tags or int(tags.get(_NEW_SUBFILE_TYPE, 0)) & 1:
            raise _rejected("unsupported_format", "the first page is a raw file's data or preview; develop it first")
        if (compression := image.info.get("compression", "raw")) not in _TIFF_COMPRESSIONS:
            raise _rejected("unsupported_format", f"TIFF compressed by {compression}; save it with LZW or deflate")
        if set(np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)).tolist()) != {1}:
            raise _rejected("unsupported_mode", "samples that are not unsigned integers")
        inverted = tags.get(_PHOTOMETRIC) == 0 and image.mode.startswith("I")
        if "I;12" in layout or inverted:
            raise _rejected("unsupported_mode", "grey of 12 bits, or of 16 with 0 as white")
    elif image.format == "PPM" and ("'ppm" in layout):
        raise _rejected("unsupported_mode", "PPM as text, or with a maxval other than 255 (65535 if grey)")
    if image.mode not in _MODES and (image.format, image.mode) != ("PPM", "I"):
        raise _rejected("unsupported_mode", f"colour mode {image.mode}")


def _check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    if image.info.get("compression") not in _TIFF_DEFLATE:
        return
    offsets, sizes = _TILES if _TILES[0] in image.tag_v2 else _STRIPS
    # Tiles reach over the border, each channel may be by itself: far more than this is not a picture of this size.
    limit = 16 * image.width * image.height + (1 << 24)
    for offset, size in zip(image.tag_v2[offsets], image.tag_v2[sizes]):
        structure.check_deflated(data, offset, size, limit)


def _tiff_stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before any turn, which Pillow has already made in the size of a TIFF."""
    swapped = image.format == "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if swapped else image.size


def _subsampling(data: bytes, size: tuple[int, int]) -> str:
    height, width, _, subsampling = simplejpeg.decode_jpeg_header(data, strict=False)
    if (width, height) != size:
        raise PictureError("damaged", f"two frame headers: {width}x{height} and {size[0]}x{size[1]}", failed=True)
    return str(subsampling)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Broken EXIF raises anything; a picture is not refused for its metadata.
        return 1
    return int(value) if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF ``orientation`` 2..8 (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _rejected(reason: str, message: str) -> PictureError:
    return PictureError(reason, message, failed=False)


@contextmanager
def _damage_named(data: bytes) -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as error:
        raise _rejected("too_many_pixels", str(error)) from None
    except MemoryError:
        raise PictureError("out_of_memory", "not enough memory to read it", failed=True) from None
    except Exception as error:  # Decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more.
        if "MAX_TEXT_" in str(error):  # PngImagePlugin's limits; it has no exception of its own for them.
            raise _rejected("metadata_too_large", str(error)) from None
        raise PictureError("damaged", f"{type(error).__name__}: {error}", failed=True) from None


def _unidentified(data: bytes) -> PictureError:
    if not structure.has_signature(data):
        return PictureError("not_a_picture", f"not one of {', '.join(FORMATS)}", failed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TiffImagePlugin.TiffImageFile(io.BytesIO(data)).close()
    except Exception as error:  # Only its text tells a layout that Pillow does not know from a broken file.
        if "unknown" in str(error):
            return _rejected("unsupported_mode", f"TIFF with a layout of samples that is not read ({error})")
    return PictureError("damaged", "the header is broken", failed=True)


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
