"""Where pictures come from and where their results go: files, folders, patterns, s3:// and standard streams."""

import fnmatch
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from infra.config import ConfigError
from infra.storage import Store, open_store
from pipeline.pictures import SUFFIXES, find_pictures, refuse_input_as_output

STREAM = "-"  # standard input as IN, standard output as OUT
_WILD = "*?["


@dataclass(frozen=True)
class Place:
    """One picture in a store; without a store, the standard input or output."""

    store: Store | None
    key: str

    @property
    def suffix(self) -> str:
        """Of its name, in lower case; empty for a stream."""
        return PurePosixPath(self.key).suffix.lower() if self.store is not None else ""

    def read(self) -> bytes:
        """All bytes. Raises StorageError if that fails."""
        return self.store.read(self.key) if self.store is not None else sys.stdin.buffer.read()

    def write(self, data: bytes) -> None:
        """Publish ``data`` in one step. Raises StorageError if that fails."""
        if self.store is not None:
            self.store.write(self.key, data)
        else:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    def beside(self, ending: str) -> "Place":
        """``a.png`` with the ending ``.compare`` is ``a.compare.png``."""
        name = PurePosixPath(self.key)
        return Place(self.store, str(name.with_name(f"{name.stem}{ending}{name.suffix}")))

    def __str__(self) -> str:
        return f"{self.store.uri}/{self.key}" if self.store is not None else "standard input or output"


@dataclass(frozen=True)
class Job:
    """One picture to restore; its name says which, and is the same on the next run."""

    name: str
    given: Place
    result: Place


@dataclass(frozen=True)
class Plan:
    """All jobs, and the folder or prefix of the results where there may be several."""

    jobs: list[Job]
    folder: Store | None


def plan(sources: Sequence[str], out: str) -> Plan:
    """What is read, and where each result goes.

    Args:
        sources: pictures, folders, patterns (``*``, ``?``, ``[…]``, ``**``), ``s3://`` objects, prefixes or patterns,
            or ``-`` alone.
        out: for one picture a name, whose suffix chooses the format, or a folder; for all else a folder or
            ``s3://`` prefix; or ``-``.

    Raises:
        ConfigError: there is no such input, or it does not go with ``out``.
        StorageError: a bucket cannot be listed.
    """
    if STREAM in sources:
        if len(sources) > 1:
            raise ConfigError("- reads one picture from the standard input; give it alone")
        if out != STREAM and PurePosixPath(out).suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{out}: a picture from the standard input needs a file name, or -")
        return Plan([Job("standard input", Place(None, STREAM), _single(out))], None)
    found = [_find(source, out) for source in sources]
    single = len(found) == 1 and found[0][1]
    if out == STREAM:
        if not single:
            raise ConfigError("- writes one picture to the standard output; name a folder for several")
        (name, given), *_ = found[0][0]
        return Plan([Job(name, given, Place(None, STREAM))], None)
    if single:
        (name, given), *_ = found[0][0]
        return Plan([Job(name, given, _result_of_one(name, given, out))], None)
    _refuse_file(out)
    folder = open_store(out)
    jobs: dict[str, Job] = {}
    for name, given in (pair for pairs, _ in found for pair in pairs):
        if name in jobs:
            raise ConfigError(f"{jobs[name].given} and {given} would both be written as {name}; give one at a time")
        jobs[name] = Job(name, given, Place(folder, name))
    inputs = {str(job.given) for job in jobs.values()}
    for job in jobs.values():
        if str(job.result) in inputs:
            raise ConfigError(f"{job.result} is an input itself; choose another OUT, so that the originals stay")
    return Plan(list(jobs.values()), folder)


