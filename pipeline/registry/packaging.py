"""An export as an MLflow pyfunc from code: weights and config, ``pipeline/pyfunc_model.py``, and what it imports.

Our modules are found by reading imports, so that the version loads where ird is not installed. Nothing is pickled.
"""

import ast
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.files import sha256_of_file, write_atomically
from pipeline.inference import export_sha256, offered_options
from training.export import CONFIG, WEIGHTS
from training.models import ModelConfig

FLOORS = ("infra", "datagen", "training", "pipeline")
EXPORT = Path("artifacts") / "export"  # where the export lies in a registered model
FILES = "files.json"  # in a registered model: the sha256 of every other file of it
_ADDED_BY_MLFLOW = "registered_model_meta"  # on the way down, so not part of what was pushed
_ROOT = Path(__file__).resolve().parents[2]


class UploadError(RuntimeError):
    """What the artifact store gives back is not what was sent."""


def upload_model(
    client: Any,
    model_id: str,
    run_id: str | None,
    export: Path,
    folder: Path,
    config: ModelConfig,
    metadata: dict[str, Any],
) -> str:
    """Put the MLflow model together in the empty ``folder``, upload it as the LoggedModel ``model_id``, read it back.

    Returns:
        The sha256 of its ``FILES``, which vouches for every other file.

    Raises:
        UploadError: the export came back otherwise than it went.
    """
    import mlflow

    _log(model_id, run_id, export, folder, config, metadata)
    (folder / "uploaded").mkdir()
    uploaded = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(folder / "uploaded")))
    if export_sha256(uploaded / EXPORT) != export_sha256(export):
        raise UploadError(f"the artifact store gives back another {EXPORT} than was uploaded")
    files = {path.relative_to(uploaded).as_posix(): path for path in uploaded.rglob("*") if path.is_file()}
    files.pop(_ADDED_BY_MLFLOW, None)
    sums = {name: sha256_of_file(path) for name, path in sorted(files.items())}
    write_atomically(folder / FILES, json.dumps(sums, indent=1).encode())
    client.log_model_artifact(model_id, str(folder / FILES))
    client.finalize_logged_model(model_id, "READY")
    return sha256_of_file(folder / FILES)


def _log(
    model_id: str, run_id: str | None, export: Path, folder: Path, config: ModelConfig, metadata: dict[str, Any]
) -> None:
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
    kinds: dict[type, str] = {str: "string", int: "long", float: "double", bool: "boolean"}
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
