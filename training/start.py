"""What a super-resolution stage starts from: an export of its own kind, or the weights of another scale."""

import os
from pathlib import Path
from typing import Any

import torch

from infra.config import ConfigError
from infra.launcher import PROGRESS
from training.config import StageConfig
from training.export import CONFIG, ExportError, load_export, save_export
from training.models import EDSRConfig, ModelConfig, build_model

_OTHER_KINDS = ("dynet", "promptir", "edsr", "mdsr", "mzsr")


def check_start(config: StageConfig) -> None:
    """Refuse an ``init_from`` whose weights mean something else to this model, before any process joins another.

    Raises:
        ConfigError: it names a kind of model instead of a folder, or holds another architecture, size or scale.
        ExportError: there is no sound export in it.
    """
    if not config.init_from:
        return
    if config.init_from in _OTHER_KINDS and not (Path(config.init_from) / CONFIG).exists():
        raise ConfigError(
            f"init_from={config.init_from}: expected an export folder of a {config.model.name}"
            + (f"; {_another_architecture(config.init_from, config.model)}" * (config.init_from != config.model.name))
        )
    _, found, _ = load_export(config.init_from)
    if found.name != config.model.name:
        raise ConfigError(f"init_from={config.init_from}: {_another_architecture(found.name, config.model)}")
    differing = _differences(found, config.model)
    if isinstance(found, EDSRConfig) and isinstance(config.model, EDSRConfig) and differing == ["scale"]:
        raise ConfigError(
            f"init_from={config.init_from}: is x{found.scale}, this stage trains x{config.model.scale}; "
            "write init_scale_from instead, which takes over all but the upsampler"
        )
    if differing:
        raise ConfigError(
            f"init_from={config.init_from}: its model differs from this stage's in {', '.join(differing)}"
        )


def start_from_other_scale(config: EDSRConfig, source: Path, seed: int, folder: Path) -> Path:
    """Make an export of ``config``'s scale from one of another: trunk, head and tail as they are, upsampler as it fits.

    EDSR section 3.2: x3 and x4 start from the converged x2. A stage of the upsampler of the same shape (the first of
    x4, from x2) is taken over, as in the authors' PyTorch code; the others are drawn from ``seed``.

    Returns:
        ``folder``. The same arguments make the same bytes, so that ranks and resumed runs may all call this; an export
        that is there from the same source and seed is kept, and ``source`` is not needed again.

    Raises:
        ConfigError: ``source`` is no EDSR, of the same scale, or differs in anything but the scale.
        ExportError: there is no sound export in it.
    """
    origin = {"init_scale_from": str(source), "seed": seed}
    if (folder / CONFIG).exists():
        try:
            _, made, facts = load_export(folder)
            if made == config and {name: facts.get(name) for name in origin} == origin:
                return folder
        except ExportError:
            pass  # cut short; made anew
    start, found, _ = load_export(source)
    if not isinstance(found, EDSRConfig):
        raise ConfigError(f"init_scale_from={source}: {_another_architecture(found.name, config)}")
    differing = _differences(found, config)
    if not differing:
        raise ConfigError(f"init_scale_from={source}: is x{found.scale} already; write init_from instead")
    if differing != ["scale"]:
        differing = [key for key in differing if key != "scale"]
        raise ConfigError(f"init_scale_from={source}: its model differs from this stage's in {', '.join(differing)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config)
    own, other = model.state_dict(), start.state_dict()
    taken = {name: weight for name, weight in other.items() if name in own and own[name].shape == weight.shape}
    fresh = sorted(own.keys() - taken.keys())
    assert all(name.startswith("upsampler.") for name in fresh)
    model.load_state_dict(own | taken)
    save_export(model, config, folder, origin | {"taken": len(taken), "fresh": fresh})
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{PROGRESS}edsr: x{config.scale} starts from the x{found.scale} in {source}: "
            f"{len(taken)} of {len(own)} tensors taken over, drawn anew: {', '.join(fresh)}",
            flush=True,
        )
    return folder


def _another_architecture(found: str, wanted: ModelConfig) -> str:
    return (
        f"{found} is another architecture than {wanted.name}; none of its weights has a place there, "
        f"so start from an export of {wanted.name}, or leave this out to start from random weights"
    )


def _differences(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Keys of two configs of one kind that differ, scale first."""
    a: dict[str, Any] = found.model_dump()
    b: dict[str, Any] = wanted.model_dump()
    return sorted(
        (key for key in a.keys() | b.keys() if a.get(key) != b.get(key)), key=lambda key: (key != "scale", key)
    )
