"""Models in the MLflow registry: one version holds all variants, and loads without ird being installed.

A version is an MLflow pyfunc from code: the export (weights and config), ``pipeline/pyfunc_model.py`` and the modules
that it imports, found by reading its imports. Nothing is pickled.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.errors import Refusal, without_password
from infra.files import write_atomically
from infra.tracking import TrackingConfig, connect, experiment_id, tracking_uri
from pipeline.inference import export_sha256, load_model, offered_options
from training.export import CONFIG, WEIGHTS, ExportError
from training.models import ModelConfig, variants_of

FLOORS = ("infra", "datagen", "training", "pipeline")
EXPORT = Path("artifacts") / "export"  # where the export lies in a pulled model
_ROOT = Path(__file__).resolve().parent.parent
_NOTE = "pulled.json"


class RegistryError(Refusal, RuntimeError):
    """The registry has no such thing, refused it, or does not answer. The message says what is there and what to do."""


@dataclass(frozen=True)
class ModelVersion:
    """One row of ``list_versions``."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created: datetime
    tags: Mapping[str, str]


def push(
    export: Path,
    name: str,
    *,
    run_id: str | None = None,
    alias: str | None = None,
    tags: Mapping[str, Any] | None = None,
    settings: TrackingConfig,
) -> int:
    """Register the model of an export folder as a new version of ``name``.

    Args:
        run_id: the run that made it; None takes the one in the export's metadata, if the server knows it.
        alias: set to this version after everything else is in place.
        tags: set on the version, beside sha256, variants, model and what the metadata holds of stage, code,
            dataset_id and run_id.

    Returns:
        The number of the version.

    Raises:
        ExportError: ``export`` is no sound export.
        RegistryError: no such run, a bad name, or the server does not answer.
    """
    model = load_model(export, "cpu")
    facts = {
        key: str(model.metadata[key]) for key in ("stage", "code", "dataset_id", "run_id") if model.metadata.get(key)
    }
    facts |= {"sha256": model.sha256, "model": model.config.name, "variants": ",".join(variants_of(model.config))}
    client = connect(settings)
    with _explained(settings):
        run_id = _known_run(client, run_id, model.metadata.get("run_id"), settings)
        if run_id:
            facts["run_id"] = run_id
        with tempfile.TemporaryDirectory(prefix="ird-push-") as folder:
            experiment = client.get_run(run_id).info.experiment_id if run_id else experiment_id(client, settings)
            # Left to itself, MLflow puts it into the default experiment, whose files lie in the working directory.
            model_id = client.create_logged_model(experiment, name="model", source_run_id=run_id).model_id
            _log_model(model_id, run_id, export, Path(folder), model.config, model.metadata)
        if _if_there(lambda: client.get_registered_model(name)) is None:
            client.create_registered_model(name)
        every_tag = {**facts, **{key: str(value) for key, value in (tags or {}).items()}}
        created = client.create_model_version(name, f"models:/{model_id}", run_id, tags=every_tag, model_id=model_id)
        if alias:
            client.set_registered_model_alias(name, alias, created.version)
    return int(created.version)


