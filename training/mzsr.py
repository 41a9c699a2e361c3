"""MZSR: meta-transfer learning for zero-shot super-resolution (Soh et al., CVPR 2020), both training stages.

``phase: large_scale`` trains the small network on bicubic pairs; ``phase: meta_transfer`` starts from its
export and learns an initialisation from which a few gradient steps on one picture adapt it to the
picture's own blur. ``training.adaptation`` is the third stage, the adaptation itself.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from datagen.degradations.kernels import EVALUATION_KERNELS, mzsr_kernel
from datagen.degradations.random import generator
from datagen.degradations.resample import imresize
from datagen.degradations.sensor import quantise
from infra.config import Config
from training.adaptation import (
    PUBLISHED_INNER_LR,
    Assumption,
    Weights,
    adapt,
    enlarge,
    inner_step,
    network_input,
    published_rates,
    shrink_blurred,
)
from training.config import NotNegative, Positive, Rate, StageConfig
from training.corruption import shrink
from training.entry import run_from_command_line
from training.learner import Learner, Objective
from training.loop import run_stage
from training.start import check_start
from training.validation import Task, call


class MetaConfig(Config):
    """The inner loop of meta-transfer learning; defaults of the released code."""

    tasks: Positive = 5  # a task is one blur kernel; data.batch = tasks x 2 x patches_per_set
    patches_per_set: Positive = 8  # support patches, and as many query patches of other pictures
    inner_steps: Positive = 5
    inner_lr: Rate = PUBLISHED_INNER_LR  # plain SGD; the export says it, and the steps of adaptations are in proportion
    # The narrowest blur of a task, px^2. Less than the released 1.0 lets pictures that are nearly sharp be tasks too.
    least_variance: Annotated[float, Field(gt=0, le=2)] = 1.0
    # The query losses after each inner step are weighted equally at first; over these steps the weight
    # moves to the last one (MAML++, arXiv 1810.09502). In the released code it never moves.
    anneal_steps: Positive = 3333
    # Gradients through the inner steps. Without, those of the adapted weights stand for them (FOMAML): cheaper.
    second_order: bool = True
    # Derivative-order annealing (MAML++, section 3): first-order gradients up to this step, second-order ones after it.
    first_order_steps: NotNegative = 0


class MZSRStageConfig(StageConfig):
    """An MZSR training stage; ``data.patch`` is the HR side."""

    phase: Literal["large_scale", "meta_transfer"]
    scale: Literal[2, 3, 4] = 2
    # How the tasks of meta-transfer sub-sample, and where the network's input puts the pixels that are kept directly;
    # see ``training.adaptation.Assumption``. The released code: direct, or a model of its own for bicubic; "released".
    subsample: Literal["direct", "bicubic"] = "direct"
    alignment: Literal["aligned", "released"] = "aligned"
    meta: MetaConfig = MetaConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "MZSRStageConfig":
        if self.model.name != "mzsr":
            raise ValueError(f"model.name={self.model.name}: this stage trains name: mzsr")
        if self.data.patch % self.scale:
            raise ValueError(f"data.patch={self.data.patch} must be a multiple of scale={self.scale}")
        if self.phase == "meta_transfer":
            expected = self.meta.tasks * 2 * self.meta.patches_per_set
            if self.data.batch != expected:
                raise ValueError(
                    f"data.batch={self.data.batch} must be meta.tasks x 2 x meta.patches_per_set = {expected}"
                )
            if self.meta.first_order_steps and not self.meta.second_order:
                raise ValueError("meta.first_order_steps: needs meta.second_order, to which it goes over")
            if not self.init_from:
                raise ValueError("init_from: meta-transfer starts from the export folder of the large_scale phase")
        return self


def large_scale_objective(scale: int) -> Objective:
    """L1 on bicubic pairs: the input is the LR patch enlarged by bicubic to the HR size (section 4.1)."""

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = functional.l1_loss(learner(imresize(batch["degraded"], scale)).float(), batch["clean"])
        return loss, {"loss": loss.detach()}

    return objective


def query_weights(step: int, meta: MetaConfig) -> list[float]:
    """Weights of the query losses after inner steps 1…n at outer ``step``; they sum to 1.

    Linear from 1/n each to a floor of 0.03/n for all but the last, in ``anneal_steps`` steps.
    """
    count = meta.inner_steps
    early = max(1 - step / meta.anneal_steps, 0.03) / count
    return [early] * (count - 1) + [1 - early * (count - 1)]


def meta_objective(config: MZSRStageConfig) -> Objective:
    """Equation (9) of the paper: the loss on query patches of weights adapted on support patches.

    Each task draws one blur kernel. Gradients flow through the inner steps (second order), taken on
    the engine's module with explicit weights, because DeepSpeed's own forward cannot be differentiated
    twice.
    """
    meta, scale = config.meta, config.scale
    assume = Assumption(config.subsample, config.alignment)

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean = batch["clean"]
        rank, tasks = learner.rank, clean.shape[0] // (2 * meta.patches_per_set)
        weights = query_weights(step, meta)
        second_order = meta.second_order and step >= meta.first_order_steps
        losses, before, after = [], [], []
        for task, patches in enumerate(clean.split(2 * meta.patches_per_set)):
            draw = generator(config.seed, 0, f"task:{rank * tasks + task}", step)
            kernel = mzsr_kernel(draw, scale, meta.least_variance).to(clean)
            enlarged = network_input(shrink_blurred(patches, kernel, scale, config.subsample), scale, assume)
            (support_in, query_in), (support, query) = enlarged.chunk(2), patches.chunk(2)
            adapted: Weights = dict(learner.module.named_parameters())
            with torch.no_grad():
                before.append(functional.l1_loss(learner.module(query_in), query))
            task_loss = clean.new_zeros(())
            for weight in weights:
                adapted, _ = inner_step(
                    learner.module, adapted, support_in, support, meta.inner_lr, second_order=second_order
                )
                query_loss = functional.l1_loss(functional_call(learner.module, adapted, (query_in,)), query)
                task_loss = task_loss + weight * query_loss
            losses.append(task_loss)
            after.append(query_loss.detach())
        loss = torch.stack(losses).mean()
        metrics = {
            "loss": loss.detach(),
            "loss_before": torch.stack(before).mean(),
            "loss_adapted": torch.stack(after).mean(),
        }
        return loss, metrics

    return objective


def large_scale_task(scale: int) -> Task:
    """Undo bicubic shrinking; the network gets the LR picture enlarged."""

    def restore(module: nn.Module, weights: Mapping[str, Tensor] | None, low: Tensor, variant: str) -> Tensor:
        return call(module, weights, imresize(low, scale), variant)

    return Task(f"x{scale}", partial(shrink, scale), ("default",), restore)


def one_step_tasks(config: MZSRStageConfig) -> list[Task]:
    """What the paper's evaluation asks of the meta-trained weights: one step on each picture, its blur being known."""
    assume = Assumption(config.subsample, config.alignment)
    rates = published_rates(1, config.scale, config.subsample, config.meta.inner_lr)

    def task(name: str) -> Task:
        kernel = EVALUATION_KERNELS[name].float()

        def corrupt(clean: Tensor, **keys: Any) -> tuple[Tensor, list[dict[str, Any]]]:
            low = shrink_blurred(clean, kernel.to(clean), config.scale, config.subsample)
            return quantise(low), []

        def restore(module: nn.Module, weights: Mapping[str, Tensor] | None, low: Tensor, variant: str) -> Tensor:
            with torch.enable_grad():
                adapted = adapt(module, low, kernel.to(low), config.scale, rates, assume, weights)
            return enlarge(module, adapted.weights, low, config.scale, assume)

        return Task(name, corrupt, ("default",), restore)

    return [task(name) for name in (("g_0.2", "g_2.0", "g_ani") if config.subsample == "direct" else ("g_1.3",))]


def train_mzsr(config: MZSRStageConfig) -> int:
    """Run the phase; see ``training.loop.run_stage`` for what is written and returned."""
    check_start(config)
    facts: dict[str, Any] = {"scale": config.scale}
    if config.phase == "large_scale":
        objective, corrupt = large_scale_objective(config.scale), partial(shrink, config.scale)
        tasks = [large_scale_task(config.scale)]
        return run_stage("mzsr_large_scale", config, objective, corrupt, facts, tasks=tasks)
    facts |= {"subsample": config.subsample, "alignment": config.alignment, "inner_lr": config.meta.inner_lr}
    return run_stage("mzsr_meta", config, meta_objective(config), None, facts, tasks=one_step_tasks(config))


if __name__ == "__main__":
    run_from_command_line("training.mzsr", __doc__, MZSRStageConfig, train_mzsr)
