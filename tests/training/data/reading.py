"""A training stage that writes down what each rank reads: ``deepspeed --module tests.training.data.reading …``."""

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from datagen.degradations import load_recipe
from training.corruption import degrade_by_recipe
from training.entry import run_from_command_line
from training.learner import Learner
from training.loop import run_stage
from training.pretrain import PretrainConfig


def train_and_tell(config: PretrainConfig) -> int:
    """Append a line per step to ``out/read-<pid>.jsonl``: step, rank, ranks, keys, sha256 of each degraded patch."""

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        patches = [hashlib.sha256(patch.numpy().tobytes()).hexdigest() for patch in batch["degraded"]]
        read = {"step": step, "rank": learner.rank, "ranks": dist.get_world_size()}
        read |= {"keys": [meta["key"] for meta in batch["meta"]], "patches": patches}
        with open(Path(config.out) / f"read-{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(read) + "\n")
        loss = functional.l1_loss(learner(batch["degraded"], variant="small"), batch["clean"])
        return loss, {"loss": loss.detach()}

    return run_stage("reading", config, objective, partial(degrade_by_recipe, load_recipe(config.recipe)))


if __name__ == "__main__":
    run_from_command_line("tests.training.data.reading", __doc__, PretrainConfig, train_and_tell)
