"""ZSSR, the peer that MZSR is measured by: the same network, trained from scratch on one picture (CVPR 2018).

Assaf Shocher, Nadav Cohen, Michal Irani, "Zero-Shot Super-Resolution using Deep Internal Learning". Written from the
paper; where it leaves something open, from what is known of the released settings for a given blur: Adam at 1e-3,
crops of 128 pixels, the rate divided by ten whenever progress is lost in noise, at most 3,000 steps, two
back-projections. The network has biases, as MZSR's has; ZSSR's own has none.
"""

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from infra.config import Config
from training.adaptation import Assumption, back_project, enlarge_as_ensemble, network_input, shrink_blurred
from training.config import Positive, Rate
from training.ensemble import orient, symmetries
from training.models import MZSRConfig, build_model

_LEAST_RATE = 9e-6
_LOOK_EVERY, _LOOK_BACK = 60, 256  # steps


class ZSSROptions(Config):
    """The full length by default, which is minutes on a CPU."""

    steps: Positive = 3000
    crop: Positive = 128
    lr: Rate = 1e-3
    back_projections: Annotated[int, Field(ge=0)] = 2
    bf16: bool = False  # autocast, for CPUs and GPUs that are faster so; the result is made in float32
    seed: int = 0


class Trained(NamedTuple):
    """The enlarged picture [1,3,sH,sW] in [0, 1], and what it took."""

    picture: Tensor
    steps: int
    seconds: float
    losses: list[float]


def zssr(
    picture: Tensor,
    kernel: Tensor,
    scale: int,
    options: ZSSROptions,
    assume: Assumption | None = None,
    network: MZSRConfig | None = None,
    tell: Callable[[str], Any] | None = None,
) -> Trained:
    """Train on ``picture`` [1,3,H,W] in [0, 1], made smaller by ``kernel`` [k,k], and enlarge it.

    Crops are turned and mirrored as far as the blur looks the same then, and so is the picture for the mean over them.
    A function of its arguments: crops are drawn from the seed. ``tell`` hears every 60 steps how far it is.
    """
    started = time.perf_counter()
    assume = assume or Assumption()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = build_model(network or MZSRConfig()).to(picture.device)
    draw = np.random.default_rng(options.seed)
    height, width = (side - side % scale for side in picture.shape[-2:])
    father = picture[..., :height, :width]
    son = network_input(shrink_blurred(father, kernel, scale, assume.subsample), scale, assume)
    turns = symmetries(kernel)
    tall, wide = min(options.crop, height), min(options.crop, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    losses: list[float] = []
    since = 0
    while len(losses) < options.steps and optimizer.param_groups[0]["lr"] > _LEAST_RATE:
        top, left = int(draw.integers(height - tall + 1)), int(draw.integers(width - wide + 1))
        place = (..., slice(top, top + tall), slice(left, left + wide))
        which = turns[int(draw.integers(len(turns)))]
        with torch.autocast(picture.device.type, torch.bfloat16, enabled=options.bf16):
            made = model(orient(son[place], which).contiguous())
        loss = functional.l1_loss(made.float(), orient(father[place], which))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        since += 1
        if tell and len(losses) % _LOOK_EVERY == 0:
            rate = optimizer.param_groups[0]["lr"]
            tell(f"step {len(losses)} of at most {options.steps}, loss {losses[-1]:.4f}, learning rate {rate:.0e}")
        if since >= _LOOK_BACK and since % _LOOK_EVERY == 0 and _is_flat(losses[-_LOOK_BACK:]):
            optimizer.param_groups[0]["lr"] /= 10
            since = 0
    weights = {name: value.detach() for name, value in model.named_parameters()}
    if assume.subsample == "direct" and not assume.from_corner:
        with torch.no_grad():
            restored = model(network_input(picture, scale, assume))
    else:
        restored = enlarge_as_ensemble(model, weights, picture, kernel, scale, assume)
    restored = back_project(restored, picture, kernel, scale, assume, options.back_projections).clamp(0, 1)
    return Trained(restored.detach(), len(losses), time.perf_counter() - started, losses)


def _is_flat(losses: list[float]) -> bool:
    """Whether the fall along the line through ``losses`` is less than their scatter about it."""
    steps = np.arange(len(losses))
    slope, start = np.polyfit(steps, losses, 1)
    scatter = float(np.std(np.array(losses) - (slope * steps + start)))
    return -slope * len(losses) < scatter
