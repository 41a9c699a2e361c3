"""The corruptions of the stages: how a clean patch becomes the input of each stage's network."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from datagen.degradations import degrade
from datagen.degradations.recipe import Recipe
from datagen.degradations.resample import imresize


class Corruption(Protocol):
    """Makes the network's input [N,3,h,w] from clean patches float32 [N,3,H,W] in [0, 1], on any device.

    One epoch, key and draw a patch, ``depth`` maps [1,H,W] in [0, 1] where there are any. Returns uint8 where the
    result has 8 bits, else float32 in [0, 1], and one meta a patch. A pure function of its arguments, and picklable.
    """

    def __call__(
        self,
        clean: Tensor,
        *,
        seed: int,
        epoch: Sequence[int],
        keys: Sequence[str],
        draw: Sequence[int],
        depth: Sequence[Tensor | None] | None,
    ) -> tuple[Tensor, list[dict[str, Any]]]: ...


def degrade_by_recipe(
    recipe: Recipe,
    clean: Tensor,
    *,
    seed: int,
    epoch: Sequence[int],
    keys: Sequence[str],
    draw: Sequence[int],
    depth: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Degrade the patches by ``recipe``."""
    degraded, metas = degrade(clean, recipe, seed=seed, epoch=epoch, keys=keys, draw=draw, depth=depth)
    return (_as_bytes(degraded) if recipe.output == "8bit" else degraded), metas


def shrink(
    scale: int,
    clean: Tensor,
    *,
    seed: int,
    epoch: Sequence[int],
    keys: Sequence[str],
    draw: Sequence[int],
    depth: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """LR patches [N,3,H/scale,W/scale] by MATLAB-compatible bicubic, rounded to 8 bit as LR files are (EDSR)."""
    low = imresize(clean, 1 / scale, round_to_uint8=True).clamp(0, 1)
    step = {"name": "downsample", "scale": scale}
    return _as_bytes(low), [{"key": key, "recipe": "bicubic", "steps": [step]} for key in keys]


def _as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)
