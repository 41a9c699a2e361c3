"""A new version of a registered model, from an export, a run folder or an MLflow run."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.files import sha256_of_file
from infra.storage import open_store
from infra.tracking import TrackingConfig, connect, experiment_id
from pipeline.inference import load_model
from pipeline.registry.packaging import EXPORT, UploadError, upload_model
from pipeline.registry.promotion import set_alias
from pipeline.registry.server import RegistryError, explained, if_there, where_is
from pipeline.registry.versions import get_version
from training.export import CONFIG, ExportError
from training.models import variants_of

_RUN_ID = re.compile(r"[0-9a-f]{32}")
# What an export's metadata says of where it comes from, and the version repeats as tags.
_ORIGIN = ("stage", "code", "dataset_id", "run_id", "checkpoint", "checkpoint_sha256")


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
        tags: set on the version, beside sha256, files_sha256, variants, model and what is known of stage, code,
            dataset_id, run_id and checkpoint. ``figures_of`` makes them of an evaluation.

    Returns:
        The number of the version.

    Raises:
        ExportError: ``export`` is no sound export.
        RegistryError: no such run, a bad name, the artifact store returns other bytes, or no answer.
    """
    model = load_model(export, "cpu")
    origin = {**_checkpoint_behind(export, model.metadata.get("run_id")), **model.metadata}
    facts = {key: str(origin[key]) for key in _ORIGIN if origin.get(key)}
    facts |= {"sha256": model.sha256, "model": model.config.name, "variants": ",".join(variants_of(model.config))}
    client = connect(settings)
    with explained(settings):
        run_id = _known_run(client, run_id, model.metadata.get("run_id"), settings)
        if run_id:
            facts["run_id"] = run_id
            place = client.get_run(run_id).data.params.get("data.dataset")
            facts |= {"dataset": open_store(place).uri} if place else {}
        with tempfile.TemporaryDirectory(prefix="ird-push-") as folder:
            experiment = client.get_run(run_id).info.experiment_id if run_id else experiment_id(client, settings)
            # Left to itself, MLflow puts it into the default experiment, whose files lie in the working directory.
            model_id = client.create_logged_model(experiment, name="model", source_run_id=run_id).model_id
            try:
                facts["files_sha256"] = upload_model(
                    client, model_id, run_id, export, Path(folder), model.config, model.metadata
                )
            except UploadError as error:
                raise RegistryError(f"{where_is(settings)}: {error}; nothing registered") from None
        if if_there(lambda: client.get_registered_model(name)) is None:
            client.create_registered_model(name)
        every_tag = {**facts, **{key: str(value) for key, value in (tags or {}).items()}}
        created = client.create_model_version(name, f"models:/{model_id}", run_id, tags=every_tag, model_id=model_id)
    version = int(created.version)
    if alias:
        set_alias(name, version, alias, settings)
    return version


def find_export(source: str, settings: TrackingConfig) -> Path:
    """The export folder that ``source`` names.

    Args:
        source: an export folder, the folder of a training run, a pulled model, or the id of an MLflow run whose
            folder is on this machine.

    Raises:
        ExportError: there is no export.
        RegistryError: no run of that id, or the server does not answer.
    """
    folder = Path(source)
    if not folder.exists() and _RUN_ID.fullmatch(source):
        client = connect(settings)
        with explained(settings):
            run = if_there(lambda: client.get_run(source))
        if run is None:
            raise RegistryError(f"no run {source} at {where_is(settings)}; MLFLOW_TRACKING_URI chooses another server")
        out, host = run.data.params.get("out"), run.data.tags.get("ird.hosts", "another host")
        if out is None or not (Path(out) / "export" / CONFIG).is_file():
            raise ExportError(
                f"run {source} wrote to {out or 'no folder that it names'} on {host}, and no export lies there; "
                "push from that machine, or give the export folder"
            )
        folder = Path(out)
    candidates = [folder, folder / "export", folder / "out" / "export", folder / EXPORT]
    for candidate in candidates:
        if (candidate / CONFIG).is_file():
            return candidate
    raise ExportError(
        f"{source}: no export here or in its export/; expected an export folder, the folder of a run, or the id of "
        "an MLflow run"
    )


def figures_of(results: Path, model: str) -> dict[str, str]:
    """Tags ``psnr.TASK.VARIANT`` (dB) and ``ssim.TASK.VARIANT`` from the ``results.json`` of ``ird evaluate``.

    Args:
        model: name of the network; rows of other methods (degraded, bicubic, other models) are left out.

    Raises:
        RegistryError: the file is no such thing, or holds nothing of this model.
    """
    try:
        means = json.loads(results.read_bytes())["means"]
        figures = {
            f"{metric}.{row['task']}.{row['method'].removeprefix(model).lstrip('-') or 'default'}": f"{row[metric]:.4f}"
            for row in means
            if row["method"].partition("-")[0] == model
            for metric in ("psnr", "ssim")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"{results}: expected the results.json of `ird evaluate` ({type(error).__name__}: {error})"
        ) from None
    if not figures:
        there = ", ".join(sorted({row["method"] for row in means})) or "nothing"
        raise RegistryError(f"{results}: no figures of {model}; it measured {there}")
    return figures


def add_figures(name: str, version: int, results: Path, settings: TrackingConfig) -> None:
    """Tag a version that is there with the figures of an evaluation; see ``figures_of``.

    Raises:
        RegistryError: no such version, no such file, or the server does not answer.
    """
    found, _ = get_version(name, version, None, settings)
    figures = figures_of(results, found.tags.get("model", ""))
    client = connect(settings)
    with explained(settings):
        for key, value in figures.items():
            client.set_model_version_tag(name, str(version), key, value)


def _checkpoint_behind(export: Path, run_id: str | None) -> dict[str, str]:
    """The checkpoint that an export was made from, when it still lies beside it and is of the same run."""
    folder = export.parent / "checkpoints"
    try:
        latest = (folder / "latest").read_text().strip()
        manifest = json.loads((folder / latest / "manifest.json").read_text())
        state = folder / latest / "state.pt"
        if not run_id or manifest.get("run_id") != run_id or manifest["sha256"]["state.pt"] != sha256_of_file(state):
            return {}
        return {"checkpoint": latest, "checkpoint_sha256": manifest["sha256"]["state.pt"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _known_run(client: Any, run_id: str | None, noted: str | None, settings: TrackingConfig) -> str | None:
    candidate = run_id or noted
    if candidate and if_there(lambda: client.get_run(candidate)) is not None:
        return candidate
    if run_id:
        raise RegistryError(f"no run {run_id} at {where_is(settings)}; MLFLOW_TRACKING_URI chooses another server")
    return None
