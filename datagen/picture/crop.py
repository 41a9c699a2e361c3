"""Rectangles cut out of a JPEG without decoding a pixel, so that no generation is lost.

The quantised DCT coefficients of the blocks inside a rectangle are copied and entropy-coded anew, which is what
``jpegtran -crop`` does. It works where the rectangle starts on the grid of the minimum coded units (MCU; ITU-T T.81,
A.2.4). A tile decodes to the pixels of its source except, where chroma is subsampled, for the outermost pixel on each
side: decoders interpolate chroma there from blocks that the tile no longer has.

The work is libturbojpeg's. Its C interface holds errors in (libjpeg's own ends the process), stops at the first
warning when asked, and writes the Huffman tables that the standard suggests (ITU-T T.81, annex K.3), so the bytes do
not hang on a version's choices: 2.1.5 and 2.1.92 (3.0 beta) were compared and agree. Optimised tables would save 2 to
4 %, but only version 3 offers them.
"""

import ctypes
import functools
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import simplejpeg

from datagen.picture.decode import PictureError

# Width and height in pixels of one MCU, by colour space and subsampling as libturbojpeg names them.
_MCU = {
    ("Gray", "Gray"): (8, 8),
    ("YCbCr", "444"): (8, 8),
    ("YCbCr", "422"): (16, 8),
    ("YCbCr", "440"): (8, 16),
    ("YCbCr", "420"): (16, 16),
    ("YCbCr", "411"): (32, 8),
}
# TJXOPT_CROP and TJXOPT_COPYNONE, TJFLAG_STOPONWARNING in turbojpeg.h.
_CROP, _NO_METADATA, _STRICT = 4, 64, 8192
# Marker codes, ITU-T T.81, table B.1.
_APP0, _DQT, _SOF0 = 0xE0, 0xDB, 0xC0
_FILES = ("libturbojpeg.so.0", "libturbojpeg.dylib")
_FOLDERS = ("", f"{sys.prefix}/lib/", "/opt/homebrew/lib/")


@dataclass(frozen=True)
class JpegGrid:
    """Size of a croppable JPEG and of its MCU, pixels as stored (EXIF orientation not applied)."""

    width: int
    height: int
    mcu_width: int
    mcu_height: int


class _Region(ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_int), ("w", ctypes.c_int), ("h", ctypes.c_int))


