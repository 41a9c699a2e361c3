"""EDSR: single-scale super-resolution (arXiv 1707.02921), trained on bicubic LR patches made on the fly."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from training.config import NotNegative, StageConfig
from training.corruption import shrink
from training.entry import run_from_command_line
from training.learner import Learner, Objective
from training.loop import run_stage
from training.models import EDSRConfig, scale_of
from training.start import check_start, start_from_other_scale
from training.validation import Task


class EDSRStageConfig(StageConfig):
    """EDSR's stage: ``data.patch`` is the HR side (the paper: 48 LR pixels, so 96 at x2), ``context`` included."""

    # Export folder of an EDSR of another scale. All but its upsampler is taken over (the paper: x3 and x4 from x2).
    init_scale_from: str = ""
    # LR pixels around a patch that are made and cut off again. The published LR files are shrunk as whole pictures, so
    # that a patch of them knows what lies beyond its edge; 3 make it so here, bit for bit. 0 mirrors the patch's edge.
    context: NotNegative = 0

    @model_validator(mode="after")
    def _patch_fits_scale(self) -> "EDSRStageConfig":
        if not isinstance(self.model, EDSRConfig):
            raise ValueError(f"model.name={self.model.name}: this stage trains name: edsr (training.mdsr trains mdsr)")
        if self.data.patch % self.model.scale:
            raise ValueError(f"data.patch={self.data.patch} must be a multiple of the scale {self.model.scale}")
        if self.data.patch // self.model.scale <= 2 * self.context:
            raise ValueError(f"data.patch={self.data.patch}: nothing is left of it without context={self.context}")
        if self.init_from and self.init_scale_from:
            raise ValueError("give either init_from (the same scale) or init_scale_from (another scale)")
        return self


def without_context(low: Tensor, high: Tensor, scale: int, context: int) -> tuple[Tensor, Tensor]:
    """LR [N,C,h,w] and HR [N,C,sh,sw] patches less ``context`` LR pixels on each side."""
    if not context:
        return low, high
    edge = scale * context
    return low[..., context:-context, context:-context], high[..., edge:-edge, edge:-edge]


def super_resolution_l1(scale: int, context: int = 0) -> Objective:
    """L1 between the enlarged LR patch and the HR patch (EDSR section 4.2: L1 instead of L2)."""

    def objective(learner: Learner, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        low, high = without_context(batch["degraded"], batch["clean"], scale, context)
        loss = functional.l1_loss(learner(low).float(), high)
        return loss, {"loss": loss.detach()}

    return objective


def train_edsr(config: EDSRStageConfig) -> int:
    """Run the stage; see ``training.loop.run_stage`` for what is written and returned."""
    check_start(config)
    assert isinstance(config.model, EDSRConfig)
    if config.init_scale_from:
        start = start_from_other_scale(
            config.model, Path(config.init_scale_from), config.seed, Path(config.out) / "start"
        )
        config = config.model_copy(update={"init_from": str(start)})
    scale = scale_of(config.model)
    corrupt = partial(shrink, scale)
    tasks = [Task(f"x{scale}", corrupt, ("default",))]
    return run_stage("edsr", config, super_resolution_l1(scale, config.context), corrupt, tasks=tasks)


if __name__ == "__main__":
    run_from_command_line("training.edsr", __doc__, EDSRStageConfig, train_edsr)
