"""The corruptions that loaders apply: how a clean patch becomes the input of each stage's network."""

from collections.abc import Sequence
from typing import Any

import torch

from datagen.degradations import degrade
from datagen.degradations.recipe import Recipe
from datagen.degradations.resample import imresize


def degrade_by_recipe(
    recipe: Recipe, clean: torch.Tensor, seed: int, epoch: int, keys: Sequence[str]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Degrade [N,3,H,W] patches by ``recipe``; the size stays."""
    return degrade(clean, recipe, seed=seed, epoch=epoch, keys=keys)


def shrink(
    scale: int, clean: torch.Tensor, seed: int, epoch: int, keys: Sequence[str]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """LR patches [N,3,H/scale,W/scale] by MATLAB-compatible bicubic, rounded to 8 bit as LR files are (EDSR)."""
    low = imresize(clean, 1 / scale, round_to_uint8=True).clamp(0, 1)
    return low, [{"key": key, "recipe": "bicubic", "steps": [{"name": "downsample", "scale": scale}]} for key in keys]
