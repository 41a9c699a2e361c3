"""A version on this machine: fetched file by file, each checked, gone on with after a kill, found again offline."""

import fcntl
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.files import sha256_of_file, write_atomically
from infra.tracking import TrackingConfig
from pipeline.registry.packaging import FILES
from pipeline.registry.server import (
    RegistryAwayError,
    RegistryError,
    connect_to_registry,
    explained,
    find_version,
    parse_model_uri,
    where_is,
)

_NOTE = "pulled.json"
_ALIASES = ".aliases"  # beside the pulled folders: which version an alias pointed to when it was last asked for


def pull(model_uri: str, out: Path, settings: TrackingConfig, *, notify: Callable[[str], None] = warnings.warn) -> Path:
    """Download a version to ``out``/NAME-vVERSION, unless it lies there already; every file is checked by sha256.

    An interrupted pull goes on with the files that are missing. When the server is away, the version that lies there
    (for an alias: the one it pointed to when it was last pulled) is taken, and ``notify`` is told so.

    Args:
        model_uri: ``models:/NAME@ALIAS``, or ``models:/NAME/VERSION``, which is asked for once and never again.

    Returns:
        The folder: an MLflow model, with the export in its ``EXPORT``.

    Raises:
        RegistryError: not such a URI, no such model, alias or version, or damage on the server.
        RegistryAwayError: the server does not answer, and the version was not pulled before.
    """
    name, version, alias = parse_model_uri(model_uri)
    if version is not None and _is_sound(out / f"{name}-v{version}", settings):
        return out / f"{name}-v{version}"
    try:
        client = connect_to_registry(settings)
        with explained(settings):
            version = find_version(client, name, version, alias, settings)
            tags = client.get_model_version(name, str(version)).tags
            folder = _fetch(name, version, tags, out, settings)
    except RegistryAwayError as away:
        known, asked = _last_known(name, alias, out, settings)
        if known is None:
            raise
        notify(f"{away}\nUsing the copy in {known}, which {model_uri} was on {asked}")
        return known
    if alias is not None:
        pointer = {"version": version, "uri": where_is(settings), "asked": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
        write_atomically(out / _ALIASES / f"{name}@{alias}.json", json.dumps(pointer).encode())
    return folder


def _fetch(name: str, version: int, tags: dict[str, str], out: Path, settings: TrackingConfig) -> Path:
    """``out``/NAME-vVERSION, downloaded if it is not there in good order."""
    if "files_sha256" not in tags:
        raise RegistryError(f"models:/{name}/{version} was not pushed by `ird registry push`: no tag files_sha256")
    folder = out / f"{name}-v{version}"
    if _fault(folder, tags["files_sha256"]) is None:
        return folder
    out.mkdir(parents=True, exist_ok=True)
    # Named for its content, so that what another process left is gone on with.
    staging = out / f".part-{name}-v{version}-{tags['files_sha256'][:12]}"
    with _alone(out / ".lock"):
        if _fault(folder, tags["files_sha256"]) is None:  # another process was faster
            return folder
        _download(f"models:/{name}/{version}", tags["files_sha256"], staging, settings)
        note = {"name": name, "version": version, "uri": where_is(settings), **tags}
        write_atomically(staging / _NOTE, json.dumps(note, indent=2).encode())
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    return folder


def _download(model_uri: str, files_sha256: str, staging: Path, settings: TrackingConfig) -> None:
    """Fetch what ``staging`` lacks of the model."""
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    repository = ModelsArtifactRepository(model_uri)
    staging.mkdir(exist_ok=True)

    def fetch(file: str, expected: str) -> None:
        if (staging / file).is_file() and sha256_of_file(staging / file) == expected:
            return
        (staging / file).unlink(missing_ok=True)
        repository.download_artifacts(file, dst_path=str(staging))
        if sha256_of_file(staging / file) != expected:
            (staging / file).unlink()
            raise RegistryError(
                f"{model_uri} from {where_is(settings)}: {file} is not what was pushed (sha256); push the model again"
            )

    fetch(FILES, files_sha256)
    for file, expected in json.loads((staging / FILES).read_text()).items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise RegistryError(f"{model_uri}: {FILES} names {file!r}, which would lie outside of the model")
        fetch(file, expected)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; a killed one lets go. The file stays, since removing it would let two in."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_known(name: str, alias: str | None, out: Path, settings: TrackingConfig) -> tuple[Path | None, str]:
    """The folder that ``alias`` pointed to when the registry last answered, and when that was."""
    pointer = _read_json(out / _ALIASES / f"{name}@{alias}.json")
    folder = out / f"{name}-v{pointer.get('version')}"
    if pointer.get("uri") != where_is(settings) or not _is_sound(folder, settings):
        return None, ""
    return folder, str(pointer.get("asked"))


def _is_sound(folder: Path, settings: TrackingConfig) -> bool:
    """Whether ``folder`` was pulled from this registry and is still what was pulled."""
    note = _read_json(folder / _NOTE)
    return note.get("uri") == where_is(settings) and _fault(folder, note.get("files_sha256", "")) is None


def _fault(folder: Path, files_sha256: str) -> str | None:
    """What is wrong with a pulled folder, or None when all its files are those that were pushed."""
    try:
        if sha256_of_file(folder / FILES) != files_sha256:
            return f"{FILES} is another"
        sums = json.loads((folder / FILES).read_text())
        return next((name for name, expected in sums.items() if sha256_of_file(folder / name) != expected), None)
    except OSError as error:
        return str(error)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}
