"""Integer samples of picture files, and the floats in [0, 1] that networks work on."""

from typing import Any

import numpy as np


def to_float(samples: np.ndarray) -> np.ndarray:
    """Unsigned integers of any width to float32 in [0, 1]; their largest value becomes 1."""
    return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)


def to_integers(values: np.ndarray, dtype: type[np.unsignedinteger[Any]] = np.uint8) -> np.ndarray:
    """Floats to the nearest of the unsigned integers of ``dtype``; what lies outside [0, 1] is cut off."""
    return np.rint(values.clip(0, 1) * np.float32(np.iinfo(dtype).max)).astype(dtype)
