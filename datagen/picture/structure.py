"""What the decoders at hand do not look at: checksums, end markers, and formats that nobody here reads."""

import re
import struct
import zlib

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# First bytes by which no other kind of file begins: what has them and cannot be opened is a damaged picture.
_SIGNATURES = (b"\xff\xd8\xff", _PNG_SIGNATURE, b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_FORMATS = {
    "HEIF or AVIF": re.compile(rb"....ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    "Photoshop": re.compile(rb"8BPS"),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "Canon raw": re.compile(rb"II\*\0....CR\x02|....ftypcrx ", re.DOTALL),
    "SVG": re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<(?:\?xml|!--|!DOCTYPE svg).{0,2000}?)?<svg[\s>]", re.DOTALL),
}


def other_format(data: bytes) -> str:
    """Name of the picture format, one that is not read here, by which the bytes begin; empty if none is known."""
    return next((name for name, pattern in _OTHER_FORMATS.items() if pattern.match(data)), "")


def has_signature(data: bytes) -> bool:
    """Whether the first bytes are those of a format that is read here."""
    return data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def check_png(data: bytes) -> None:
    """Compare the checksum of every chunk up to IEND (PNG specification, section 5); what follows IEND is ignored.

    Raises:
        ValueError: a checksum differs, or the file ends before IEND does.
    """
    view = memoryview(data)
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise ValueError("ends without an IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError(f"ends within its {kind!r} chunk")
        if zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError(f"checksum of its {kind!r} chunk at byte {position} differs")
        position = end


def check_gif(data: bytes) -> None:
    """Follow the blocks to the trailer (GIF89a specification, section 27); what comes after it is ignored.

    Raises:
        ValueError: the blocks are broken, or the file ends without a trailer.
    """
    try:
        position = 13 + _colour_table_bytes(data[10])
        while (introducer := data[position]) != 0x3B:
            if introducer == 0x2C:
                position += 11 + _colour_table_bytes(data[position + 9])
            elif introducer == 0x21:
                position += 2
            elif introducer != 0:  # Some writers leave a stray terminator between blocks.
                raise ValueError(f"no block begins with {introducer:#x}, as that at byte {position} does")
            while data[position]:
                position += data[position] + 1
            position += 1
    except IndexError:
        raise ValueError("ends without a trailer") from None


def _colour_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def check_deflated(data: bytes, offset: int, size: int, limit: int) -> None:
    """Inflate a zlib stream (RFC 1950) to its checksum, keeping nothing: libtiff stops before it gets there.

    Raises:
        ValueError: it is damaged, ends early, or inflates to more than ``limit`` bytes.
    """
    inflater = zlib.decompressobj()
    rest, inflated = data[offset : offset + size], 0
    while not inflater.eof:
        try:
            piece = inflater.decompress(rest, 1 << 20)
        except zlib.error as error:
            raise ValueError(f"compressed data at byte {offset}: {error}") from None
        rest, inflated = inflater.unconsumed_tail, inflated + len(piece)
        if inflated > limit or not (piece or rest or inflater.eof):
            raise ValueError(f"compressed data at byte {offset} ends early or holds too much")
