"""Parts of an encoded picture, decoded without the rest of it; the pixels are those of a decode of the whole.

A patch of 128 x 128 needs a sixteenth of a 512 x 512 tile. Of a JPEG, libturbojpeg 3 decodes a rectangle alone: rows
above are entropy-decoded only, rows below not at all, columns beside it are not transformed. That is exact, for the
inverse DCT (accurate integer) and the interpolation of chroma ("fancy", ITU-T T.81 leaves it open) are those of the
libjpeg-turbo in OpenCV, and a margin of one minimum coded unit (MCU) at the left and right gives the interpolation the
neighbours that it has in the whole picture. What cannot be decoded so, for its format or for want of the library, is
decoded whole by OpenCV and cut: slower, with equal pixels.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Sequence

import cv2
import numpy as np

from datagen.picture.crop import load_libturbojpeg

# Top, left, height, width; pixels.
Box = tuple[int, int, int, int]

# turbojpeg.h, version 3.0. TJINIT_DECOMPRESS; TJPF_RGB; TJPARAM_*.
_DECOMPRESS, _RGB = 1, 0
_STOP_ON_WARNING, _SUBSAMPLING, _COLOUR_SPACE = 0, 4, 8
# MCU width by TJSAMP_*: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1. Of other samplings the library cuts nothing out.
_MCU_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}
_YCBCR, _GREY = 1, 2  # TJCS_*; of CMYK and YCCK OpenCV makes RGB by a rule of its own.

# Marker codes, ITU-T T.81, table B.1.
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SOS, _APP1 = 0xDA, 0xE1
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Signature and first chunk's header: PNG, third edition, 5.2 and 11.2.2.
_PNG_IHDR = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"


class _Rectangle(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class _Handle:
    """A decompressor. It is not for two threads at a time, and is freed only by the process that made it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._destroy, self._process = library.tj3Destroy, os.getpid()
        self.pointer = library.tj3Init(_DECOMPRESS)
        if not self.pointer:
            raise MemoryError("libturbojpeg: no memory for a decompressor")
        library.tj3Set(self.pointer, _STOP_ON_WARNING, 1)

    def __del__(self) -> None:
        # A fork copies the handles of all threads, some of them in the middle of a call: to be left as they are.
        if self.pointer and os.getpid() == self._process:
            self._destroy(self.pointer)


_of_thread = threading.local()


def region_decode_available() -> bool:
    """Whether this machine has libturbojpeg 3, without which every picture is decoded whole."""
    return _library() is not None


def decode_whole(data: bytes) -> np.ndarray:
    """Decode a picture to RGB uint8 [height, width, 3], turned upright where its EXIF says so.

    Raises:
        ValueError: it is not a picture, or cut short. Damage inside it OpenCV passes over in silence.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ValueError(f"not a picture that OpenCV reads: {error.err or error}") from None
    if pixels is None:
        raise ValueError("not a picture that OpenCV reads")
    return pixels


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels of what ``decode_whole`` gives.

    Headers of JPEG and PNG suffice where no EXIF may turn the picture; any other is decoded for it.

    Raises:
        ValueError: it is not a picture. The rest of a JPEG or PNG is not looked at.
    """
    if data.startswith(_PNG_IHDR) and b"eXIf" not in data:
        return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    size = _size_of_plain_jpeg(data)
    return decode_whole(data).shape[:2] if size is None else size


