"""Co-training of weight-shared variants: which variants a step trains, and with what loss.

One set of weights serves every variant, so a step on one of them moves all of them.
"""

from typing import Any, Literal

import torch
from torch.nn import functional

from datagen.degradations.random import generator
from infra.config import Config
from training.loop import Objective


class CotrainingConfig(Config):
    """How the variants share the steps.

    ``alternate``: one variant a step, drawn at random from seed and step number, the same on all ranks
    (DyNet, arXiv 2404.02154: "dynamic pre-training"; the probability is not published, uniform here).
    ``sandwich``: every variant on every batch, losses summed in one backward pass (the sandwich rule of
    universally slimmable networks, arXiv 1903.05134); costs the sum of the variants a step.
    ``separate``: only ``variants``[0], the twin that co-training is measured against.
    """

    mode: Literal["alternate", "sandwich", "separate"] = "alternate"
    variants: tuple[str, ...] = ("small", "large")


def variants_of_step(config: CotrainingConfig, seed: int, step: int) -> tuple[str, ...]:
    """The variants that ``step`` trains: a pure function, so ranks agree and a resume repeats it."""
    if config.mode == "separate":
        return config.variants[:1]
    if config.mode == "sandwich":
        return config.variants
    return (config.variants[int(generator(seed, 0, "variant", step).integers(len(config.variants)))],)


def cotraining_objective(config: CotrainingConfig, seed: int) -> Objective:
    """L1 between the restored and the clean patch, over the variants of the step (L1 as in DyNet and PromptIR).

    The metrics hold ``loss`` and one ``loss_VARIANT`` for each variant trained in the step.
    """

    def objective(engine: Any, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = {}
        for variant in variants_of_step(config, seed, step):
            restored = engine(batch["degraded"], variant=variant)
            losses[f"loss_{variant}"] = functional.l1_loss(restored.float(), batch["clean"])
        total = torch.stack(list(losses.values())).sum()
        return total, {"loss": total.detach() / len(losses)} | {k: v.detach() for k, v in losses.items()}

    return objective
