"""Files that other programs keep weights in: what they hold, and how they wrap it."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import Refusal


class CheckpointError(Refusal, ValueError):
    """A file could not be read, or holds no network of the kind. The message names file, reason and remedy."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint file, and remarks on how they lay in it.

    Read are ``.safetensors`` files and what ``torch.save`` wrote: a state dict, Lightning's ``state_dict`` with names
    that begin with ``net.``, BasicSR's ``params_ema`` (preferred) or ``params``; ``module.`` of DataParallel is taken
    off. No code in the file is run.

    Raises:
        CheckpointError: no such file, damaged, not a checkpoint, or it holds other objects than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint (.ckpt, .pt, .pth or .safetensors)")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    notes = []
    for container in ("state_dict", "params_ema", "params"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(container), Mapping):
            both = container == "params_ema" and "params" in loaded
            notes.append(f"weights in {container!r}" + ", the moving average; 'params' is left aside" * both)
            loaded = loaded[container]
            break
    tensors = _tensors_of(path, loaded)
    for prefix in ("_orig_mod.", "module.", "net.", "module.", "_orig_mod."):
        begin = [name for name in tensors if name.startswith(prefix)]
        bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if begin and len(bare) == len(tensors):
            notes.append(f"names begin with {prefix!r}, taken off")
            tensors = bare
    return tensors, notes


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file ({error}); copy or download it again"
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", str(error))
        if unsafe is None:
            raise CheckpointError(f"{path}: {_not_a_checkpoint(path)}") from None
        raise CheckpointError(
            f"{path}: holds objects beside weights ({unsafe[1]}), which run code when they are read. If you trust "
            "where the file comes from, write its weights alone to another file and import that one:\n"
            f"  python -c \"import torch; d = torch.load('{path}', map_location='cpu', weights_only=False); "
            f"torch.save({{'state_dict': d.get('state_dict', d)}}, '{path.stem}_weights.pt')\""
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError):
        raise CheckpointError(f"{path}: {_not_a_checkpoint(path)}") from None


def _not_a_checkpoint(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(64)
    if start.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint: a download link gave a page in place of the file; download it again"
    return f"cut short, damaged, or not a checkpoint of torch.save ({path.stat().st_size:,} bytes); download it again"


def _tensors_of(path: Path, loaded: Any) -> dict[str, Tensor]:
    where = f"{path}: expected a state dict, or one under 'state_dict', 'params_ema' or 'params'"
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{where}; found {type(loaded).__name__}")
    if not loaded:
        raise CheckpointError(f"{where}; it is empty")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{where}; found other values under {some(others)}")
    return {str(name): tensor for name, tensor in loaded.items()}


def some(names: list[str]) -> str:
    """The first three, and how many there are."""
    return ", ".join(names[:3]) + (f", … ({len(names)} in all)" if len(names) > 3 else "")
