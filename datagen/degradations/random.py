"""Counter-based random numbers: every number is a function of (seed, epoch, key, draw) and of nothing else.

No stream is shared between samples, workers, ranks or steps of time, so the same sample gets the same
degradation wherever and whenever it is made. The generator is Philox (Salmon et al., Parallel random
numbers: as easy as 1, 2, 3, SC 2011), keyed by a hash. Parameters are drawn by numpy. Noise is made where the
images are: for the CPU numpy draws the random bits, for any other device torch computes the same ones there.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FIELD_SEED_BITS = 48
"""Field seeds go through JSON, whose readers keep whole numbers exact up to 2^53 only."""

EXACT_BELOW = 4.0
"""Poisson means below which ``poisson_counts`` adds up the exact probabilities."""

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_PHILOX_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = 0xFFFFFFFF


def generator(seed: int, epoch: int, key: str, draw: int) -> np.random.Generator:
    """The generator of one sample: independent of every other (seed, epoch, key, draw)."""
    text = f"{int(seed)}|{int(epoch)}|{int(draw)}|{key}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def field_seed(rng: np.random.Generator) -> int:
    """A seed for one random field (noise, streaks, flakes, blocks), small enough to be kept in JSON."""
    return int(rng.integers(1 << FIELD_SEED_BITS))


def field_generator(seed: int, stream: int = 0) -> np.random.Generator:
    """The generator of one random field; whoever needs several of one seed numbers them by ``stream``.

    Raises:
        ValueError: ``seed`` is not a whole number in [0, 2^48).
    """
    return np.random.Generator(np.random.Philox(key=_checked(seed) | stream << 64))


def normal_fields(seeds: Sequence[int], shape: Sequence[int], like: Tensor, *, stream: int = 0) -> Tensor:
    """One standard normal field a seed: (N, *shape), made in float32, dtype and device of ``like``.

    By the transform of Box and Muller (Annals of Mathematical Statistics 29, 1958) from 32 random bits a number; none
    lies beyond 6.67. A field depends on its seed, ``shape`` and ``stream`` only. The random bits are the same on all
    devices; the numbers agree within 1e-5, the difference of logarithm, sine and cosine between math libraries.

    Raises:
        ValueError: a seed is not a whole number in [0, 2^48).
    """
    count = math.prod(shape)
    words = 4 * -(-count // 8)
    fields = torch.empty((len(seeds), 2 * words), dtype=torch.float32, device=like.device)
    if like.device.type == "cpu":
        for field, seed in zip(fields, seeds, strict=True):  # one by one, because a field fits the cache
            # Over its full range integers() hands out the words as they are, faster than random_raw() does.
            bits = field_generator(seed, stream).integers(1 << 64, size=words, dtype=np.uint64)
            _box_muller(torch.from_numpy(bits.view(np.int32)), field)
    else:
        _box_muller(philox_words(seeds, words, like.device, stream=stream).view(torch.int32), fields)
    return fields[:, :count].reshape(len(seeds), *shape).to(like.dtype)


def philox_words(seeds: Sequence[int], words: int, device: torch.device | str, *, stream: int = 0) -> Tensor:
    """The first words of numpy's Philox (4x64, 10 rounds) for each seed, computed by torch: (N, words), int64.

    ``words`` is a multiple of 4. Sums and products of int64 wrap as unsigned ones do, so only shifts to the right and
    the upper halves of products need care.

    Raises:
        ValueError: a seed is not a whole number in [0, 2^48).
    """
    multiplier, key_step = (
        torch.tensor([one - (1 << 64) for one in pair], device=device).reshape(2, 1, 1)
        for pair in (_PHILOX_MULTIPLIERS, _PHILOX_KEY_STEPS)
    )
    multiplier_low, multiplier_high = multiplier & _LOW, _upper(multiplier)
    key = torch.tensor([[_checked(seed) for seed in seeds], [stream] * len(seeds)], device=device)[..., None]
    even = torch.zeros((2, len(seeds), words // 4), dtype=torch.int64, device=device)
    even[0] = torch.arange(1, words // 4 + 1, device=device)
    odd = torch.zeros_like(even)
    for _ in range(_PHILOX_ROUNDS):
        low, high = even & _LOW, _upper(even)
        inner = high * multiplier_low + _upper(low * multiplier_low)
        outer = low * multiplier_high + (inner & _LOW)
        product_high = high * multiplier_high + _upper(inner) + _upper(outer)
        even, odd = product_high.flip(0) ^ odd ^ key, (even * multiplier).flip(0)
        key = key + key_step
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1).flatten(1)


def poisson_counts(mean: Tensor, normal: Tensor) -> Tensor:
    """Poisson numbers from standard normal ones: the count at the same quantile. float32, of the shape of ``mean``.

    ``mean``: at least 0, and ``normal``: both float32, of one shape, on one device.

    Means below ``EXACT_BELOW`` go through the exact distribution function, in float32: a probability is wrong by less
    than 1e-6. From there on a count is the expansion that Giles calls Q_N3 (Algorithm 955, ACM TOMS 42, 2016), rounded
    down. It is worst at a mean of 4: there no event has a probability wrong by more than 8e-4, the mean is off by 2e-4
    of itself and the variance by 6e-4. At 25 the three are 3e-5, 1e-6 and 5e-5.
    """
    root = mean.sqrt()
    ratio = torch.div(normal, root, out=root).clamp_(min=-2)  # no light at all; the polynomial would rise again
    counts = ratio.mul(1 / 270).sub_(1 / 72).mul_(ratio).add_(1 / 6).mul_(ratio).add_(1).mul_(ratio).add_(1).mul_(mean)
    counts.add_(ratio.mul(7 / 810).sub_(1 / 36).mul_(ratio).add_(1 / 3))
    counts.sub_(torch.reciprocal(mean, out=ratio).mul_(8 / 405)).floor_().clamp_(min=0)
    few = (mean < EXACT_BELOW).nonzero(as_tuple=True)
    if few[0].numel():
        counts[few] = _few_counts(mean[few], normal[few])
    return counts


def _few_counts(mean: Tensor, normal: Tensor) -> Tensor:
    # Times e^mean, the distribution function is a sum of mean^k / k!; the count is how many of its values lie below.
    # What is taken off first exceeds the error of the sum: it must end above the quantile, or counts would run away.
    left = torch.special.ndtr(normal).sub_(5e-7).mul_(mean.exp())
    power, counts, more = torch.ones_like(mean), torch.zeros_like(mean), torch.empty_like(mean)
    for k in range(20):
        left.sub_(power, alpha=1 / math.factorial(k))
        counts.add_(torch.gt(left, 0, out=more))
        power.mul_(mean)
    return counts


def _box_muller(bits: Tensor, out: Tensor) -> None:
    """Fill ``out`` (..., 2 n) with normal numbers from as many int32: the first n are radii, the others angles."""
    half = bits.shape[-1] // 2
    radius, angle = (part.float() for part in (bits[..., :half], bits[..., half:]))
    # The sign is of no use to a radius: u = |bits| / 2^31, and -2 ln u = -ln u^2. The constant keeps ln 0 away.
    radius.mul_(2.0**-31).square_().add_(2.0**-64).log_().neg_().sqrt_()
    angle.mul_(math.pi / 2**31)
    torch.sin(angle, out=out[..., half:]).mul_(radius)
    torch.cos(angle, out=out[..., :half]).mul_(radius)


def _upper(x: Tensor) -> Tensor:
    # Torch shifts int64 with its sign.
    return (x >> 32) & _LOW


def _checked(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << FIELD_SEED_BITS:
        raise ValueError(f"seed = {seed!r}: expected a whole number in [0, 2^{FIELD_SEED_BITS})")
    return int(seed)
