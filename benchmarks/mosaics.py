"""High-resolution JPEGs made of photographs, so that the entropy per pixel stays that of photographs."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from datagen.source.embedded import corpus_files


def photographs(folder: Path | None) -> list[Image.Image]:
    """The pictures of a folder, or those that ship with the dependencies."""
    if folder is None:
        files = [
            data for name, data in sorted(corpus_files("pictures").items()) if name.startswith(("ast", "chi", "ro"))
        ]
    else:
        files = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png")]
    pictures = []
    for data in files:
        try:
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            continue
    return pictures


def mosaics(folder: Path | None, count: int, width: int = 2000, height: int = 1500) -> Iterator[bytes]:
    """JPEGs of quality 95, 4:2:0, each of photographs side by side in another order."""
    pictures = photographs(folder)
    for index in range(count):
        rng = np.random.default_rng(index)
        canvas = Image.new("RGB", (width, height))
        y = 0
        while y < height:
            x = row_height = 0
            while x < width:
                picture = pictures[rng.integers(len(pictures))]
                canvas.paste(picture, (x, y))
                x += picture.width
                row_height = max(row_height, picture.height)
            y += row_height
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=95, subsampling="4:2:0")
        yield buffer.getvalue()