def pull(model_uri: str, out: Path, settings: TrackingConfig) -> Path:
    """Download a version to ``out``/NAME-vVERSION, unless it lies there already, and check its sha256.

    Args:
        model_uri: ``models:/NAME@ALIAS``, or ``models:/NAME/VERSION``, which needs no server once it has been pulled.

    Returns:
        The folder: an MLflow model, with the export in its ``EXPORT``.

    Raises:
        RegistryError: not such a URI, no such model, alias or version, damage, or the server does not answer.
    """
    name, version, alias = _parse(model_uri)
    if version is not None:
        folder = out / f"{name}-v{version}"
        note = _read_note(folder)
        if note.get("uri") == _where(settings) and _fault(folder, note.get("sha256", "")) is None:
            return folder
    client = connect(settings)
    with _explained(settings):
        version = _find(client, name, version, alias, settings)
        tags = client.get_model_version(name, str(version)).tags
    if "sha256" not in tags:
        raise RegistryError(f"models:/{name}/{version} was not pushed by `ird registry push`: it has no tag sha256")
    folder = out / f"{name}-v{version}"
    if _fault(folder, tags["sha256"]) is None:
        return folder
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=out))
    try:
        import mlflow

        with _explained(settings):
            mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=str(temporary))
        fault = _fault(temporary, tags["sha256"])
        if fault is not None:
            raise RegistryError(f"models:/{name}/{version} from {_where(settings)}: {fault}; push the model again")
        note = {"name": name, "version": version, "uri": _where(settings), "sha256": tags["sha256"], "tags": tags}
        write_atomically(temporary / _NOTE, json.dumps(note, indent=2).encode())
        temporary.chmod(0o755)  # mkdtemp makes it private
        if _fault(folder, tags["sha256"]) is not None:  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def list_versions(settings: TrackingConfig, name: str | None = None) -> list[ModelVersion]:
    """Versions of ``name``, or of all models, by name and then the newest first.

    Raises:
        RegistryError: no model of that name, or the server does not answer.
    """
    client = connect(settings)
    rows = []
    with _explained(settings):
        for model in [_get_model(client, name, settings)] if name is not None else _all_models(client):
            for found in client.search_model_versions(f"name='{model.name}'"):
                aliases = tuple(sorted(a for a, v in model.aliases.items() if int(v) == int(found.version)))
                created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
                rows.append(
                    ModelVersion(model.name, int(found.version), aliases, found.run_id or "", created, found.tags)
                )
    return sorted(rows, key=lambda row: (row.name, -row.version))


def set_alias(name: str, version: int, alias: str, settings: TrackingConfig) -> None:
    """Let ``alias`` point to ``version``, and to no other version of ``name`` any more.

    Raises:
        RegistryError: no such model or version, an alias that MLflow does not allow, or the server does not answer.
    """
    client = connect(settings)
    with _explained(settings):
        client.set_registered_model_alias(name, alias, str(_find(client, name, version, None, settings)))


def _log_model(
    model_id: str, run_id: str | None, export: Path, folder: Path, config: ModelConfig, metadata: dict[str, Any]
) -> None:
    """Put the MLflow model together in the empty ``folder``, and upload it as the LoggedModel ``model_id``."""
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    (folder / "export").mkdir()
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(export / file, folder / "export" / file)
    entry = _ROOT / "pipeline" / "pyfunc_model.py"
    modules, libraries = _code_behind(entry)
    for module in modules:
        copy = folder / "code" / module.relative_to(_ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, copy)
    pictures = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    kinds: dict[type, str] = {str: "string", int: "long", float: "double"}
    defaults = offered_options(config, metadata)
    params = ParamSchema([ParamSpec(key, kinds[type(value)], value) for key, value in defaults.items()])
    ramp = np.arange(64, dtype=np.uint8) * 4
    example = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)[None]
    search_path = sys.path
    try:
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            model_id=model_id,
            run_id=run_id,
            python_model=str(entry),
            artifacts={"export": str(folder / "export")},
            code_paths=[str(path) for path in sorted((folder / "code").iterdir())],
            signature=ModelSignature(inputs=pictures, outputs=pictures, params=params),
            input_example=(example, {"variant": defaults["variant"]}),
            pip_requirements=_pins(libraries),
        )
    finally:
        sys.path = search_path  # MLflow tries the model out, and leaves its temporary folder on the path


def _code_behind(entry: Path) -> tuple[list[Path], set[str]]:
    """Our files that ``entry`` needs, found by following imports, and the names of the libraries that they import."""
    ours: set[Path] = set()
    libraries: set[str] = set()
    waiting = [entry]
    while waiting:
        for name in _imported_names(waiting.pop()):
            top, *_ = parts = name.split(".")
            if top not in FLOORS:
                libraries.add(top)
                continue
            for depth in range(1, len(parts) + 1):
                module = _ROOT.joinpath(*parts[:depth])
                for file in (module.with_suffix(".py"), module / "__init__.py"):
                    if file.is_file() and file not in ours:
                        ours.add(file)
                        waiting.append(file)
    return sorted(ours), libraries - sys.stdlib_module_names


