"""Co-training of weight-shared variants: which variants a step trains, and with what loss.

One set of weights serves every variant, so a step on one of them moves all of them.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from datagen.degradations.random import generator
from infra.config import Config
from training.learner import Learner, Objective
from training.models import DyNetConfig, ModelConfig
from training.models.inputs import Variant

Share = Annotated[float, Field(ge=0, le=1)]


class CotrainingConfig(Config):
    """How the variants share the steps.

    ``alternate``: one variant a step, drawn at random from seed and step number, the same on all ranks
    (DyNet, arXiv 2404.02154: "dynamic pre-training"; the probability is not published, uniform here).
    ``sandwich``: every variant on every batch, losses summed in one backward pass (the sandwich rule of
    universally slimmable networks, arXiv 1903.05134); costs the sum of the variants a step.
    ``distill``: sandwich, and the last variant, as its moving average has it, teaches the others (in-place distillation
    of the same paper). Their target is a mix, because for a squared or absolute error the teacher is worse than the
    truth: its part grows from 0 at ``teacher_from`` to ``teacher_share`` at the end of the run.
    ``random_depth``: one depth a step, drawn likewise: the first variant, the last one, or, in every other step, a
    vector with each level anywhere between the two.
    ``separate``: only ``variants``[0], the twin that co-training is measured against.

    ``alternate`` and ``random_depth`` were best at equal compute, in short runs (docs/results.md).
    """

    mode: Literal["alternate", "sandwich", "distill", "random_depth", "separate"] = "alternate"
    variants: tuple[str, ...] = Field(("small", "large"), min_length=1)
    teacher_from: Share = 0.25  # share of the steps
    teacher_share: Share = 0.5
    # A second moment of Adam, and a first, for each variant: they do not blend gradients of networks of unlike depth.
    # For modes that train one named variant a step; twice the optimizer's memory.
    separate_moments: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The variants that come out of it."""
        return self.variants[:1] if self.mode == "separate" else self.variants

    @model_validator(mode="after")
    def _moments_of_one_variant(self) -> "CotrainingConfig":
        if self.separate_moments and self.mode != "alternate":
            raise ValueError(f"separate_moments: for mode alternate, which trains one variant a step, not {self.mode}")
        return self


def variants_of_step(config: CotrainingConfig, model: ModelConfig, seed: int, step: int) -> tuple[Variant, ...]:
    """The variants that ``step`` trains: a pure function, so ranks agree and a resume repeats it."""
    if config.mode == "separate":
        return config.variants[:1]
    if config.mode in ("sandwich", "distill"):
        return config.variants
    rng = generator(seed, 0, "variant", step)
    if config.mode == "random_depth" and rng.random() < 0.5:
        assert isinstance(model, DyNetConfig)
        shallow, deep = (model.variants[config.variants[end]] for end in (0, -1))
        return (tuple(int(rng.integers(min(a, b), max(a, b) + 1)) for a, b in zip(shallow, deep)),)
    return (config.variants[int(rng.integers(len(config.variants)))],)


def teacher_share(config: CotrainingConfig, progress: float) -> float:
    """Part of the teacher in the target at ``progress`` (0 to 1) through the run."""
    if config.mode != "distill" or progress <= config.teacher_from:
        return 0.0
    return config.teacher_share * (progress - config.teacher_from) / (1 - config.teacher_from)


def cotraining_objective(config: CotrainingConfig, model: ModelConfig, seed: int, steps: int) -> Objective:
    """L1 between the restored and the clean patch, over the variants of the step (L1 as in DyNet and PromptIR).

    The metrics hold ``loss``, the mean over the variants of the step, and ``loss_VARIANT`` of each; a drawn depth
    vector counts as ``loss_depth``.
    """

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        variants = variants_of_step(config, model, seed, step)
        degraded, clean = batch["degraded"], batch["clean"]
        targets = [clean] * len(variants)
        share = teacher_share(config, step / steps)
        if share:
            mixed = torch.lerp(clean, learner.teach(degraded, config.variants[-1]), share)
            targets[:-1] = [mixed] * (len(variants) - 1)
        if len(variants) == 1:
            restored = [learner(degraded, variant=variants[0])]
        else:
            restored = learner(degraded, variants=variants)
        losses = [functional.l1_loss(image.float(), target) for image, target in zip(restored, targets)]
        total = torch.stack(losses).sum()
        names = [variant if isinstance(variant, str) else "depth" for variant in variants]
        metrics = {f"loss_{name}": loss.detach() for name, loss in zip(names, losses)}
        return total, {"loss": total.detach() / len(losses)} | metrics

    return objective
