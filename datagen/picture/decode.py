"""From a file's bytes to sRGB pixels: header first, then a strict decode in which damage is never passed over.

cv2 and ``PIL.verify()`` both let damaged files pass; simplejpeg in strict mode and a full Pillow load do not.
Every unusual kind of picture has one fate, and the row says which:

====================================  =======================================================
grey, palette, 16 bits a sample        converted to 8-bit RGB, named in ``conversions``
alpha, everywhere opaque              dropped, named in ``conversions``
alpha, somewhere transparent          refused: ``transparent`` (blending would invent edges)
EXIF orientation                      applied, named in ``conversions``
ICC profile other than sRGB           converted to sRGB, named in ``conversions``
CMYK, bilevel, float                  refused: ``unsupported_mode``
animated or several pages             refused: ``several_frames``
more pixels than the limit            refused by the header alone: ``too_many_pixels``
====================================  =======================================================
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from datagen.picture.jpeg import estimate_quality

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MODES = {"RGB", "L", "LA", "P", "PA", "RGBA", "RGBX", "YCbCr", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_EXIF_ORIENTATION = 0x0112
_SRGB = ImageCms.createProfile("sRGB")


class PictureError(ValueError):
    """A picture cannot be used. ``reason`` is a short stable name; ``failed`` tells damage from refusal by rule."""

    def __init__(self, reason: str, message: str, *, failed: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.failed = failed


@dataclass(frozen=True)
class Header:
    """What a file says before a pixel is decoded. ``width`` and ``height`` are as stored, in pixels."""

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
        PictureError: ``empty``, ``not_a_picture``, ``damaged``, ``too_many_pixels``, ``several_frames`` or
            ``unsupported_mode``.
    """
    if not data:
        raise PictureError("empty", "the file has no bytes", failed=True)
    with _damage_named(), _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError("too_many_pixels", f"{width}x{height} exceeds {max_pixels} pixels", failed=False)
        # A multi-picture JPEG (MPO) is what phones write: its first picture is the photograph.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise PictureError("several_frames", "animated, or several pages", failed=False)
        if image.mode not in _MODES:
            raise PictureError("unsupported_mode", f"colour mode {image.mode}", failed=False)
        jpeg = image.format in ("JPEG", "MPO")
        return Header(
            format=str(image.format),
            width=width,
            height=height,
            mode=image.mode,
            orientation=_orientation(image) if jpeg else 1,
            jpeg_quality=estimate_quality(image.quantization) if jpeg else None,  # type: ignore[attr-defined]
            subsampling=simplejpeg.decode_jpeg_header(data, strict=False)[3] if jpeg else None,
            profiled="icc_profile" in image.info,
        )


def decode(data: bytes, header: Header) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode the whole picture strictly.

    Returns:
        pixels: uint8 ``[height, width, 3]``, sRGB, upright.
        conversions: what was done on the way besides decoding, in order; empty when the stored pixels are these.

    Raises:
        PictureError: ``damaged``, ``transparent``, ``unsupported_mode``.
    """
    with _damage_named():
        if header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L") and not header.profiled:
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            conversions: tuple[str, ...] = ("grey_to_rgb",) if header.mode == "L" else ()
            if header.orientation != 1:
                pixels = _upright(pixels, header.orientation)
                conversions += ("exif_orientation",)
            return pixels, conversions
        if header.format in ("JPEG", "MPO"):
            # Pillow forgives damage inside the scan that libjpeg merely warns of; this decode is for its errors alone.
            simplejpeg.decode_jpeg(data, "GRAY", strict=True)
        return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    with _open(data) as image:
        # Pillow reduces 16-bit RGB to 8 bits unasked; only its plan for reading the file tells.
        sixteen_bit = ";16" in str(getattr(image, "tile", ""))
        image.load()
        conversions: list[str] = []
        orientation = _orientation(image)
        pixels, conversion = _to_rgb(image)
        conversions += conversion
        if sixteen_bit and "16bit_to_8bit" not in conversions:
            conversions.append("16bit_to_8bit")
        if orientation != 1:
            pixels = _upright(pixels, orientation)
            conversions.append("exif_orientation")
        return np.ascontiguousarray(pixels), tuple(conversions)


def _to_rgb(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    conversions: list[str] = []
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError("unsupported_mode", "integer samples outside 0..65535", failed=False)
        grey = ((values + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), ["16bit_to_8bit", "grey_to_rgb"]
    profile = image.info.get("icc_profile")
    if image.has_transparency_data or image.mode in ("RGBA", "LA", "PA"):
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            raise PictureError("transparent", "some pixels are not opaque", failed=False)
        conversions.append("opaque_alpha_dropped")
        image = rgba.convert("RGB")
    elif image.mode in ("P", "PA"):
        conversions.append("palette_to_rgb")
        image = image.convert("RGB")
    elif image.mode in ("RGBX", "YCbCr"):
        conversions.append(f"{image.mode.lower()}_to_rgb")
        image = image.convert("RGB")
    if profile:
        image, conversion = _to_srgb(image, profile)
        conversions += conversion
    if image.mode == "L":
        conversions.append("grey_to_rgb")
        image = image.convert("RGB")
    return np.asarray(image), conversions


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, list[str]]:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image, []
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, ["icc_ignored"]
    assert converted is not None
    return converted, ["icc_to_srgb"]


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Broken EXIF raises anything; a picture is not refused for its metadata.
        return 1
    return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF ``orientation`` 2..8 (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


@contextmanager
def _damage_named() -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError("not_a_picture", f"not one of {', '.join(FORMATS)}", failed=True) from None
    except Image.DecompressionBombError as error:
        raise PictureError("too_many_pixels", str(error), failed=False) from None
    except Exception as error:  # Decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more.
        raise PictureError("damaged", f"{type(error).__name__}: {error}", failed=True) from None


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
