"""Tars as people's tools write them, with byte strings in place of pictures: readers do not decode."""

import io
import tarfile
from pathlib import Path

import numpy as np


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """Write ``members`` in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def like_img2dataset(path: Path, first: int, count: int, size: int = 2000) -> Path:
    """``<key>.jpg``, ``<key>.txt`` and ``<key>.json`` a sample; the content follows from the number."""
    members = []
    for number in range(first, first + count):
        members.append((f"{number:09d}.jpg", content(number, size)))
        members.append((f"{number:09d}.txt", b"caption"))
        members.append((f"{number:09d}.json", b'{"number": %d}' % number))
    return write_tar(path, members)


def content(number: int, size: int = 2000) -> bytes:
    """Bytes that no other number has."""
    return np.random.default_rng(number).bytes(size + number)
