"""From the sources of a configuration to one sorted listing of pictures, and to the bytes of each."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from datagen.config import SourceConfig, absolute, name_of
from datagen.source.embedded import EmbeddedSource
from datagen.source.tar import COMPRESSED_SUFFIXES, FAULTS, Member, index_tars
from infra.errors import Refusal
from infra.storage import Entry, StorageError, open_store

logger = logging.getLogger(__name__)

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
        if "://" in root or root.startswith("embedded:") or Path(root).is_dir():
            continue
        if Path(root).exists():
            raise SourceError(f"{role} {source.uri!r}: is a file; give the folder that holds it ({Path(root).parent})")
        raise SourceError(f"{role} {source.uri!r}: no such folder ({root})")


def require_apart(sources: Sequence[SourceConfig], role: str, out: str) -> None:
    """Refuse an output inside a source: the next listing would take its shards for pictures.

    Raises:
        SourceError: naming both.
    """
    place = _resolved(out)
    for source in sources:
        root = _resolved(source.uri)
        if f"{place}/".startswith(f"{root}/"):
            raise SourceError(
                f"out {out!r} lies in {role} {source.uri!r}, so the next run would take its shards for pictures; give "
                "a place outside"
            )


def _resolved(uri: str) -> str:
    place = absolute(uri)
    return place if "://" in place or place.startswith("embedded:") else str(Path(place).resolve())


def list_pictures(sources: Sequence[SourceConfig], role: str = "source") -> tuple[list[Picture], int]:
    """Every picture of the sources, loose or in a tar, in order of source and of the UTF-8 bytes of the key.

    Tars are indexed by Ray tasks where a cluster is connected. What is wrong with one is a row too: a picture of its
    own with a fault, that stands for what could not be listed.

    Returns:
        the pictures, and the number of files (members not counted) that are no picture by name.

    Raises:
        SourceError: a source holds no picture that could be read.
        StorageError: a folder or a tar cannot be read, so what it holds cannot be known.
    """
    pictures: list[Picture] = []
    others = 0
    for index, source in enumerate(sources):
        found, passed_over = _list_source(source, name_of(source, index, role), role)
        pictures += found
        others += passed_over
    return pictures, others


def _list_source(source: SourceConfig, name: str, role: str) -> tuple[list[Picture], int]:
    root = absolute(source.uri)
    entries = list(open_source(root).list())
    loose = [entry for entry in entries if entry.key.lower().endswith(SUFFIXES)]
    tars = [entry for entry in entries if entry.key.lower().endswith(".tar")]
    compressed = [entry.key for entry in entries if entry.key.lower().endswith(COMPRESSED_SUFFIXES)]

    def picture(entry: Entry, key: str, size: int, member: Member | None = None, fault: str = "") -> Picture:
        return Picture(f"{name}/{key}", root, key, size, entry.version, source.licence, member, fault)

    found = [picture(entry, entry.key, entry.size) for entry in loose]
    for tar, index in zip(tars, index_tars(open_store(root), tars, SUFFIXES) if tars else ()):
        if index.fault:
            logger.warning("%s/%s: %s: %s", root, tar.key, index.fault, FAULTS[index.fault])
            found.append(picture(tar, tar.key, tar.size, fault=index.fault))
        for inner in index.pictures:
            found.append(picture(tar, f"{tar.key}/{inner.name}", inner.size, inner.member, inner.fault))
    if compressed:
        message = "%s: %d compressed tars are passed over, the first is %s; decompress them"
        logger.warning(message, root, len(compressed), compressed[0])
    if not any(not one.fault for one in found):
        raise SourceError(f"{role} {source.uri!r}: no picture there ({_why_none(found, compressed)})")
    return _without_namesakes(found), len(entries) - len(loose) - len(tars)


def _why_none(found: Sequence[Picture], compressed: Sequence[str]) -> str:
    if found:
        return f"{found[0].key}: {found[0].fault}: {FAULTS[found[0].fault]}; and {len(found) - 1} more"
    looked_for = f"looked for {', '.join(SUFFIXES)}, also inside .tar"
    return f"{looked_for}; passed over {compressed[0]}: decompress it" if compressed else looked_for


def _without_namesakes(found: Sequence[Picture]) -> list[Picture]:
    """Sorted; of several with one key (a tar may hold a name twice) the later ones get a key of their own, and a fault.

    No key of a picture ends in ``#2``, since none ends so by its suffix.
    """
    ordered = sorted(found, key=lambda picture: picture.key.encode())
    unique: list[Picture] = []
    for _, same in itertools.groupby(ordered, key=lambda picture: picture.key):
        first, *later = same
        unique.append(first)
        for count, picture in enumerate(later, 2):
            source, key = f"{picture.source}#{count}", f"{picture.key}#{count}"
            unique.append(replace(picture, source=source, key=key, fault="duplicate_member"))
    return unique


def read_picture(picture: Picture) -> bytes:
    """The bytes of a picture's file.

    Raises:
        NotFoundError, StorageError: the file is gone, or the store is away, or a tar was replaced by a shorter one.
    """
    if picture.member is None:
        return open_source(picture.root).read(picture.key)
    data = open_store(picture.root).read_range(picture.member.container, picture.member.offset, picture.size)
    if len(data) != picture.size:
        raise StorageError(
            f"{picture.uri}: the tar was cut since it was listed; `python -m datagen scan` lists it anew"
        )
    return data
