"""Zero-shot adaptation: a few gradient steps on the one picture that is to be enlarged.

The picture itself is the training set: it is made smaller by the blur it is assumed to have gone
through, and the network learns to undo that (Soh et al., CVPR 2020, section 3.4, "meta-test").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from datagen.degradations.resample import blur, downsample_direct, imresize

Weights = dict[str, torch.Tensor]


# One step, as in the paper's "one-step adaptation"; the released code goes on with 0.01 (steps 2-4), then 0.005.
ONE_STEP = (0.02,)


@dataclass(frozen=True)
class Adapted:
    """Weights adapted to one picture, and the self-supervised loss before each step and after the last."""

    weights: Weights
    losses: tuple[float, ...]

    @property
    def helped(self) -> bool:
        """Whether the loss fell. The bare meta-initialisation is unusable, so callers fall back when it did not."""
        return self.losses[-1] < self.losses[0]


def shrink_blurred(clean: torch.Tensor, kernel: torch.Tensor, scale: int) -> torch.Tensor:
    """LR pictures [N,3,H/scale,W/scale]: blur by ``kernel``, then keep every ``scale``-th pixel (MZSR's "direct")."""
    return downsample_direct(blur(clean, kernel), scale)


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
    model: nn.Module, picture: torch.Tensor, kernel: torch.Tensor, scale: int, lrs: Sequence[float] = ONE_STEP
) -> Adapted:
    """Adapt ``model`` to ``picture`` [1,3,H,W] in [0, 1] with one SGD step per entry of ``lrs``.

    Args:
        kernel: the blur [k,k] that the picture is assumed to have gone through before sub-sampling.

    The model's own weights are not touched.
    """
    height, width = (side - side % scale for side in picture.shape[-2:])
    target = picture[..., :height, :width]
    son = imresize(shrink_blurred(target, kernel, scale), scale)
    weights: Weights = dict(model.named_parameters())
    losses = []
    for lr in lrs:
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        weights, loss = inner_step(model, leaves, son, target, lr)
        losses.append(float(loss.detach()))
    weights = {name: value.detach() for name, value in weights.items()}
    with torch.no_grad():
        losses.append(float(functional.l1_loss(functional_call(model, weights, (son,)), target)))
    return Adapted(weights, tuple(losses))


@torch.no_grad()
def enlarge(model: nn.Module, weights: Mapping[str, torch.Tensor], picture: torch.Tensor, scale: int) -> torch.Tensor:
    """``picture`` [N,3,H,W] enlarged to [N,3,sH,sW] by ``model`` with these weights; not clipped."""
    enlarged: torch.Tensor = functional_call(model, dict(weights), (imresize(picture, scale),))
    return enlarged
