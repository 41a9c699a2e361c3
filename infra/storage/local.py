"""A local (or mounted) folder as a store."""

import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.files import publish_atomically, write_atomically
from infra.storage.contract import (
    UNPUBLISHED,
    Entry,
    NotFoundError,
    StorageError,
    Store,
    check_key,
    check_prefix,
    is_unpublished,
    is_utf8,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStore:
    """Objects are regular files below ``uri`` (an absolute path), symbolic links to files and folders included."""

    uri: str

    def list(self, prefix: str = "") -> Iterator[Entry]:
        check_prefix(prefix, self.uri)
        folder, slash, start = prefix.rpartition("/")
        root = Path(self.uri)
        if root.exists() and not root.is_dir():
            raise StorageError(f"{self.uri}: is a file, not a folder")
        if is_unpublished(prefix) or "//" in prefix:
            return
        yield from _walk(root / folder, folder + slash, start, frozenset())

    def read(self, key: str) -> bytes:
        path = self._path(key)
        with self._explained(key):
            _require_file(path)
            return path.read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise ValueError(f"start and length must not be negative, got {start} and {length}")
        path = self._path(key)
        with self._explained(key):
            _require_file(path)
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(length)

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._explained(key, writing=True):
            _refuse_folder(path)
            write_atomically(path, data)

    def upload(self, path: str | Path, key: str) -> None:
        target = self._path(key)
        _require_source(path)
        with self._explained(key, writing=True):
            _refuse_folder(target)
            with publish_atomically(target) as temporary:
                shutil.copyfile(path, temporary)

    def download(self, key: str, path: str | Path) -> None:
        source = self._path(key)
        with self._explained(key):
            _require_file(source)
        with publish_atomically(path) as temporary, self._explained(key):
            shutil.copyfile(source, temporary)

    def stat(self, key: str) -> Entry:
        path = self._path(key)
        with self._explained(key):
            found = _require_file(path)
            return Entry(key, found.st_size, str(found.st_mtime_ns))

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(NotFoundError), self._explained(key):
            _require_file(path)
            path.unlink()

    def sweep(self, prefix: str = "", older_than: float = 24 * 3600.0) -> tuple[str, ...]:
        """Remove what killed writers left below the folder ``prefix``: ``.tmp-*`` files not written to for so long.

        Only for stores that this project writes. ``older_than`` is in seconds; nothing tells from another host whether
        a writer lives, but one that lives has written within a day, and would fail loudly, not publish a part. Ages
        are measured by the file system's own clock, so hosts whose clocks differ do no harm.

        Returns:
            the paths removed, relative to the store.
        """
        check_prefix(prefix, self.uri)
        removed = []
        with self._explained(prefix, writing=True):
            for folder, _, names in os.walk(Path(self.uri, prefix)):  # Does not follow symbolic links to folders.
                leftovers = [Path(folder, name) for name in names if name.startswith(UNPUBLISHED)]
                now = _clock_of(Path(folder)) if leftovers else 0.0
                for path in leftovers:
                    with contextlib.suppress(FileNotFoundError):
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode) and now - status.st_mtime > older_than:
                            path.unlink()
                            removed.append(path.relative_to(self.uri).as_posix())
        return tuple(sorted(removed))

    def _path(self, key: str) -> Path:
        check_key(key, self.uri)
        if "//" in key:
            raise StorageError(f"key {key!r} in {self.uri}: '//' would name the same file as '/'")
        return Path(self.uri, key)

    @contextlib.contextmanager
    def _explained(self, key: str, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if writing:
                raise StorageError(f"{self.uri}/{key}: cannot be written: {error}") from error
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise NotFoundError(f"{self.uri}/{key}: no such file") from None
            raise StorageError(f"{self.uri}/{key}: {error}") from error


def sweep(store: Store, prefix: str = "") -> tuple[str, ...]:
    """``LocalStore.sweep`` where the store is a folder; a bucket shows nothing unfinished, so there is nothing to do.

    Parts of uploads that were broken off are no objects, but are paid for: a lifecycle rule of the bucket
    (AbortIncompleteMultipartUpload) removes them, and cannot mistake another host's upload for a dead one.
    """
    return store.sweep(prefix) if isinstance(store, LocalStore) else ()


def _walk(directory: Path, relative: str, start: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    """Entries below ``directory`` whose name starts with ``start``; ``relative`` is its key, empty or ending in '/'."""
    try:
        here = directory.stat()
        if (here.st_dev, here.st_ino) in above:
            logger.warning("%s: symbolic link to a folder above itself, not followed", directory)
            return
        with os.scandir(directory) as scan:
            found = [entry for entry in scan if entry.name.startswith(start) and not entry.name.startswith(UNPUBLISHED)]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StorageError(f"{directory}: cannot be listed: {error.strerror}") from error
    # A folder takes its place by "name/": '-' and '.' sort before '/', so "a.txt" comes before "a/b.txt".
    for entry in sorted(found, key=lambda entry: os.fsencode(entry.name) + b"/" * _is_folder(entry)):
        key = relative + entry.name
        if not is_utf8(entry.name):
            raise StorageError(
                f"{entry.path!r}: the name is not UTF-8, so no table can hold it; rename it (convmv does whole folders)"
            )
        if _is_folder(entry):
            yield from _walk(Path(entry.path), f"{key}/", "", above | {(here.st_dev, here.st_ino)})
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink():
                logger.warning("%s: broken symbolic link, passed over", entry.path)
            elif not isinstance(error, FileNotFoundError):
                raise StorageError(f"{entry.path}: {error.strerror}") from error
            continue
        if stat.S_ISREG(status.st_mode):
            yield Entry(key, status.st_size, str(status.st_mtime_ns))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link that leads to itself
        return False


def _clock_of(folder: Path) -> float:
    """Seconds since the epoch by the clock of the file system that holds ``folder``."""
    with tempfile.NamedTemporaryFile(prefix=UNPUBLISHED, dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _require_file(path: Path) -> os.stat_result:
    # Asked before opening: opening a named pipe would wait for its writer for ever.
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(path)
    return status


def _require_source(path: str | Path) -> None:
    if not Path(path).is_file():
        raise NotFoundError(f"{path}: no such file to upload")


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise StorageError(f"{path}: is a folder, an object cannot take its name")
