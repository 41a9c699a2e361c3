"""Picture files in and out, losing nothing on the way that a person would miss.

Grey stays grey, transparency stays, 16 bits stay 16 where the format can hold them, the ICC profile stays, and the
EXIF orientation is applied to the pixels. Other metadata (camera, place, thumbnail) is not carried over.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from infra.config import ConfigError
from infra.errors import Refusal
from infra.files import write_atomically
from pipeline.samples import to_float, to_integers

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
SUFFIXES = tuple(_FORMATS)
_EXIF_ORIENTATION = 0x0112
_BGR_ORDER = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}  # RGB to OpenCV's order and back, by number of channels
_PNG_HEADER = 33  # bytes of the signature and the chunk IHDR, behind which a profile belongs
# Restoring is no reason to lose quality again: JPEG near the top of its range, everything else without loss.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}


class PictureError(Refusal, ValueError):
    """A picture cannot be read or written. The message says what is wrong with it, without its path."""


class TooLargeError(PictureError):
    """A picture has more pixels than are taken; none was decoded."""


@dataclass(frozen=True)
class Picture:
    """Upright pixels in the colour space of the file.

    ``pixels`` float32 [H, W, 3] in [0, 1], three equal channels when ``grey``; ``alpha`` float32 [H, W] in [0, 1]
    or None; ``bits`` a sample, 8 or 16; ``icc`` the profile's bytes or None.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    bits: int = 8
    icc: bytes | None = None


def inputs_below(source: Path, out: Path) -> list[Path]:
    """``find_pictures(source)`` for results that go into the folder ``out``, which may lie below ``source``.

    Raises:
        ConfigError: ``out`` is a file or ``source`` itself, or there are no pictures.
    """
    if out.is_file():
        raise ConfigError(f"{out} is a file; a folder of pictures goes into a folder")
    refuse_input_as_output(source, out)
    # Results below the input folder are no inputs of the next run.
    inside = [path for path in find_pictures(source) if not (source / path).resolve().is_relative_to(out.resolve())]
    if not inside:
        raise ConfigError(f"{source}: no pictures below it ({', '.join(SUFFIXES)})")
    return inside


def refuse_input_as_output(source: Path, out: Path) -> None:
    """Raise ConfigError where results would be written over what they are made from."""
    if out.resolve() == source.resolve():
        itself, kept = ("folder itself", "originals stay") if source.is_dir() else ("itself", "original stays")
        raise ConfigError(f"{out}: is the input {itself}; choose another OUT, so that the {kept}")