def decode_region(data: bytes, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Decode one rectangle of a picture.

    Args:
        data: the whole file.
        top, left, height, width: pixels, inside the picture as ``decode_whole`` gives it.

    Returns:
        uint8 RGB [height, width, 3], bit for bit ``decode_whole(data)[top : top + height, left : left + width]``.
        It may be a view of a larger array.

    Raises:
        ValueError: it is not a picture, or cut short, or the rectangle is not inside it. Damage below the rectangle
            is not noticed; in and above it, OpenCV decides.
    """
    return decode_regions(data, [(top, left, height, width)])[0]


def decode_regions(data: bytes, boxes: Sequence[Box]) -> list[np.ndarray]:
    """Decode several rectangles of a picture, as ``decode_region`` does one.

    The rectangle around all of them is decoded, once: entropy decoding, most of the work, starts at the top of the
    picture for every rectangle anew, so one pass costs less than two wherever they lie (``benchmarks/loader.py``).

    Raises:
        ValueError: as ``decode_region``.
    """
    if not boxes:
        return []
    size = _size_of_plain_jpeg(data)
    if size is not None and (library := _library()) is not None:
        _require_inside(boxes, size)
        top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
        bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
        pixels = _decode_rectangle(library, data, (top, left, bottom - top, right - left), size[1])
        if pixels is not None:
            return [pixels[y - top : y - top + h, x - left : x - left + w] for y, x, h, w in boxes]
    pixels = decode_whole(data)
    _require_inside(boxes, pixels.shape[:2])
    return [pixels[y : y + h, x : x + w] for y, x, h, w in boxes]


def _require_inside(boxes: Sequence[Box], size: tuple[int, int]) -> None:
    for top, left, height, width in boxes:
        if not (0 <= top < top + height <= size[0] and 0 <= left < left + width <= size[1]):
            raise ValueError(
                f"the region top={top} left={left} height={height} width={width} is not inside a picture of "
                f"height {size[0]} and width {size[1]}"
            )


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that is whole and without EXIF, which may turn it; of all else None."""
    if not (data.startswith(_SOI) and data.endswith(_EOI)):
        return None
    size, position = None, 2
    while position + 10 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _SOS:
            return size
        if marker == _APP1:
            return None
        if marker in _SOF:
            size = (
                int.from_bytes(data[position + 5 : position + 7], "big"),
                int.from_bytes(data[position + 7 : position + 9], "big"),
            )
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _decode_rectangle(library: ctypes.CDLL, data: bytes, box: Box, picture_width: int) -> np.ndarray | None:
    """Decode ``box`` alone; None where this JPEG is not for that, or the library has anything to say against it."""
    handle = _handle(library)
    if library.tj3DecompressHeader(handle, data, len(data)):
        return None
    mcu = _MCU_WIDTH.get(library.tj3Get(handle, _SUBSAMPLING))
    if mcu is None or library.tj3Get(handle, _COLOUR_SPACE) not in (_YCBCR, _GREY):
        return None
    top, left, height, width = box
    # One MCU more than the box touches, at either side. Above and below, the library itself keeps the neighbours.
    first = max(left // mcu * mcu - mcu, 0)
    last = min(-(-(left + width) // mcu) * mcu + mcu, picture_width)
    if library.tj3SetCroppingRegion(handle, _Rectangle(first, top, last - first, height)):
        return None
    pixels = np.empty((height, last - first, 3), np.uint8)
    if library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, _RGB):
        return None
    return pixels[:, left - first : left - first + width]


def _handle(library: ctypes.CDLL) -> int:
    handle: _Handle | None = getattr(_of_thread, "handle", None)
    if handle is None:
        handle = _of_thread.handle = _Handle(library)
    return int(handle.pointer)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_libturbojpeg("tj3SetCroppingRegion")
    if library is None:
        return None
    handle = ctypes.c_void_p
    library.tj3Init.restype = handle
    library.tj3Init.argtypes = [ctypes.c_int]
    library.tj3Set.argtypes = [handle, ctypes.c_int, ctypes.c_int]
    library.tj3Get.argtypes = [handle, ctypes.c_int]
    library.tj3DecompressHeader.argtypes = [handle, ctypes.c_char_p, ctypes.c_size_t]
    library.tj3SetCroppingRegion.argtypes = [handle, _Rectangle]
    library.tj3Decompress8.argtypes = [
        *(handle, ctypes.c_char_p, ctypes.c_size_t),
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    ]
    library.tj3Destroy.argtypes = [handle]
    library.tj3Destroy.restype = None
    return library
