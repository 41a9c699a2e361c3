"""The eight flips and turns of a picture, and the mean of a network's answers to them (EDSR section 3.4, "EDSR+")."""

from collections.abc import Callable

import torch
from torch import Tensor

ORIENTATIONS = range(8)


def orient(image: Tensor, which: int) -> Tensor:
    """[..., H, W] in orientation 0 … 7: quarter turns to the left, then mirrored from 4 on; 0 changes nothing."""
    turned = torch.rot90(image, which % 4, dims=(-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def orient_back(image: Tensor, which: int) -> Tensor:
    """The inverse of ``orient``."""
    return torch.rot90(image.flip(-1) if which >= 4 else image, -(which % 4), dims=(-2, -1))


def symmetries(kernel: Tensor) -> list[int]:
    """Orientations that leave ``kernel`` [k,k] as it is, to a thousandth of its largest value."""
    return [which for which in ORIENTATIONS if (orient(kernel, which) - kernel).abs().max() < 1e-3 * kernel.max()]


def self_ensemble(forward: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Mean of ``forward`` over the eight orientations of ``image`` [N,C,H,W], each turned back.

    Valid where what made ``image`` small treats all orientations alike, as bicubic shrinking does. Costs eight calls.
    """
    total = forward(image)
    for which in list(ORIENTATIONS)[1:]:
        total = total + orient_back(forward(orient(image, which)), which)
    return total / len(ORIENTATIONS)
