"""Zero-shot adaptation: a few gradient steps on the one picture that is to be enlarged.

The picture itself is the training set: it is made smaller by the blur it is assumed to have gone
through, and the network learns to undo that (Soh et al., CVPR 2020, section 3.4, "meta-test").
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from datagen.degradations.resample import blur, downsample_direct, imresize
from training.ensemble import orient, orient_back, symmetries

Weights = dict[str, torch.Tensor]

PUBLISHED_INNER_LR = 0.01

# One step, as in the paper's "one-step adaptation"; the released code goes on with 0.01 (steps 2-4), then 0.005.
ONE_STEP = (0.02,)


@dataclass(frozen=True)
class Assumption:
    """How a picture is assumed to have come about from the one that is looked for, besides its blur and the scale.

    ``subsample``: "direct" keeps the top-left pixel of each cell; "bicubic" shrinks by MATLAB's cubic after the blur.
    ``alignment``: where the network's input puts the pixels that were kept directly. "aligned": where they were, so
    that only a blur is left to undo. "released": in the middle of their cells, as the authors' code does, which leaves
    a shift by (scale - 1) / 2 px for the network to learn. Both look for the same picture; they are one with bicubic.
    ``noise``: standard deviation, in levels of 255, of Gaussian noise that the picture holds and that its smaller
    versions are given too.
    """

    subsample: Literal["direct", "bicubic"] = "direct"
    alignment: Literal["aligned", "released"] = "aligned"
    noise: float = 0.0

    @property
    def from_corner(self) -> bool:
        """Whether the enlargement of the network's input is aligned to the top-left pixels of the cells."""
        return self.subsample == "direct" and self.alignment == "aligned"


RELEASED = Assumption(alignment="released")
"""What models were trained under before there was a choice, and the published numbers were made with."""


@dataclass(frozen=True)
class Adapted:
    """Weights adapted to one picture, and the self-supervised loss before each step and after the last."""

    weights: Weights
    losses: tuple[float, ...]

    @property
    def helped(self) -> bool:
        """Whether the loss fell. The bare meta-initialisation is unusable, so callers fall back when it did not."""
        return math.isfinite(self.losses[-1]) and self.losses[-1] < self.losses[0]


def published_rates(
    steps: int, scale: int = 2, subsample: str = "direct", inner_lr: float = PUBLISHED_INNER_LR
) -> tuple[float, ...]:
    """Learning rates of ``steps`` steps as the released test code has them for its models.

    Those were meta-trained with inner steps at 0.01; the rates are in proportion for one that had ``inner_lr``.

    Raises:
        ValueError: not 1 to 10 steps.
    """
    if not 1 <= steps <= 10:
        raise ValueError(f"{steps} steps: MZSR adapts in 1 to 10")
    rates = (0.02, *[0.01] * 3, *[0.005] * 6)
    if subsample == "bicubic":
        rates = (*[0.01] * 3, *[0.001] * 7)
    elif scale == 4:
        rates = (0.01, *[0.005] * 4, *[0.001] * 5)
    return tuple(rate * (inner_lr / PUBLISHED_INNER_LR) for rate in rates[:steps])


def shrink_blurred(
    clean: torch.Tensor, kernel: torch.Tensor, scale: int, subsample: Literal["direct", "bicubic"] = "direct"
) -> torch.Tensor:
    """LR pictures [N,3,H/scale,W/scale]: blur by ``kernel`` ([k,k], or [N,k,k]), then sub-sample; not rounded."""
    blurred = blur(clean, kernel)
    return downsample_direct(blurred, scale) if subsample == "direct" else imresize(blurred, 1 / scale)


def network_input(low: torch.Tensor, scale: int, assume: Assumption = RELEASED) -> torch.Tensor:
    """``low`` [N,3,H,W] enlarged by cubic interpolation to [N,3,sH,sW], aligned as ``assume`` says."""
    return imresize(low, scale, from_corner=assume.from_corner)


def inner_step(
    model: nn.Module,
    weights: Weights,
    enlarged: torch.Tensor,
    target: torch.Tensor,
    lr: float,
    *,
    second_order: bool = False,
) -> tuple[Weights, torch.Tensor]:
    """One plain SGD step on L1(model(enlarged), target).

    Returns:
        The new weights (differentiable in the old ones, through the gradient too when ``second_order``)
        and the loss before the step.
    """
    loss = functional.l1_loss(functional_call(model, weights, (enlarged,)), target)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=second_order)
    return {name: value - lr * gradient for (name, value), gradient in zip(weights.items(), gradients)}, loss


