"""One call for a picture and a meta-trained network: which blur, how many steps, what if they do not help."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from datagen.degradations.kernels import MZSR_SIZE, gaussian_kernel, kernel_named
from infra.config import Config
from training.adaptation import (
    PUBLISHED_INNER_LR,
    Adapted,
    Assumption,
    adapt,
    back_project,
    enlarge,
    enlarge_as_ensemble,
    network_input,
    published_rates,
)
from training.kernel_estimation import estimate_kernel, most_consistent

ESTIMATE = "estimate"


class ZeroShotOptions(Config):
    """Meta-test (MZSR section 3.4) on one picture; the defaults adapt in ten steps to a round blur."""

    scale: Annotated[int, Field(ge=2, le=4)] = 2
    steps: Annotated[int, Field(ge=1, le=10)] = 10
    # Learning rate of each step; empty: the released test code's for this scale and sub-sampling, in proportion to what
    # the inner steps of the meta-training had.
    rates: tuple[float, ...] = ()
    inner_lr: Annotated[float, Field(gt=0)] = PUBLISHED_INNER_LR
    # The blur on the grid of the result: as ``kernel_named`` reads it; several with ";" between them, of which the one
    # that suits the picture best is taken; "estimate"; empty: a round Gaussian of as many px^2 as the scale.
    kernel: str = ""
    subsample: Literal["direct", "bicubic"] = "direct"
    alignment: Literal["aligned", "released"] = "aligned"
    noise: Annotated[float, Field(ge=0, le=50)] = 0.0  # sigma of noise in the picture, levels of 255
    back_projections: Annotated[int, Field(ge=0, le=20)] = 0
    ensemble: bool = False

    @property
    def assumption(self) -> Assumption:
        """The part of the options that the network's input depends on."""
        return Assumption(self.subsample, self.alignment, self.noise)

    @property
    def all_rates(self) -> tuple[float, ...]:
        """The learning rate of each step."""
        return self.rates or published_rates(self.steps, self.scale, self.subsample, self.inner_lr)


def trained_for(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an export of ``training.mzsr`` was trained for, from its metadata.

    Exports from before there was a choice have the released alignment and inner rate.
    """
    return {
        "scale": int(metadata.get("scale", 2)),
        "subsample": metadata.get("subsample", "direct"),
        "alignment": metadata.get("alignment", "released"),
        "inner_lr": metadata.get("inner_lr", PUBLISHED_INNER_LR),
    }


def blur_of(picture: Tensor, options: ZeroShotOptions) -> Tensor:
    """The blur [k,k] that ``options.kernel`` names, finds or chooses for ``picture`` [1,3,H,W].

    Raises:
        ValueError: it names none.
    """
    if not options.kernel:
        return gaussian_kernel(MZSR_SIZE, options.scale, options.scale).float()
    if options.kernel == ESTIMATE:
        return estimate_kernel(picture, options.scale).float()
    candidates = [kernel_named(text.strip()).float() for text in options.kernel.split(";")]
    if len(candidates) == 1:
        return candidates[0]
    return candidates[most_consistent(picture, candidates, options.scale)]


def enlarge_zero_shot(
    model: nn.Module,
    picture: Tensor,
    options: ZeroShotOptions,
    *,
    kernel: Tensor | None = None,
    fallback: nn.Module | None = None,
    notify: Callable[[str], Any] = warnings.warn,
) -> Tensor:
    """``picture`` [1,3,H,W] in [0, 1] enlarged by ``model`` after it has adapted to it; [1,3,sH,sW] in [0, 1].

    Args:
        kernel: the blur [k,k], in place of what ``options.kernel`` says.
        fallback: a network of the large-scale phase, which needs no adaptation.
        notify: told when the picture is too small to adapt to, or adaptation made its own loss no better, and what was
            done instead: the meta-trained weights as they are would be worse than bicubic, which is the last resort.
    """
    scale, assume = options.scale, options.assumption
    adapted = None
    if min(picture.shape[-2:]) >= MZSR_SIZE * scale:
        kernel = blur_of(picture, options).to(picture) if kernel is None else kernel.to(picture)
        adapted = adapt(model, picture, kernel, scale, options.all_rates, assume)
    if adapted is None or kernel is None or not adapted.helped:
        instead = "bicubic" if fallback is None else "the large-scale weights"
        notify(f"{why_not_adapted(picture.shape, adapted)}; enlarged by {instead}")
        if fallback is None:
            return network_input(picture, scale, assume).clamp(0, 1)
        return enlarge(fallback, dict(fallback.named_parameters()), picture, scale, assume).clamp(0, 1)
    return enlarge_adapted(model, adapted.weights, picture, kernel, options).clamp(0, 1)


def why_not_adapted(shape: Sequence[int], adapted: Adapted | None) -> str:
    """What to tell whoever gets no adapted network for a picture [..., H, W]; None: it was too small for one."""
    if adapted is None:
        return f"too small to adapt to ({shape[-1]}x{shape[-2]})"
    return f"adaptation did not help (loss {adapted.losses[0]:.4f} before, {adapted.losses[-1]:.4f} after)"


def enlarge_adapted(
    model: nn.Module, weights: Mapping[str, Tensor], picture: Tensor, kernel: Tensor, options: ZeroShotOptions
) -> Tensor:
    """``picture`` [N,3,H,W] enlarged to [N,3,sH,sW] by weights that have adapted, as ``options`` ask; not clipped.

    Raises:
        ValueError: an ensemble of a network that has learnt a shift.
    """
    scale, assume = options.scale, options.assumption
    if options.ensemble:
        restored = enlarge_as_ensemble(model, weights, picture, kernel, scale, assume)
    else:
        restored = enlarge(model, weights, picture, scale, assume)
    return back_project(restored, picture, kernel, scale, assume, options.back_projections)
