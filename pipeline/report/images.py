"""Pictures for the page: small JPEG copies inside the page itself."""

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from datagen.picture.region import decode_whole

MAX_SIDE = 192
_QUALITY = 90


@dataclass(frozen=True)
class Image:
    """A picture as a data URI, with its size in CSS pixels and what it says to those who cannot see it."""

    uri: str
    width: int
    height: int
    alt: str


def image_of_pixels(pixels: np.ndarray, alt: str, *, enlarge: int = 1) -> Image:
    """RGB uint8 [H,W,3]; of larger pictures the centre of ``MAX_SIDE`` pixels, since shrinking would hide noise.

    ``enlarge`` shows each pixel as a square of that side.
    """
    top, left = (max(0, side - MAX_SIDE) // 2 for side in pixels.shape[:2])
    pixels = pixels[top : top + MAX_SIDE, left : left + MAX_SIDE]
    height, width = pixels.shape[:2]
    # Full colour resolution: the usual sub-sampling would hide half of the colour noise that the page is about.
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=_QUALITY, colorsubsampling="444")
    return Image(_uri(data), width * enlarge, height * enlarge, alt)


def image_of_file(path: Path, alt: str) -> Image:
    """A picture file of any format that OpenCV reads.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no picture.
    """
    return image_of_pixels(decode_whole(path.read_bytes()), alt)


def image_of_jpeg(data: bytes, alt: str) -> Image:
    """A JPEG that is small already, such as the thumbnails of the inventory, byte for byte."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return Image(_uri(data), width, height, alt)


def _uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
