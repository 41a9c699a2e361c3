"""MDSR: one trunk for several scales (arXiv 1707.02921, section 3.3), one scale a step, the others left untouched."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import model_validator
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from datagen.degradations.random import generator
from datagen.degradations.resample import imresize
from training.config import NotNegative, StageConfig
from training.corruption import shrink
from training.edsr import without_context
from training.engine import torch_optimizer
from training.entry import run_from_command_line
from training.learner import Learner, Objective
from training.loop import run_stage
from training.models import MDSRConfig
from training.optimization import BRANCH
from training.start import check_start
from training.validation import Task


class MDSRStageConfig(StageConfig):
    """MDSR's stage: ``data.patch`` is the HR side at the largest scale (the paper: 48 LR pixels, so 192 at x4).

    The LR patch has the same side at every scale, as in the authors' PyTorch code: smaller scales use a part of the HR
    patch. ``context`` is as in ``EDSRStageConfig``.
    """

    context: NotNegative = 0

    @model_validator(mode="after")
    def _patch_fits_scales(self) -> "MDSRStageConfig":
        if not isinstance(self.model, MDSRConfig):
            raise ValueError(f"model.name={self.model.name}: this stage trains name: mdsr")
        largest = max(self.model.scales)
        if self.data.patch % largest:
            raise ValueError(f"data.patch={self.data.patch} must be a multiple of the largest scale {largest}")
        if self.data.patch // largest <= 2 * self.context:
            raise ValueError(f"data.patch={self.data.patch}: nothing is left of it without context={self.context}")
        return self


def scale_of_step(scales: tuple[int, ...], seed: int, step: int) -> int:
    """The scale that ``step`` trains, uniformly drawn: a pure function, so ranks agree and a resume repeats it."""
    return scales[int(generator(seed, 0, "scale", step).integers(len(scales)))]


def mdsr_objective(config: MDSRStageConfig) -> Objective:
    """L1 at the scale of the step, on LR patches made there and then, because a patch's scale is the step's.

    "Only the modules that correspond to the selected scale are enabled and updated" (section 4.2). DeepSpeed gives the
    idle ones gradients of zero, which would still decay their moments and move them by what is left of the momentum;
    see ``hold_idle_branches``.
    """
    assert isinstance(config.model, MDSRConfig)
    scales, side = config.model.scales, config.data.patch // max(config.model.scales)
    held: list[Any] = []
    active = ""

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        nonlocal active
        if not held:
            held.append(hold_idle_branches(torch_optimizer(learner.engine), lambda: active))
        scale = scale_of_step(scales, config.seed, step)
        active = f"x{scale}"
        corner = generator(config.seed, 0, "corner", step).integers(config.data.patch - scale * side + 1, size=2)
        top, left = (int(start) for start in corner)
        high = batch["clean"][..., top : top + scale * side, left : left + scale * side]
        low = imresize(high, 1 / scale, round_to_uint8=True).clamp(0, 1)
        low, high = without_context(low, high, scale, config.context)
        loss = functional.l1_loss(learner(low, variant=active).float(), high)
        return loss, {"loss": loss.detach(), f"loss_{active}": loss.detach()}

    return objective


def hold_idle_branches(optimizer: torch.optim.Optimizer, active: Callable[[], str]) -> RemovableHandle:
    """Before each step of ``optimizer`` take the gradients from all branches but ``active()``; returns the handle.

    A parameter without gradient is passed over by every optimizer of torch: no decay, no moments, no count of steps,
    exactly as if the step had not been. ``make_optimizer`` keeps each branch in a group of its own, which is what ZeRO
    (stages 1 and 2) flattens, so that the same holds for a partition of one.
    """

    def hold(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            if group.get(BRANCH, "") not in ("", active()):
                for parameter in group["params"]:
                    parameter.grad = None

    return optimizer.register_step_pre_hook(hold)


def tasks_of_scales(model: MDSRConfig) -> list[Task]:
    """Undo bicubic shrinking, each scale with its own branch."""
    return [Task(f"x{scale}", partial(shrink, scale), (f"x{scale}",)) for scale in model.scales]


def train_mdsr(config: MDSRStageConfig) -> int:
    """Run the stage; see ``training.loop.run_stage`` for what is written and returned."""
    check_start(config)
    assert isinstance(config.model, MDSRConfig)
    return run_stage("mdsr", config, mdsr_objective(config), None, tasks=tasks_of_scales(config.model))


if __name__ == "__main__":
    run_from_command_line("training.mdsr", __doc__, MDSRStageConfig, train_mdsr)
