"""A model to hand on: ``model.safetensors`` with the weights and ``config.json`` that says what they are.

``config.json`` is written last and holds the sha256 of the weights, so that a copy that broke, a save that was
killed, and files of two exports put together are all refused when read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from infra.errors import Refusal
from infra.files import write_atomically
from training.models import ModelConfig, build_model

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1


class ExportError(Refusal, ValueError):
    """An export was refused. The message names the file, what was expected of it, and what to do."""


def save_export(model: nn.Module, config: ModelConfig, directory: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write ``model`` and what it is to ``directory``, replacing an export that is there.

    Args:
        model: the bare network (of a DeepSpeed engine or a compiled model, the module inside), on any device.
        config: the config that ``build_model`` made it from.
        directory: created if missing.
        metadata: JSON values to go along, such as the run id, the dataset id, the step.

    Raises:
        ExportError: the weights are not those that ``config`` describes, or ``metadata`` is not JSON. Nothing is
            written then.
    """
    directory = Path(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    faults = _mismatches(config, weights)
    if faults:
        raise ExportError(f"{directory}: nothing written; the model is not the {config.name} of its config: {faults}")
    data = save_safetensors(weights)
    description = {
        "format": FORMAT,
        "model": config.model_dump(mode="json"),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
        "metadata": dict(metadata),
    }
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{directory}: nothing written; metadata must be JSON: {error}") from None
    write_atomically(directory / WEIGHTS, data)
    write_atomically(directory / CONFIG, text.encode() + b"\n")


def load_export(directory: str | Path) -> tuple[nn.Module, ModelConfig, dict[str, Any]]:
    """Read an export back: the network on the CPU in evaluation mode, its config, and the metadata.

    The weights are bit for bit those saved; float types narrower than float32 are widened, which keeps their
    values. The global random state is left as it was.

    Raises:
        ExportError: a file is missing, broken or does not belong to the other, the config is not one this
            version knows, or the weights are not those that it describes.
    """
    directory = Path(directory)
    description = _read_description(directory / CONFIG)
    config = _read_config(directory / CONFIG, description)
    weights = _read_weights(directory, description)
    faults = _mismatches(config, weights)
    if faults:
        raise ExportError(f"{directory / WEIGHTS}: not the weights of the {config.name} in {CONFIG}: {faults}")
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    model.load_state_dict(weights)
    return model.eval(), config, description["metadata"]


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = "the save did not finish" if (path.parent / WEIGHTS).exists() else "not an export"
        raise ExportError(f"{path}: missing ({hint}); expected a folder that holds {CONFIG} and {WEIGHTS}") from None
    except ValueError as error:
        raise ExportError(f"{path}: not valid JSON ({error}); export or copy the model again") from None
    keys = {"format", "model", "weights", "metadata"}
    if not isinstance(description, dict) or not keys <= description.keys():
        raise ExportError(f"{path}: not the config of an export; expected the keys {', '.join(sorted(keys))}")
    if description["format"] != FORMAT:
        raise ExportError(f"{path}: export format {description['format']!r}; this version reads format {FORMAT}")
    return description


def _read_config(path: Path, description: dict[str, Any]) -> ModelConfig:
    try:
        return TypeAdapter[ModelConfig](ModelConfig).validate_json(json.dumps(description["model"]), strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(p) for p in fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise ExportError(f"{path}: 'model' is not a model this version knows: {faults}") from None


def _read_weights(directory: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ExportError(f"{path}: missing, though {CONFIG} is there; copy or export the model again") from None
    expected, found = description["weights"].get("sha256"), hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ExportError(
            f"{path}: sha256 is {found}, {CONFIG} expects {expected}: the file is damaged, or of another export, "
            "or a save was cut short; copy or export the model again"
        )
    return load_safetensors(data)


def _mismatches(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """How the names and shapes of ``weights`` differ from what ``config`` builds; empty if they do not."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    reshaped = [
        f"{name} {found[name]} for {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    ]
    groups = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": reshaped,
    }
    return "; ".join(
        f"{len(names)} {group} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for group, names in groups.items()
        if names
    )
