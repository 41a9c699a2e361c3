"""What rank 0 knows, known to all ranks: nodes need not share a folder, only rank 0 reads and writes the run's own."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from infra.errors import Refusal

T = TypeVar("T")


def from_main(make: Callable[[], T]) -> T:
    """``make()`` of rank 0 on every rank: it is called there only. Every rank must come by here.

    Raises:
        Refusal: rank 0 was refused, on every rank alike, so that none waits for it.
    """
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = make()
        except Refusal as refusal:
            said[1] = refusal
    dist.broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    made: T = said[0]
    return made


def state_from_main(state: Any, device: torch.device) -> Any:
    """Nested dicts of tensors and plain values of rank 0, on every rank, tensors on the CPU; ``state`` of others is
    not looked at."""
    structure = from_main(lambda: _structure(state))
    return _received(structure, state, device)


def _structure(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return _Shape(tuple(state.shape), state.dtype)
    return {key: _structure(value) for key, value in state.items()} if isinstance(state, dict) else state


def _received(structure: Any, state: Any, device: torch.device) -> Any:
    if isinstance(structure, dict):
        return {key: _received(part, state[key] if state else None, device) for key, part in structure.items()}
    if not isinstance(structure, _Shape):
        return structure
    here = torch.empty(structure.shape, dtype=structure.dtype, device=device) if state is None else state.to(device)
    dist.broadcast(here, 0)
    return here.cpu()


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
