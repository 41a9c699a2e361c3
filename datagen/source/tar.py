"""Tar shards as a source of pictures, as img2dataset writes them: found by their headers, the pictures left unread.

A tar holds no list of its members, so its headers are followed from one to the next by ranged reads: one of 64 KiB
for each member that is larger, and one for many small ones. Python's tarfile reads them (ustar, GNU, PAX), but ends
in silence where a header is broken; here that is a fault of the tar, and what was found before it counts.
"""

import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, cast

from infra.storage import Entry, NotFoundError, StorageError, Store

# What can be wrong with a tar or a member, and what to do.
FAULTS = {
    "compressed_tar": "ranges of it cannot be read; decompress it (gunzip, zstd -d …) and remove the compressed one",
    "damaged_tar": "cut short or broken; the members before the damage are listed, fetch it again for the others",
    "duplicate_member": "an earlier member or file has this name, and counts",
    "missing": "gone since it was listed",
    "special_member": "a link, a sparse file or a device; pack the tar again from plain files (tar --hard-dereference)",
}
# The same compressors by name and by first bytes.
COMPRESSED_SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.z", ".tgz", ".tbz2", ".txz")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\x1f\x9d")

_BLOCK = 512
_WINDOW = 64 * 1024
# Names and attributes of a member; tarfile's search in a longer one would take minutes.
_LARGEST_RECORD = 256 * 1024
# tar fills its last record with zeros; the largest record that it can be told to write is below this.
_LARGEST_PADDING = 1 << 20
# Following headers is waiting for answers, so a task follows those of some tars at a time.
_TARS_PER_TASK = 4


@dataclass(frozen=True)
class Member:
    """Where a picture and what came along with it lie in a tar shard: byte ranges of the file ``container``.

    ``text`` and ``json`` are (offset, size) of the members ``<stem>.txt`` and ``<stem>.json``, where the picture is
    ``<stem>.<suffix>``.
    """

    container: str
    offset: int
    text: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


@dataclass(frozen=True)
class TarPicture:
    """A member with the name of a picture: UTF-8 (other bytes as ``\\xNN``), and never a path to write to."""

    name: str
    size: int
    member: Member
    fault: str = ""


@dataclass(frozen=True)
class TarIndex:
    """The pictures of a tar in their order in it, and what is wrong with the tar itself (a key of FAULTS, or empty)."""

    pictures: tuple[TarPicture, ...]
    fault: str = ""


def index_tars(store: Store, tars: Sequence[Entry], suffixes: tuple[str, ...]) -> list[TarIndex]:
    """The index of each tar, in order; found by Ray tasks where a cluster is connected.

    ``suffixes`` are those of pictures, in lower case.

    Raises:
        StorageError: the store is away, or refuses a tar. What is in it cannot be known then.
    """
    # Slow to import, and who reads one tar after another never needs it.
    import ray

    from infra.cluster import map_tasks

    tasks = [
        _Task(store, tuple(tars[start : start + _TARS_PER_TASK]), suffixes)
        for start in range(0, len(tars), _TARS_PER_TASK)
    ]
    results = map_tasks(_index_some, tasks) if len(tasks) > 1 and ray.is_initialized() else map(_index_some, tasks)
    found = {key: index for indices in results for key, index in indices}
    return [found[tar.key] for tar in tars]


def index_tar(store: Store, tar: Entry, suffixes: tuple[str, ...]) -> TarIndex:
    """Follow the headers of one tar. Of what is wrong with it, nothing is raised: see ``TarIndex.fault``.

    Raises:
        StorageError: the store is away, or refuses to read.
    """
    window = _Window(store, tar)
    pictures: list[TarPicture] = []
    companions: dict[str, tuple[int, int]] = {}
    fault = ""
    try:
        if window.read(8).startswith(_COMPRESSED):
            return TarIndex((), "compressed_tar")
        window.seek(0)
        for info in _headers(window, tar.size):
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            plain = info.isreg() and not info.issparse()
            if name.lower().endswith(suffixes) and not info.isdir():
                member = Member(tar.key, info.offset_data)
                pictures.append(TarPicture(name, info.size, member, "" if plain else "special_member"))
            elif plain and name.lower().endswith((".txt", ".json")):
                companions.setdefault(name, (info.offset_data, info.size))
    except _DamageError:
        fault = "damaged_tar"
    except NotFoundError:
        fault = "missing"
    return TarIndex(tuple(_accompanied(picture, companions) for picture in pictures), fault)


def _accompanied(picture: TarPicture, companions: dict[str, tuple[int, int]]) -> TarPicture:
    stem = picture.name.rpartition(".")[0]
    text, json = companions.get(f"{stem}.txt"), companions.get(f"{stem}.json")
    member = Member(picture.member.container, picture.member.offset, text, json)
    return TarPicture(picture.name, picture.size, member, picture.fault)


@dataclass(frozen=True)
class _Task:
    store: Store
    tars: tuple[Entry, ...]
    suffixes: tuple[str, ...]


def _index_some(task: _Task) -> list[tuple[str, TarIndex]]:
    with ThreadPoolExecutor(_TARS_PER_TASK) as pool:
        indices = pool.map(lambda tar: index_tar(task.store, tar, task.suffixes), task.tars)
        return [(tar.key, index) for tar, index in zip(task.tars, indices)]


class _DamageError(Exception):
    """The tar is not whole from here on."""


def _headers(window: "_Window", size: int) -> Iterator[tarfile.TarInfo]:
    """The members that are whole. Raises _DamageError unless an end marker follows them, and nothing follows that."""
    try:
        archive = tarfile.TarFile(fileobj=cast(IO[bytes], window), mode="r", encoding="utf-8", errors="surrogateescape")
        last = -1
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # They would pile up.
            # Old versions of tarfile follow a negative size backwards, for ever.
            if info.offset <= last or info.size < 0 or info.offset_data + (info.size if info.isreg() else 0) > size:
                raise _DamageError
            last = info.offset
            yield info
        end = archive.offset
    except (StorageError, GeneratorExit, _DamageError):
        raise
    except Exception as error:  # tarfile raises ReadError, ValueError, OverflowError, RecursionError and more.
        raise _DamageError from error
    window.seek(end)
    if window.read(_BLOCK) != bytes(_BLOCK) or size - end > _LARGEST_PADDING:
        raise _DamageError
    while piece := window.read(_WINDOW):
        if piece.strip(b"\0"):
            raise _DamageError


class _Window:
    """What tarfile needs of a file, over ranged reads of a store: the last piece read is kept."""

    def __init__(self, store: Store, tar: Entry) -> None:
        self._store, self._key, self._size = store, tar.key, tar.size
        self._position = self._start = 0
        self._held = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < 0:
            raise ValueError("before the start of the file")
        self._position = position
        return position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _LARGEST_RECORD:
            raise ValueError(f"a record of {length} bytes")
        end = min(self._position + length, self._size)
        if self._position >= end:
            return b""
        if not self._start <= self._position <= end <= self._start + len(self._held):
            self._start = self._position
            self._held = self._store.read_range(self._key, self._start, max(length, _WINDOW))
        piece = self._held[self._position - self._start : end - self._start]
        self._position += len(piece)
        return piece
