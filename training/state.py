"""Everything that a resume needs besides the number of the step: gathered from all ranks, and taken up by them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from training.engine import load_optimizer_state, load_weights, optimizer_state, torch_optimizer
from training.guard import Guard
from training.meter import Spent
from training.optimization import MovingAverage
from training.validation import Best


class TrainingState:
    """Weights, moments, moving average, and the accounts of guard, meter and validation.

    Steps draw from no generator whose state would have to be kept: see ``training.loop.run_stage``.
    """

    def __init__(self, engine: Any, average: MovingAverage | None, guard: Guard, moments: Sequence[str]) -> None:
        """``moments``: names of the sets of Adam's moments, of which each step uses one."""
        self.engine, self.average, self.guard = engine, average, guard
        self.spent, self.best = Spent(), Best({})
        first = torch_optimizer(engine).state
        self._moments: dict[str, Any] = {name: defaultdict(dict) for name in moments}
        self._moments[moments[0]] = first

    def use_moments(self, name: str) -> None:
        """Let the optimizer go on with one set of moments."""
        torch_optimizer(self.engine).state = self._moments[name]

    def capture(self) -> dict[str, Any]:
        """Nested dicts of tensors and plain values. A collective; the tensors are those in use, to be copied."""
        self.guard.finish()
        optimizer = {}
        for name in self._moments:
            self.use_moments(name)
            optimizer[name] = optimizer_state(self.engine)
        return {
            "model": self.engine.module.state_dict(),
            "optimizer": optimizer,
            "average": self.average.state_dict() if self.average is not None else {},
            "guard": self.guard.state_dict(),
            "spent": asdict(self.spent),
            "best": self.best.reached,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what ``capture`` gave, at any world size and ZeRO stage."""
        load_weights(self.engine, state["model"])
        for name in self._moments:
            self.use_moments(name)
            load_optimizer_state(self.engine, state["optimizer"][name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.guard.load_state_dict(state["guard"])
        self.spent, self.best = Spent(**state["spent"]), Best(state["best"])
