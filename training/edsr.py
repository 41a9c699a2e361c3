"""EDSR: single-scale super-resolution (arXiv 1707.02921), trained on bicubic LR patches made on the fly."""

from functools import partial
from typing import Any

from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from training.config import StageConfig
from training.corruption import shrink
from training.entry import run_from_command_line
from training.learner import Learner
from training.loop import run_stage
from training.models import scale_of
from training.validation import Task


class EDSRStageConfig(StageConfig):
    """EDSR's stage: ``data.patch`` is the HR side (the paper: 48 LR pixels, so 96 at x2)."""

    @model_validator(mode="after")
    def _patch_fits_scale(self) -> "EDSRStageConfig":
        scale = scale_of(self.model)
        if scale == 1:
            raise ValueError("model: super-resolution needs a model that enlarges, such as name: edsr")
        if self.data.patch % scale:
            raise ValueError(f"data.patch={self.data.patch} must be a multiple of the scale {scale}")
        return self


def super_resolution_l1(learner: Learner, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 between the enlarged LR patch and the HR patch (EDSR section 4.2: L1 instead of L2)."""
    loss = functional.l1_loss(learner(batch["degraded"]).float(), batch["clean"])
    return loss, {"loss": loss.detach()}


def train_edsr(config: EDSRStageConfig) -> int:
    """Run the stage; see ``training.loop.run_stage`` for what is written and returned."""
    scale = scale_of(config.model)
    corrupt = partial(shrink, scale)
    return run_stage("edsr", config, super_resolution_l1, corrupt, tasks=[Task(f"x{scale}", corrupt, ("default",))])


if __name__ == "__main__":
    run_from_command_line("training.edsr", __doc__, EDSRStageConfig, train_edsr)