def _imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported may be a module of its own.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _pins(libraries: set[str]) -> list[str]:
    """Exact requirements for import names, as installed here. A local version label (``+cpu``) is on no index."""
    owners = importlib.metadata.packages_distributions()
    pins = set()
    for library in libraries:
        distribution = library if library in owners[library] else owners[library][0]
        pins.add(f"{distribution}=={importlib.metadata.version(distribution).partition('+')[0]}")
    return sorted(pins)


def _known_run(client: Any, run_id: str | None, noted: str | None, settings: TrackingConfig) -> str | None:
    candidate = run_id or noted
    if candidate and _if_there(lambda: client.get_run(candidate)) is not None:
        return candidate
    if run_id:
        raise RegistryError(f"no run {run_id} at {_where(settings)}; MLFLOW_TRACKING_URI chooses another server")
    return None


def _where(settings: TrackingConfig) -> str:
    """The tracking URI without the password that it may hold."""
    return without_password(tracking_uri(settings))


def _parse(model_uri: str) -> tuple[str, int | None, str | None]:
    """Name, version and alias of a model URI; one of the latter two is None."""
    match = re.fullmatch(r"models:/([^/@:]+)(?:/(\d+)|@([^/@]+))", model_uri)
    if match is None:
        raise RegistryError(f"{model_uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, version, alias = match.groups()
    return name, int(version) if version else None, alias


def _find(client: Any, name: str, version: int | None, alias: str | None, settings: TrackingConfig) -> int:
    """The version that is meant, once it is known to exist."""
    model = _get_model(client, name, settings)
    if alias is not None:
        if alias not in model.aliases:
            there = ", ".join(f"{a} (version {v})" for a, v in sorted(model.aliases.items())) or "none"
            raise RegistryError(f"model {name} has no alias {alias!r} at {_where(settings)}; its aliases: {there}")
        return int(model.aliases[alias])
    versions = sorted(int(found.version) for found in client.search_model_versions(f"name='{name}'"))
    if version is None or version not in versions:
        there = ", ".join(map(str, versions)) or "none"
        raise RegistryError(f"model {name} has no version {version} at {_where(settings)}; its versions: {there}")
    return version


def _get_model(client: Any, name: str, settings: TrackingConfig) -> Any:
    model = _if_there(lambda: client.get_registered_model(name))
    if model is None:
        there = ", ".join(sorted(model.name for model in _all_models(client))) or "none"
        raise RegistryError(
            f"no model {name!r} at {_where(settings)}; models there: {there}. "
            "MLFLOW_TRACKING_URI chooses another server or database"
        )
    return model


def _if_there(ask: Callable[[], Any]) -> Any | None:
    """What MLflow answers, or None when it says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _all_models(client: Any) -> list[Any]:
    page = client.search_registered_models()
    models = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        models += page
    return models


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _NOTE).read_text()))
    except (OSError, ValueError):
        return {}


def _fault(folder: Path, sha256: str) -> str | None:
    """What is wrong with a pulled folder, or None when its export is the one that was pushed."""
    try:
        found = export_sha256(folder / EXPORT)
    except ExportError as error:
        return str(error)
    return None if found == sha256 else f"the export's sha256 is {found[:12]}…, the registry says {sha256[:12]}…"


@contextmanager
def _explained(settings: TrackingConfig) -> Iterator[None]:
    """Turn MLflow's exceptions into one that names the server and fits on a line or two."""
    from mlflow.exceptions import MlflowException

    # Its bars count small files; a caller that pulls shows its own progress.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    except MlflowException as error:
        where, message = _where(settings), without_password(str(error))
        if "failed with exception" in message:
            raise RegistryError(
                f"MLflow at {where} does not answer; start the server, or set MLFLOW_TRACKING_URI: {message[:200]}"
            ) from None
        raise RegistryError(f"MLflow at {where} refused: {message[:500]}") from None
