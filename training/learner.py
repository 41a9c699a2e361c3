"""What a stage brings to the loop: an objective, and what the objective may use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.optimization import MovingAverage


@dataclass(frozen=True)
class Learner:
    """The network in training. Called as the network is, with gradients that ``backward`` of its engine takes."""

    engine: Any
    average: MovingAverage | None  # None where ``ema_decay`` is 0
    bf16: bool = False  # autocast

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.engine(*arguments, **options)

    @torch.no_grad()
    def teach(self, *arguments: Any) -> Tensor:
        """The network with the moving average as its weights; it gets no gradients. float32.

        Raises:
            RuntimeError: the stage has no moving average.
        """
        if self.average is None:
            raise RuntimeError("a teacher needs a moving average: set ema_decay above 0")
        with torch.autocast(arguments[0].device.type, torch.bfloat16, enabled=self.bf16):
            taught: Tensor = functional_call(self.module, self.average.weights, arguments)
        return taught.float()

    @property
    def module(self) -> nn.Module:
        """The bare network, for what DeepSpeed's own forward cannot do, such as second derivatives."""
        module: nn.Module = self.engine.module
        return module

    @property
    def rank(self) -> int:
        """This process among all."""
        return int(self.engine.global_rank)


Objective = Callable[[Learner, dict[str, Any], int], tuple[Tensor, dict[str, Tensor]]]
"""objective(learner, batch, step) -> (loss, metrics). The loss is this rank's mean over its patches; metrics are
detached scalars, with the same names on every rank at the same step."""
