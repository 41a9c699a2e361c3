"""Counter-based random numbers: every number is a function of (seed, epoch, key, draw) and of nothing else.

No stream is shared between samples, workers, ranks or steps of time, so the same sample gets the same
degradation wherever and whenever it is made. The generator is Philox (Salmon et al., Parallel random
numbers: as easy as 1, 2, 3, SC 2011), keyed by a hash. Numbers are drawn on the CPU, so that a CPU and a
GPU agree on them exactly.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIELD_SEED_BITS = 48
"""Field seeds go through JSON, whose readers keep whole numbers exact up to 2^53 only."""


def generator(seed: int, epoch: int, key: str, draw: int) -> np.random.Generator:
    """The generator of one sample: independent of every other (seed, epoch, key, draw)."""
    text = f"{int(seed)}|{int(epoch)}|{int(draw)}|{key}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def field_seed(rng: np.random.Generator) -> int:
    """A seed for one random field (noise, streaks, flakes, blocks), small enough to be kept in JSON."""
    return int(rng.integers(1 << FIELD_SEED_BITS))


def field_generator(seed: int) -> np.random.Generator:
    """The generator of one random field.

    Raises:
        ValueError: ``seed`` is not a whole number in [0, 2^48).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << FIELD_SEED_BITS:
        raise ValueError(f"seed = {seed!r}: expected a whole number in [0, 2^{FIELD_SEED_BITS})")
    return np.random.Generator(np.random.Philox(key=int(seed)))


def normal_fields(seeds: Sequence[int], shape: Sequence[int], like: Tensor) -> Tensor:
    """One standard normal field a seed: (N, *shape), drawn in float32, dtype and device of ``like``."""
    fields = np.empty((len(seeds), *shape), dtype=np.float32)
    for field, seed in zip(fields, seeds, strict=True):
        field_generator(seed).standard_normal(out=field, dtype=np.float32)
    return torch.from_numpy(fields).to(like)