class _Transform(ctypes.Structure):
    _fields_ = (
        ("r", _Region),
        ("op", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("customFilter", ctypes.c_void_p),
    )


def crop_available() -> bool:
    """Whether this machine has libturbojpeg 2.0 or later, without which ``crop_jpeg`` cannot run."""
    return _library() is not None


@functools.cache
def load_libturbojpeg(symbol: str) -> ctypes.CDLL | None:
    """The first libturbojpeg of this machine that exports ``symbol``, which tells its version; None without one.

    The system's libraries are asked before the wheel ``turbojpeg``. Every symbol gets an object of its own, so that
    callers declare the types of their functions without meeting each other's.
    """
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(library, symbol):
            return library
    return None


def jpeg_grid(data: bytes) -> JpegGrid | None:
    """The MCU grid of a JPEG; None where its tiles are not to be cut losslessly.

    Croppable are grey and YCbCr pictures with 4:4:4, 4:2:2, 4:4:0, 4:2:0 or 4:1:1 subsampling, sequential or
    progressive; not CMYK, YCCK, RGB, or other subsamplings. Samples of 12 bits ``crop_jpeg`` itself finds out.

    Raises:
        PictureError: ``damaged``, when the header cannot be read, or its sampling factors fit no usual subsampling.
    """
    try:
        height, width, colour, subsampling = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise PictureError("damaged", f"JPEG header: {error}", failed=True) from None
    mcu = _MCU.get((colour, subsampling))
    return JpegGrid(width, height, *mcu) if mcu else None


def can_crop(grid: JpegGrid, box: tuple[int, int, int, int]) -> bool:
    """Whether ``box`` (x, y, width, height; pixels) lies inside the picture and starts on the MCU grid.

    Where it ends is free: a JPEG may hide a part of its last blocks.
    """
    x, y, width, height = box
    aligned = x % grid.mcu_width == 0 and y % grid.mcu_height == 0
    inside = 0 <= x < x + width <= grid.width and 0 <= y < y + height <= grid.height
    return aligned and inside


def crop_jpeg(data: bytes, boxes: Sequence[tuple[int, int, int, int]]) -> list[bytes] | None:
    """Cut rectangles out of one JPEG; its coefficients are decoded once for all of them.

    Args:
        data: the whole file. It takes 2 bytes of memory a sample, so ``read_header`` has limited its pixels before.
        boxes: x, y, width, height of each rectangle, pixels as stored. EXIF orientation and colour profiles are
            neither applied nor kept, so the caller passes only pictures whose decoding needs neither.

    Returns:
        One baseline JPEG a box: JFIF header, the source's quantisation tables and coefficients, no other metadata.
        None where one of the boxes cannot be cut losslessly (``jpeg_grid`` and ``can_crop`` tell beforehand but for
        rare files, such as those that redefine a quantisation table between scans); nothing is cut then.

    Raises:
        PictureError: ``damaged``, be the damage inside the boxes or not.
        RuntimeError: this machine has no libturbojpeg.
    """
    grid = jpeg_grid(data)
    if grid is None or not all(can_crop(grid, box) for box in boxes):
        return None
    if not boxes:
        return []
    library = _library()
    if library is None:
        raise RuntimeError(
            "libturbojpeg 2.0 or later is needed to cut JPEG tiles losslessly: `pip install turbojpeg`, or the package "
            "libturbojpeg0 (Debian), libturbojpeg (Ubuntu), turbojpeg (Fedora), jpeg-turbo (Homebrew), "
            "libjpeg-turbo (conda)"
        )
    tiles = _transform(library, data, boxes)
    # Sampling factors that are not the usual ones for their ratio make larger MCUs, to which the library widens a box;
    # 12-bit samples (version 3) and 16-bit quantisation tables come out as frames that are not baseline.
    expected = [(_SOF0, height, width) for _, _, width, height in boxes]
    if tiles is not None and [_frame(tile) for tile in tiles] == expected:
        return tiles
    _require_intact(data)
    return None


def _transform(library: ctypes.CDLL, data: bytes, boxes: Sequence[tuple[int, int, int, int]]) -> list[bytes] | None:
    handle = library.tjInitTransform()
    if not handle:
        raise MemoryError("libturbojpeg: no memory for a transform")
    transforms = (_Transform * len(boxes))(*(_Transform(_Region(*box), 0, _CROP | _NO_METADATA) for box in boxes))
    buffers = (ctypes.c_void_p * len(boxes))()
    sizes = (ctypes.c_ulong * len(boxes))()
    try:
        if library.tjTransform(handle, data, len(data), len(boxes), buffers, sizes, transforms, _STRICT):
            return None
        return [ctypes.string_at(buffer, size) for buffer, size in zip(buffers, sizes)]
    finally:
        for buffer in buffers:
            library.tjFree(buffer)
        library.tjDestroy(handle)


def _frame(tile: bytes) -> tuple[int, int, int]:
    """Second byte of the frame's marker, height and width; only JFIF header and quantisation tables stand before it."""
    at = 2
    while tile[at + 1] in (_APP0, _DQT):
        at += 2 + int.from_bytes(tile[at + 2 : at + 4], "big")
    return tile[at + 1], int.from_bytes(tile[at + 5 : at + 7], "big"), int.from_bytes(tile[at + 7 : at + 9], "big")


def _require_intact(data: bytes) -> None:
    try:
        simplejpeg.decode_jpeg(data, "GRAY", strict=True)
    except ValueError as error:
        raise PictureError("damaged", f"JPEG: {error}", failed=True) from None


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load_libturbojpeg("tjGetErrorCode")  # Before 2.0 metadata cannot be left out, nor warnings be errors.
    if library is None:
        return None
    library.tjInitTransform.restype = ctypes.c_void_p
    library.tjInitTransform.argtypes = []
    library.tjTransform.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_int),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    ]
    library.tjFree.argtypes = [ctypes.c_void_p]
    library.tjFree.restype = None
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    return library


def _candidates() -> Iterator[str]:
    yield from (folder + file for folder in _FOLDERS for file in _FILES)
    try:
        # The wheel `turbojpeg` carries the library; its own module would decode the source once for every box.
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))
