"""Atomic publication of local files: a reader sees the old bytes or the new ones, never a part of them."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# mkstemp makes files private to the user; published files follow the umask like any other. It can only be
# read by setting it, for all threads at once, so it is read before there are any.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextlib.contextmanager
def publish_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place.

    On an exception nothing is published and the temporary file is removed. A killed process leaves
    only a ``.tmp-*`` file, which no reader looks at.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix[:16], dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Publish ``data`` as ``path`` in one step, creating parent folders."""
    with publish_atomically(path) as temporary:
        temporary.write_bytes(data)


def sha256_of_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces of bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
