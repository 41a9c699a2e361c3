"""Every bad or odd kind of file has the fate that the table of ``datagen.picture.decode`` gives it, and no other."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datagen.picture.decode import PictureError, decode, read_header
from tests.support.bad_pictures import Fate, bad_pictures, odd_shapes, photo

MAX_PIXELS = 150_000_000
MUTATIONS = int(os.environ.get("IRD_FUZZ_MUTATIONS", "2000"))


def fate(data: bytes) -> tuple[str, str | tuple[str, ...]]:
    try:
        pixels, conversions = decode(data, read_header(data, MAX_PIXELS))
    except PictureError as error:
        assert str(error)
        return "failed" if error.failed else "rejected", error.reason
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3 and pixels.shape[2] == 3
    return "measured", conversions


@pytest.mark.parametrize(("name", "expected"), [*bad_pictures().items(), *odd_shapes().items()])
def test_every_kind_of_file_has_its_fate(name: str, expected: Fate) -> None:
    data, verdict, detail = expected
    assert fate(data) == (verdict, detail)


def test_what_is_accepted_shows_the_photograph() -> None:
    """A wrong channel order, scale or turn would leave far more than what JPEG, palettes and profiles change."""
    original = np.asarray(photo()).astype(int)
    rough = ("palette", ".gif", "profile", "display_p3", "adobe_rgb", "multi", "zeroed", "bomb", "turned")
    for name, (data, verdict, conversions) in bad_pictures().items():
        if verdict != "measured" or any(word in name for word in rough):
            continue
        pixels = decode(data, read_header(data, MAX_PIXELS))[0].astype(int)
        if "grey_to_rgb" in conversions:
            assert np.ptp(pixels, axis=2).max() == 0, name
            pixels, expected = pixels[..., 0], original.mean(axis=2)
        else:
            expected = original
        limit = 40 if "grey_to_rgb" in conversions else 6
        assert np.abs(pixels - expected).mean() < limit, name


# The hungriest of these is the PNG whose text chunks inflate to 64 MiB before Pillow's limit ends it.
_BOMBS = """
import resource
from datagen.picture.decode import PictureError, decode, read_header
from tests.support.bad_pictures import bad_pictures
bombs = [data for name, (data, *_) in bad_pictures().items() if "bomb" in name]
assert len(bombs) >= 11, len(bombs)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for data in bombs:
    try:
        decode(data, read_header(data, 150_000_000))
    except PictureError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_cost_little_memory_and_time() -> None:
    command = [sys.executable, "-c", _BOMBS]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 300


def _mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        kind = rng.randrange(6)
        # Headers are where the variety is.
        position = rng.randrange(len(changed)) if rng.random() < 0.4 else rng.randrange(min(len(changed), 300))
        if kind == 0:
            changed[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            changed[position : position + 4] = rng.randbytes(4)
        elif kind == 3:
            del changed[position : position + rng.randrange(1, 40)]
        elif kind == 4:
            changed[position:position] = changed[position : position + rng.randrange(1, 40)]
        else:
            del changed[max(position, 1) :]
        if not changed:
            break
    return bytes(changed)


_SEEDS = {
    "JPEG": "turned_6.jpg",
    "progressive JPEG": "progressive.jpg",
    "profiled JPEG": "adobe_rgb.jpg",
    "PNG": "palette_key_unused.png",
    "WebP": "display_p3.webp",
    "GIF": "static.gif",
    "deflated TIFF": "deflate.tif",
    "LZW TIFF": "lzw.tif",
    "BMP": "palette.bmp",
    "PPM": "good.ppm",
}


@pytest.mark.parametrize("format", _SEEDS)
def test_mutated_files_raise_nothing_but_picture_errors(format: str) -> None:
    """IRD_FUZZ_MUTATIONS=100000 looks longer, at other mutations than those of shorter runs."""
    data = bad_pictures()[_SEEDS[format]][0]
    rng = random.Random(f"{format} {MUTATIONS}")
    verdicts = {fate(_mutated(data, rng))[0] for _ in range(MUTATIONS // len(_SEEDS))}
    assert "failed" in verdicts
