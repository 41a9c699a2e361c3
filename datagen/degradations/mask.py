"""Block masks for masked pre-training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datagen.degradations.checks import Parameter, PerSample, check_images
from datagen.degradations.random import field_generator

MASKED = Parameter("masked", 0, 1, "fraction of the blocks that is masked")
RESTORED = Parameter("restored", 0, 1, "fraction of the blocks that is given back clean", default=0.0)
BLOCK = Parameter("block", 1, 256, "side of a block in pixels", default=16, integer=True)
FILL = Parameter("fill", 0, 1, "value of masked pixels", default=0.0)


def block_mask(
    x: Tensor,
    clean: Tensor,
    masked: PerSample,
    seed: Sequence[int],
    *,
    restored: PerSample = 0.0,
    block: int = 16,
    fill: PerSample = 0.0,
) -> Tensor:
    """Set ``masked`` of the blocks to ``fill`` and put ``clean`` back in ``restored`` of them; the rest stays ``x``.

    Blocks are drawn without replacement from the grid, so that the fractions are exact to half a block of area
    (blocks cut by the right and lower edge count as whole ones). ``clean`` has the shape of ``x``.

    Raises:
        ValueError: the two fractions exceed 1, or ``clean`` has another shape.
    """
    check_images(x)
    if clean.shape != x.shape:
        raise ValueError(f"block_mask: clean is {tuple(clean.shape)}, the degraded image {tuple(x.shape)}")
    count, _, height, width = x.shape
    fractions = zip(MASKED.check_all(masked, count), RESTORED.check_all(restored, count), strict=True)
    side = int(BLOCK.check(block))
    rows, columns = -(-height // side), -(-width // side)
    labels = np.zeros((count, rows * columns), dtype=np.uint8)
    for label, (hidden, given), one in zip(labels, fractions, seed, strict=True):
        if hidden + given > 1 + 1e-9:
            raise ValueError(f"masked + restored = {hidden + given:g}: outside the allowed [0, 1] (fraction of blocks)")
        order = field_generator(one).permutation(label.size)
        end_masked = round(hidden * label.size)
        end_restored = round((hidden + given) * label.size)
        label[order[:end_masked]] = 1
        label[order[end_masked:end_restored]] = 2
    grid = np.repeat(np.repeat(labels.reshape(count, 1, rows, columns), side, axis=2), side, axis=3)
    plan = torch.from_numpy(grid[..., :height, :width].copy()).to(x.device)
    return torch.where(plan == 1, FILL.column(fill, x), torch.where(plan == 2, clean, x))
