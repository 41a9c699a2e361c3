"""From a loader's batch to what a training step takes: moved, converted and, where asked, degraded on the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.corruption import Corruption
from training.data.loader import degraded_batch

Batch = dict[str, Any]


def handover(
    device: torch.device, *, corrupt: Corruption | None, seed: int, channels_last: bool = False
) -> Callable[[Batch], Batch]:
    """A function that takes a batch of ``make_loader`` to ``device``.

    It returns "clean" float32 [B,3,P,P] and "degraded" float32 [B,3,p,p] in [0, 1], contiguous or ``channels_last``,
    "meta" and "lost". Pictures cross as the bytes they are. On CUDA everything runs on a stream of its own, so that
    copies (from pinned memory) and degradations overlap the step before. ``corrupt`` degrades what the loader left
    clean; without it that is "degraded" too, for stages that degrade in their own step.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(batch: Batch) -> Batch:
        batch = {name: _moved(value, device) for name, value in batch.items()}
        if "degraded" not in batch:
            if corrupt is None:
                clean = _as_float(batch["clean"], layout)
                return {"clean": clean, "degraded": clean, "meta": _keys(batch), "lost": batch["lost"]}
            batch = degraded_batch(batch, corrupt, seed)
        return batch | {name: _as_float(batch[name], layout) for name in ("clean", "degraded")}

    def take_beside(batch: Batch) -> Batch:
        assert stream is not None
        with torch.cuda.stream(stream):
            taken = take(batch)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for name in ("clean", "degraded"):
            taken[name].record_stream(current)
        return taken

    return take if stream is None else take_beside


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list) and any(isinstance(one, Tensor) for one in value):
        return [_moved(one, device) for one in value]
    return value


def _keys(batch: Batch) -> list[dict[str, Any]]:
    return [{"key": key} for key in batch["key"]]


def _as_float(images: Tensor, layout: torch.memory_format) -> Tensor:
    images = images if images.is_floating_point() else images.float().div_(255)
    return images.contiguous(memory_format=layout)
