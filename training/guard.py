"""Steps that would ruin the weights are left out, counted, and shown; too many in a row end the run.

A step is bad when its loss or one of its gradients is not finite on any rank, or its loss is far above its own running
mean. The fused optimizers of torch look at a flag on the device and leave the step out, moments and all, so the host
never waits: it reads the flag of a step when the next one is under way.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from infra.files import write_atomically
from training.config import GuardConfig
from training.engine import gradients_of_step, torch_optimizer

_SETTLED = 20  # steps of a kind before its running mean is believed
_MEMORY = 0.98  # of the running mean, a step
_SHOWN = 3  # bad steps that are written down in a row; patches of each


class Diverged(RuntimeError):
    """The run was stopped after too many bad steps in a row. The message says where the batches are."""


@dataclass
class _Pending:
    step: int
    flag: Tensor
    batch: dict[str, Any]


class Guard:
    """Judges each step. Every rank has one and calls it at the same steps."""

    def __init__(self, config: GuardConfig, engine: Any, out: Path, device: torch.device) -> None:
        self._config, self._engine, self._out, self._device = config, engine, out, device
        self._means: dict[str, Tensor] = {}  # of each kind of step: running mean, number of steps
        self._kind = ""
        self._worst = torch.zeros(2, device=device)  # over ranks and parts of the step: not finite, highest loss
        self._judged = False
        self._bad = torch.zeros((), device=device)
        self._pending: _Pending | None = None
        self._in_a_row = 0
        self.skipped = 0
        torch_optimizer(engine).register_step_pre_hook(self._before_step)

    def look_at(self, kind: str, loss: Tensor) -> None:
        """Take in the loss of a part of the step. Losses are compared within a ``kind`` (the variants trained, say)."""
        loss = loss.detach().float()
        self._kind = kind
        self._worst = torch.maximum(self._worst, torch.stack([(~loss.isfinite()).float(), loss.nan_to_num(0, 0, 0)]))

    def after_step(self, step: int, batch: dict[str, Any]) -> None:
        """Call after the optimizer's step, with the batch it was made from.

        Raises:
            Diverged: too many bad steps in a row.
        """
        if getattr(self._engine.optimizer, "overflow", False):  # ZeRO saw it first, and never came to the hook
            self._bad = torch.ones_like(self._bad)
        before, self._pending = self._pending, _Pending(step, self._bad, batch)
        self._worst, self._judged = torch.zeros_like(self._worst), False
        if before is not None:
            self._settle(before)

    def finish(self) -> None:
        """Settle the last step too; before a checkpoint, so that its count holds all steps."""
        if self._pending is not None:
            self._settle(self._pending)
            self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs; call ``finish`` before."""
        return {"means": dict(self._means), "skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of an earlier run."""
        self._means = {kind: mean.to(self._device) for kind, mean in state["means"].items()}
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._judged:  # ZeRO calls once for each group of weights
            self._judge()
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def _judge(self) -> None:
        self._judged = True
        norm = torch.nn.utils.get_total_norm(gradients_of_step(self._engine))
        not_finite = torch.maximum(self._worst[0], (~norm.isfinite()).to(self._worst))
        self._worst = torch.stack([not_finite, self._worst[1]])
        if dist.get_world_size() > 1:  # the worst rank decides for all, so that all have the same means
            dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        bad, loss = self._worst[0] > 0, self._worst[1]
        mean, count = self._means.setdefault(self._kind, torch.zeros(2, device=self._device)).unbind()
        if self._config.spike:
            bad |= (count >= _SETTLED) & (loss > self._config.spike * mean)
        keep = (count / (count + 1)).clamp(max=_MEMORY)
        self._means[self._kind] = torch.stack([torch.where(bad, mean, keep * mean + (1 - keep) * loss), count + ~bad])
        self._bad = bad.float()

    def _settle(self, pending: _Pending) -> None:
        if not pending.flag.item():
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row <= _SHOWN:
            folder = self._out / "bad" / f"step-{pending.step:08d}-rank{dist.get_rank()}"
            _write_batch(folder, pending.batch)
            if dist.get_rank() == 0:
                print(f"guard: step {pending.step} was left out (loss or gradient); its batch: {folder}", flush=True)
        if self._in_a_row >= self._config.patience:
            raise Diverged(
                f"{self._in_a_row} steps in a row, up to step {pending.step}, were not finite or above "
                f"{self._config.spike} x the mean loss. Their batches, with what replays them (ird degrade --replay "
                f"META.json): {self._out / 'bad'}. Lower optimizer.lr, set optimizer.gradient_clipping, or raise "
                f"guard.spike; the run goes on from its last checkpoint"
            )


def _write_batch(folder: Path, batch: dict[str, Any]) -> None:
    """The first patches as clean and degraded PNG, and the metas of all."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(_SHOWN, len(batch["clean"]))):
        for name in ("clean", "degraded"):
            pixels = batch[name][number].detach().float().clamp(0, 1).mul(255).round().nan_to_num(0)
            picture = pixels.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
            write_atomically(folder / f"{number}-{name}.png", cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
    write_atomically(folder / "meta.json", json.dumps(batch["meta"], indent=2, default=str).encode())