def find_pictures(folder: Path) -> list[Path]:
    """Paths below ``folder``, relative to it and sorted, of the files whose suffix is in ``SUFFIXES``.

    What is hidden is passed over; unpublished temporary files are hidden.
    """
    found = (
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def read_picture(path: Path) -> Picture:
    """``decode_picture`` of a file.

    Raises:
        PictureError: see ``decode_picture``.
        OSError: the file cannot be read.
    """
    return decode_picture(path.read_bytes())


def decode_picture(data: bytes, max_pixels: int | None = None) -> Picture:
    """Decode the whole of a PNG, JPEG, WebP or TIFF file; its content counts, not its name.

    Args:
        max_pixels: refuse larger pictures by their header, before any pixel is decoded.

    Raises:
        PictureError: not such a picture, damaged, animated or of several pages, neither grey nor RGB, of
            other than 8 or 16 bits a sample.
        TooLargeError: larger than ``max_pixels``, or beyond Pillow's guard against decompression bombs (179
            million pixels).
    """
    with _faults_named(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=sorted(set(_FORMATS.values()))) as image:
            # A multi-picture JPEG (MPO) is what phones write: its first picture is the photograph.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise PictureError("animated, or of several pages")
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise TooLargeError(f"{image.width}x{image.height} pixels; at most {max_pixels:,} are taken")
            stored = _stored_mode(image)
            # Refuses what is damaged. For a TIFF it also applies the orientation, and forgets the tag.
            image.load()
            samples = _samples_of_16_bits(data) if ";16" in stored else _samples_of_8_bits(image)
            samples = _upright(samples, image.getexif().get(_EXIF_ORIENTATION, 1))
            icc = image.info.get("icc_profile")
    grey = samples.shape[2] <= 2 or (";16" in stored and stored.startswith("LA"))
    values = to_float(samples)
    alpha = values[..., -1] if values.shape[2] in (2, 4) else None
    pixels = np.repeat(values[..., :1], 3, axis=2) if grey else values[..., :3]
    return Picture(np.ascontiguousarray(pixels), alpha, grey, 8 * samples.dtype.itemsize, icc)


def write_picture(path: Path, picture: Picture) -> None:
    """Publish ``picture`` as ``path`` in one step, in the format that the suffix names; see ``encode_picture``.

    Raises:
        PictureError: another suffix, or transparency in a JPEG.
    """
    write_atomically(path, encode_picture(picture, path.suffix))


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """The bytes of a file in the format that ``suffix`` (``.png``) names.

    PNG, WebP and TIFF are lossless, JPEG has quality 95 without chroma sub-sampling. JPEG and WebP hold 8 bits.

    Raises:
        PictureError: another suffix, or transparency in a JPEG.
    """
    kind = _FORMATS.get(suffix.lower())
    if kind is None:
        raise PictureError(f"cannot write {suffix or 'a file without suffix'}; choose one of {', '.join(SUFFIXES)}")
    if kind == "JPEG" and picture.alpha is not None:
        raise PictureError("JPEG holds no transparency; write a .png instead")
    colours = picture.pixels.mean(axis=2, keepdims=True) if picture.grey else picture.pixels
    values = colours if picture.alpha is None else np.concatenate([colours, picture.alpha[..., None]], axis=2)
    if picture.bits == 16 and kind in ("PNG", "TIFF"):
        if values.shape[2] == 2:  # neither encoder makes 16-bit grey with transparency that others read
            values = values[..., [0, 0, 0, 1]]
        encode = _encode_png_16 if kind == "PNG" else _encode_tiff_16
        return encode(to_integers(values, np.uint16), picture.icc)
    samples = to_integers(values)
    buffer = io.BytesIO()
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    # WebP knows RGB alone; its reader gives grey back as three equal channels.
    image.save(buffer, kind, icc_profile=picture.icc, **_SAVE_OPTIONS[kind])
    return buffer.getvalue()


def side_by_side(before: Picture, after: Picture) -> Picture:
    """Both beside each other, the first enlarged to the height of the second where that is larger, a line between."""
    height, width = after.pixels.shape[:2]

    def fitted(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values, (width, height), interpolation=cv2.INTER_NEAREST).reshape(height, width, -1)

    line = np.ones((height, max(2, width // 200), 3), np.float32)
    pixels = np.hstack([fitted(before.pixels), line, after.pixels])
    if before.alpha is None or after.alpha is None:
        return Picture(pixels, None, after.grey, after.bits, after.icc)
    alpha = np.hstack([fitted(before.alpha)[..., 0], line[..., 0], after.alpha])
    return Picture(pixels, alpha, after.grey, after.bits, after.icc)


def suffix_of(data: bytes) -> str:
    """The suffix of the format that ``data`` is in; ``.png`` where that is not known."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = "JPEG" if image.format == "MPO" else image.format
    except Exception:
        return ".png"
    return next((suffix for suffix, name in _FORMATS.items() if name == kind), ".png")


def _stored_mode(image: Image.Image) -> str:
    """Layout of the file's samples in Pillow's terms ("RGB;16B"), which differs from ``image.mode`` beyond 8 bits."""
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _samples_of_8_bits(image: Image.Image) -> np.ndarray:
    if image.mode in ("P", "PA", "RGBX", "YCbCr") or image.has_transparency_data:
        grey = image.mode in ("L", "LA")
        image = image.convert(("LA" if grey else "RGBA") if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise PictureError(f"colour mode {image.mode} is not supported; convert it to RGB or grey first")
    return np.atleast_3d(np.asarray(image))


def _samples_of_16_bits(data: bytes) -> np.ndarray:
    # Pillow reduces 16-bit colours to 8 unasked.
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        raise PictureError("16 bits a sample in a layout that is not supported; convert it to RGB or grey first")
    samples = np.atleast_3d(samples)
    return samples[..., _BGR_ORDER[samples.shape[2]]]


def _encode_png_16(samples: np.ndarray, icc: bytes | None) -> bytes:
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(samples[..., _BGR_ORDER[samples.shape[2]]]))
    data = encoded.tobytes()
    if not done:
        raise PictureError("OpenCV could not encode it as a 16-bit PNG")
    if icc is None:
        return data
    # By hand, because libpng refuses profiles that it finds fault with, and a profile is kept as it came.
    body = b"iCCPICC profile\0\0" + zlib.compress(icc)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:_PNG_HEADER] + chunk + data[_PNG_HEADER:]


def _encode_tiff_16(samples: np.ndarray, icc: bytes | None) -> bytes:
    grey = samples.shape[2] == 1
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        samples[..., 0] if grey else samples,
        photometric="minisblack" if grey else "rgb",
        extrasamples=["unassalpha"] if samples.shape[2] == 4 else None,
        compression="zlib",
        iccprofile=icc,
        metadata=None,
    )
    return buffer.getvalue()


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (CIPA DC-008, tag 0x0112); values that the standard does not know change nothing."""
    if orientation in (5, 6, 7, 8):
        samples = samples.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    return samples


@contextmanager
def _faults_named() -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(str(error)) from None
    except UnidentifiedImageError:
        raise PictureError(f"not a picture in {', '.join(sorted(set(_FORMATS.values())))}") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more
        raise PictureError(f"damaged: {error}") from None
