"""What a JPEG says of itself: its frame, its scans, and the compression history that quantisation tables tell."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Marker codes, ITU-T T.81 (1992), table B.1.
_EOI, _SOS = 0xD9, 0xDA
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_FRAME_HEADER = struct.Struct(">BHHB")
# Within a scan a marker is 0xFF and neither a stuffed zero, nor a restart, nor a fill byte.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")

# ITU-T T.81 (1992), table K.1: the luma table that the Independent JPEG Group scales with its quality.
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


def scaled_tables(table: np.ndarray, quality: Sequence[int]) -> np.ndarray:
    """``table`` as the Independent JPEG Group scales it to each quality 1 … 100: int [len(quality), 8, 8]."""
    of = np.asarray(quality)
    percent = np.where(of < 50, 5000 // of, 200 - 2 * of)
    return np.clip((table * percent[:, None, None] + 50) // 100, 1, 255)


_TABLES = scaled_tables(LUMA_TABLE, range(1, 101)).reshape(100, 64)


def estimate_quality(tables: Mapping[int, Sequence[int]]) -> int:
    """IJG quality 1..100 whose luma table lies nearest (L1) to table 0 of a JPEG header.

    Args:
        tables: quantisation tables by id, 64 values each in row order, as ``PIL.Image.Image.quantization`` gives them.

    Cameras and editors use tables of their own; for those the figure is the nearest IJG equivalent.
    """
    luma = np.asarray(tables[min(tables)])
    return int(np.abs(_TABLES - luma).sum(axis=1).argmin()) + 1


class Frame(NamedTuple):
    """The frame header of a JPEG. ``process`` is its marker: 0xC0 baseline, 0xC1 extended, 0xC2 progressive …"""

    process: int
    bits: int
    height: int
    width: int
    components: int


def read_frame(data: bytes) -> Frame | None:
    """The first frame header, or None where the segments before it are broken."""
    for marker, start, end in _segments(data):
        if marker in _SOF:
            return Frame(marker, *_FRAME_HEADER.unpack_from(data, start)) if end - start >= _FRAME_HEADER.size else None
        if marker == _SOS:
            break
    return None


def count_scans(data: bytes) -> int:
    """The scans of the picture, up to its end marker or the first damage."""
    return sum(marker == _SOS for marker, _, _ in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte after the length, end) of each segment; those of what is embedded in one are not entered."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == _EOI:
            return
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, position + 4, end
        if marker == _SOS:
            found = _MARKER_AFTER_SCAN.search(data, end)
            end = found.start() if found else len(data)
        position = end
