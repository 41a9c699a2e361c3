"""Run under the ``deepspeed`` launcher by test_mdsr.py: MDSR's steps in engines of ZeRO stages 0 to 2 and plain torch.

Rank 0 writes, to the file that its argument names, the largest difference of any weight for each stage, with the idle
branches held and without; the reference never gives an idle branch a gradient.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.nn import functional

import training.mdsr
from datagen.degradations.resample import imresize
from training.config import OptimizerConfig
from training.distributed import join
from training.learner import Learner
from training.mdsr import MDSRStageConfig, mdsr_objective, scale_of_step
from training.models import MDSRConfig, build_model
from training.optimization import make_optimizer

STEPS, SIDE = 9, 12
CONFIG = MDSRStageConfig(
    out="", steps=STEPS, model=MDSRConfig(blocks=1, features=8), data={"dataset": "", "patch": 4 * SIDE, "batch": 4}
)
OPTIMIZER = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.1, gradient_clipping=0.5)


def fresh() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(CONFIG.model)


def patches(step: int) -> torch.Tensor:
    return torch.rand(4, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(step))


def plain() -> dict[str, torch.Tensor]:
    """The whole batch in one process; the corner of the patch is the objective's own, so it is looked up there."""
    model = fresh()
    optimizer = make_optimizer(model, OPTIMIZER)
    for step in range(STEPS):
        scale = scale_of_step(CONFIG.model.scales, CONFIG.seed, step)
        span = CONFIG.data.patch - scale * SIDE + 1
        top, left = training.mdsr.generator(CONFIG.seed, 0, "corner", step).integers(span, size=2)
        high = patches(step)[..., top : top + scale * SIDE, left : left + scale * SIDE]
        optimizer.zero_grad(set_to_none=True)
        low = imresize(high, 1 / scale, round_to_uint8=True).clamp(0, 1)
        functional.l1_loss(model(low, variant=f"x{scale}"), high).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clipping)
        optimizer.step()
    return model.state_dict()


def in_engine(stage: int, rank: int) -> dict[str, torch.Tensor]:
    model = fresh()
    settings = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": OPTIMIZER.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine: Any
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, OPTIMIZER), config=settings)
    objective = mdsr_objective(CONFIG)
    for step in range(STEPS):
        loss, _ = objective(Learner(engine, None), {"clean": patches(step)[2 * rank : 2 * rank + 2]}, step)
        engine.backward(loss)
        engine.step()
    return {name: weight.detach().clone() for name, weight in engine.module.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("result", type=Path)
    ranks = join()
    reference = plain()
    differences: dict[str, float] = {}

    def compare(name: str, weights: dict[str, torch.Tensor]) -> None:
        differences[name] = max(float((weights[n] - reference[n]).abs().max()) for n in reference)

    for stage in (0, 1, 2):
        compare(f"stage {stage}", in_engine(stage, ranks.rank))
    held = training.mdsr.hold_idle_branches
    training.mdsr.hold_idle_branches = lambda optimizer, active: None
    compare("idle branches not held", in_engine(0, ranks.rank))
    training.mdsr.hold_idle_branches = held
    if ranks.is_main:
        parser.parse_args().result.write_text(json.dumps(differences))


if __name__ == "__main__":
    main()
