"""From the sources of a configuration to one sorted listing of pictures, and to the bytes of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datagen.config import SourceConfig, absolute, name_of
from datagen.source.embedded import EmbeddedSource
from infra.errors import Refusal
from infra.storage import Entry, open_store

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class SourceError(Refusal, RuntimeError):
    """A source does not exist or holds no picture."""


class Source(Protocol):
    """What a kind of source has to offer; every ``infra.storage.Store`` is one."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Entries sorted by key."""

    def read(self, key: str) -> bytes:
        """The whole file."""


@dataclass(frozen=True)
class Member:
    """Where a picture and what came along with it lie in a tar shard: byte ranges of the file ``container``."""

    container: str
    offset: int
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


@dataclass(frozen=True)
class Picture:
    """One picture of a listing.

    ``source`` is ``<name>/<key>`` and unique in a corpus; ``root`` is the uri that ``key`` is below. For a member of
    a tar the key is ``<path of the tar>/<name of the member>``. A picture with a ``fault`` cannot be read, and the
    fault is the reason that its row will give.
    """

    source: str
    root: str
    key: str
    size: int
    version: str
    licence: str
    member: Member | None = None
    fault: str = ""

    @property
    def uri(self) -> str:
        """Where the file lies."""
        return f"{self.root}/{self.key}"


def open_source(root: str) -> Source:
    """Open an absolute source uri."""
    return EmbeddedSource(root) if root.startswith("embedded:") else open_store(root)


def require_folders(sources: Sequence[SourceConfig], role: str) -> None:
    """Refuse folders that do not exist before any work starts.

    Raises:
        SourceError: naming the folder.
    """
    for source in sources:
        root = absolute(source.uri)
        if "://" not in root and not root.startswith("embedded:") and not Path(root).is_dir():
            raise SourceError(f"{role} {source.uri!r}: no such folder ({root})")


def list_pictures(sources: Sequence[SourceConfig], role: str = "source") -> tuple[list[Picture], int]:
    """Every picture of the sources in order of source and key, and the number of files that are no picture by name.

    Raises:
        SourceError: a source holds no picture.
    """
    pictures: list[Picture] = []
    others = 0
    for index, source in enumerate(sources):
        root = absolute(source.uri)
        before = len(pictures)
        for entry in open_source(root).list():
            if not entry.key.lower().endswith(SUFFIXES):
                others += 1
                continue
            name = f"{name_of(source, index, role)}/{entry.key}"
            pictures.append(Picture(name, root, entry.key, entry.size, entry.version, source.licence))
        if len(pictures) == before:
            raise SourceError(f"{role} {source.uri!r}: no picture there (looked for {', '.join(SUFFIXES)})")
    return pictures, others


def read_picture(picture: Picture) -> bytes:
    """The bytes of a picture's file.

    Raises:
        NotFoundError, StorageError: the file is gone, or the store is away.
    """
    if picture.member is None:
        return open_source(picture.root).read(picture.key)
    return open_store(picture.root).read_range(picture.member.container, picture.member.offset, picture.size)
