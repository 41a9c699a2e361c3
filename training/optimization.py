"""Optimizer, learning-rate schedule and the moving average of the weights: pure of any launcher."""

import math

import torch
from torch import nn

from training.config import OptimizerConfig, ScheduleConfig
from training.models.edsr import branch_of

BRANCH = "branch"  # key of a parameter group: which of the model's branches it is


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the trainable parameters of ``model``; branches that idle in turns are groups of their own.

    Fused: it can leave a step out without being asked on the host (``training.guard``).
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    branches: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            branches.setdefault(branch_of(name), []).append(parameter)
    groups = [{"params": group} | ({BRANCH: branch} if branch else {}) for branch, group in branches.items()]
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, steps: int, base: float, schedule: ScheduleConfig) -> float:
    """Learning rate of ``step`` (from 0) in a run of ``steps``: a pure function, so a resume needs no scheduler."""
    if step < schedule.warmup:
        return base * (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return base
    if schedule.kind == "halve":
        return max(base * 0.5 ** (step // schedule.halve_every), schedule.floor)
    progress = (step - schedule.warmup) / max(steps - schedule.warmup, 1)
    return schedule.floor + (base - schedule.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set one learning rate on every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class MovingAverage:
    """Exponential moving average of a model's weights, kept beside them in float32.

    The decay is warmed up as min(decay, (1 + n) / (10 + n)) after n updates (Polyak averaging with the
    warm-up of TensorFlow's ExponentialMovingAverage), so that short runs do not average in their start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the present weights; call once after each optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        named = dict(model.named_parameters())
        current = [named[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """Everything that a resume needs."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take up the state of an earlier run; the names must be those of this model."""
        weights = state["weights"]
        assert isinstance(weights, dict) and isinstance(state["updates"], int)
        self.updates = state["updates"]
        for name, value in self.weights.items():
            value.copy_(weights[name])