def _find(source: str, out: str) -> tuple[list[tuple[str, Place]], bool]:
    """The pictures behind one source, each with its name, and whether the source names a picture itself."""
    if source.startswith("s3://"):
        return _find_in_bucket(source)
    path = Path(source)
    if path.is_dir():
        if not out.startswith("s3://"):
            _refuse_file(out)
            refuse_input_as_output(path, Path(out))
        folder = Path(out).resolve() if out != STREAM and not out.startswith("s3://") else None
        # Results below the input folder are no inputs of the next run.
        names = [n for n in find_pictures(path) if folder is None or not (path / n).resolve().is_relative_to(folder)]
        if not names:
            raise ConfigError(f"{source}: no pictures below it ({', '.join(SUFFIXES)})")
        store = open_store(path)
        return [(name.as_posix(), Place(store, name.as_posix())) for name in names], False
    if path.is_file():
        return [(path.name, Place(open_store(path.parent), path.name))], True
    if any(sign in source for sign in _WILD):
        fixed = _fixed(path.parts)
        base = Path(*fixed)
        found = base.glob(str(Path(*path.parts[len(fixed) :])))
        names = sorted(p.relative_to(base) for p in found if p.is_file() and p.suffix.lower() in SUFFIXES)
        if not names:
            raise ConfigError(f"{source}: no picture has such a name ({', '.join(SUFFIXES)})")
        store = open_store(base)
        return [(name.as_posix(), Place(store, name.as_posix())) for name in names], False
    raise ConfigError(f"{source}: no such file or folder")


def _find_in_bucket(source: str) -> tuple[list[tuple[str, Place]], bool]:
    parts = source.removeprefix("s3://").split("/")
    if any(sign in source for sign in _WILD):
        base = _fixed(parts)
        pattern = "/".join(parts[len(base) :])
        store = open_store(f"s3://{'/'.join(base)}")
        keys = [entry.key for entry in store.list() if fnmatch.fnmatchcase(entry.key, pattern)]
    elif PurePosixPath(source).suffix.lower() in SUFFIXES:
        store = open_store(f"s3://{'/'.join(parts[:-1])}")
        return [(parts[-1], Place(store, parts[-1]))], True
    else:
        store = open_store(source.rstrip("/"))
        keys = [entry.key for entry in store.list()]
    keys = [key for key in keys if PurePosixPath(key).suffix.lower() in SUFFIXES]
    if not keys:
        raise ConfigError(f"{source}: no pictures there ({', '.join(SUFFIXES)})")
    return [(key, Place(store, key)) for key in keys], False


def _fixed(parts: Iterable[str]) -> list[str]:
    """The parts of a pattern before the first that is wild."""
    fixed: list[str] = []
    for part in parts:
        if any(sign in part for sign in _WILD):
            break
        fixed.append(part)
    return fixed


def _refuse_file(out: str) -> None:
    if not out.startswith("s3://") and Path(out).is_file():
        raise ConfigError(f"{out} is a file; a folder of pictures goes into a folder")


def _result_of_one(name: str, given: Place, out: str) -> Place:
    suffix = PurePosixPath(out).suffix
    if out.startswith("s3://"):
        result = _single(out) if suffix and not out.endswith("/") else Place(open_store(out.rstrip("/")), name)
    elif Path(out).is_dir() or not suffix or out.endswith("/"):
        result = Place(open_store(out), name)
    else:
        result = _single(out)
    if result.suffix not in SUFFIXES:
        raise ConfigError(f"{result}: cannot write {result.suffix!r}; choose one of {', '.join(SUFFIXES)}")
    if str(result) == str(given) or _same_file(result, given):
        raise ConfigError(f"{out}: is the input itself; choose another OUT, so that the original stays")
    return result


def _same_file(one: Place, other: Place) -> bool:
    paths = [Path(str(place)) for place in (one, other)]
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])


def _single(out: str) -> Place:
    if out == STREAM:
        return Place(None, STREAM)
    if out.startswith("s3://"):
        folder, _, key = out.rpartition("/")
        return Place(open_store(folder), key)
    return Place(open_store(Path(out).parent), Path(out).name)
