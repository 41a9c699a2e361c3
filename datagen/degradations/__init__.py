"""Degradations: what turns a clean picture into the one a network must restore, exact and replayable.

One function a physical process (``sensor``, ``blur``, ``resample``, ``jpeg``, ``weather``, ``mask``), batched over
(N, C, H, W) float tensors in [0, 1]; recipes in ``configs/degradations`` choose and chain them.
"""

from datagen.degradations.execute import degrade, plan, replay
from datagen.degradations.recipe import Recipe, load_recipe

__all__ = ["Recipe", "degrade", "load_recipe", "plan", "replay"]
