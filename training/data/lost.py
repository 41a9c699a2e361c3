"""The account of samples that could not be read and that others stood in for (``data.on_damage: skip``)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class LostSamples:
    """Counts the lost samples of all ranks, exactly, over any chain of restarts.

    Each rank appends a line per loss to its own ``lost-rank<N>.jsonl``: stream position, key, shard and reason. Steps
    that a restart repeats are written again there, but not counted again.
    """

    def __init__(self, out: Path, rank: int, before: int) -> None:
        """``before``: the total that the checkpoint holds from which the run goes on."""
        self._path, self._before, self._here = out / f"lost-rank{rank}.jsonl", before, 0

    def add(self, lost: Sequence[dict[str, Any]]) -> None:
        """Take in what one batch of this rank has lost."""
        if lost:
            self._here += len(lost)
            self._path.parent.mkdir(parents=True, exist_ok=True)  # on a node that does not share ``out``
            with open(self._path, "a") as file:
                file.writelines(json.dumps(one) + "\n" for one in lost)

    def total(self, device: torch.device) -> int:
        """Losses of all ranks so far. Every rank must call it at the same step."""
        count = torch.tensor(self._here, device=device)
        dist.all_reduce(count)
        return self._before + int(count.item())
