"""Several runs, one after the other, in the ranks of one launch: starting ranks costs more than these runs.

    deepspeed --num_accelerators 2 --module tests.training.scenarios RUNS.json

RUNS.json is a list of {"config": FILE, "settings": ["key=value", …], "poison": [step, rank] or null}. A poisoned run
finds a loss that is not a number at that step on that rank. Each rank writes what became of its runs beside RUNS.json.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datagen.degradations import load_recipe
from infra.config import load_config
from training.corruption import degrade_by_recipe
from training.cotraining import cotraining_objective
from training.guard import Diverged
from training.learner import Learner
from training.loop import run_stage
from training.pretrain import PretrainConfig, pretrain


def poisoned(config: PretrainConfig, step_and_rank: list[int]) -> int:
    inner = cotraining_objective(config.cotraining, config.model, config.seed, config.steps)

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = inner(learner, batch, step)
        return loss * (float("nan") if [step, learner.rank] == step_and_rank else 1.0), metrics

    return run_stage("pretrain", config, objective, partial(degrade_by_recipe, load_recipe(config.recipe)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args()
    outcomes: list[Any] = []
    for run in json.loads(arguments.runs.read_text()):
        config = load_config(PretrainConfig, run["config"], run["settings"])
        try:
            outcomes.append(poisoned(config, run["poison"]) if run.get("poison") else pretrain(config))
        except Diverged as diverged:
            outcomes.append(str(diverged))
    arguments.runs.with_name(f"outcomes-{arguments.local_rank}.json").write_text(json.dumps(outcomes))
    sys.exit(0)


if __name__ == "__main__":
    main()