def adapt(
    model: nn.Module,
    picture: torch.Tensor,
    kernel: torch.Tensor,
    scale: int,
    lrs: Sequence[float] = ONE_STEP,
    assume: Assumption = RELEASED,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Adapted:
    """Adapt ``model`` to ``picture`` [1,3,H,W] in [0, 1] with one SGD step per entry of ``lrs``.

    Args:
        kernel: the blur [k,k] that the picture is assumed to have gone through before sub-sampling.
        start: weights to begin from in place of the model's own.

    The model's own weights are not touched.
    """
    son, target = _son_and_father(picture, kernel, scale, assume)
    weights: Weights = dict(start or model.named_parameters())
    losses = []
    for lr in lrs:
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        weights, loss = inner_step(model, leaves, son, target, lr)
        losses.append(float(loss.detach()))
    weights = {name: value.detach() for name, value in weights.items()}
    with torch.no_grad():
        losses.append(float(functional.l1_loss(functional_call(model, weights, (son,)), target)))
    return Adapted(weights, tuple(losses))


def adapt_many(
    model: nn.Module,
    pictures: torch.Tensor,
    kernels: torch.Tensor,
    scale: int,
    lrs: Sequence[float] = ONE_STEP,
    assume: Assumption = RELEASED,
) -> list[Adapted]:
    """``adapt`` for N pictures of one size [N,3,H,W] at once, each with a blur of its own [N,k,k] or all with [k,k].

    Every picture has weights of its own, so that the steps are batched (``torch.func.vmap``). Results are those of a
    loop to rounding. Memory is N times that of one picture.
    """
    sons, targets = _son_and_father(pictures, kernels, scale, assume)

    def loss_of(weights: Weights, son: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.l1_loss(functional_call(model, weights, (son[None],)), target[None])

    weights = {name: value.detach().expand(len(pictures), *value.shape) for name, value in model.named_parameters()}
    step = vmap(grad_and_value(loss_of))
    losses = []
    for lr in lrs:
        gradients, before = step(weights, sons, targets)
        weights = {name: value - lr * gradients[name] for name, value in weights.items()}
        losses.append(before)
    with torch.no_grad():
        losses.append(vmap(loss_of)(weights, sons, targets))
    history = torch.stack(losses, dim=1).tolist()
    return [
        Adapted({name: value[number] for name, value in weights.items()}, tuple(history[number]))
        for number in range(len(pictures))
    ]


@torch.no_grad()
def enlarge(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    picture: torch.Tensor,
    scale: int,
    assume: Assumption = RELEASED,
) -> torch.Tensor:
    """``picture`` [N,3,H,W] enlarged to [N,3,sH,sW] by ``model`` with these weights; not clipped."""
    enlarged: torch.Tensor = functional_call(model, dict(weights), (network_input(picture, scale, assume),))
    return enlarged


@torch.no_grad()
def enlarge_as_ensemble(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    picture: torch.Tensor,
    kernel: torch.Tensor,
    scale: int,
    assume: Assumption,
) -> torch.Tensor:
    """``enlarge`` as the mean over those flips and turns that leave ``kernel`` as it is: eight of a round blur.

    Others would show the network a blur that it has not learnt. The input is turned after its enlargement, which knows
    where the pixels were.

    Raises:
        ValueError: the network has learnt a shift (alignment "released" of direct sub-sampling), which turns with it.
    """
    if assume.subsample == "direct" and not assume.from_corner:
        raise ValueError("self-ensemble needs alignment=aligned: a learnt shift would be turned with the picture")
    given = network_input(picture, scale, assume)
    turned = (
        orient_back(functional_call(model, dict(weights), (orient(given, which),)), which)
        for which in symmetries(kernel)
    )
    results = list(turned)
    return torch.stack(results).mean(dim=0)


@torch.no_grad()
def back_project(
    restored: torch.Tensor, picture: torch.Tensor, kernel: torch.Tensor, scale: int, assume: Assumption, times: int
) -> torch.Tensor:
    """Add to ``restored`` [N,3,sH,sW], ``times`` times, what its shrunken self lacks of ``picture`` [N,3,H,W].

    Irani & Peleg 1991, as ZSSR and MZSR offer it; the difference is enlarged by cubic interpolation.
    """
    for _ in range(times):
        lacking = picture - shrink_blurred(restored, kernel, scale, assume.subsample)
        restored = restored + network_input(lacking, scale, assume)
    return restored


def _son_and_father(
    pictures: torch.Tensor, kernel: torch.Tensor, scale: int, assume: Assumption
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network gets and what it should make of it: pictures shrunk and enlarged again, and themselves."""
    height, width = (side - side % scale for side in pictures.shape[-2:])
    fathers = pictures[..., :height, :width]
    sons = shrink_blurred(fathers, kernel, scale, assume.subsample)
    if assume.noise:
        # The same noise at every call: an adaptation is a function of the picture.
        generator = torch.Generator(device="cpu").manual_seed(0)
        noise = torch.randn(sons.shape[1:], generator=generator).to(sons)
        sons = sons + noise * (assume.noise / 255)
    return network_input(sons, scale, assume), fathers
