"""Keyed random numbers: fixed for all time, and as good across keys as along one stream."""

import numpy as np
import pytest
import torch

from datagen.degradations.random import field_generator, field_seed, generator, normal_fields

PINNED_INTEGERS = [528347991, 1749181257, 4186649516]
PINNED_NORMALS = [0.3420807421207428, 0.9788890480995178]


def test_the_numbers_are_pinned() -> None:
    """A change here changes every degradation of every published run: it must be meant."""
    assert generator(1, 2, "key", 3).integers(1 << 32, size=3).tolist() == PINNED_INTEGERS
    assert field_generator(5).standard_normal(2, dtype=np.float32).tolist() == pytest.approx(PINNED_NORMALS, abs=1e-6)


def test_first_numbers_of_neighbouring_keys_are_uniform_and_uncorrelated() -> None:
    for where in (
        [(0, 0, f"{i:06d}", 0) for i in range(6000)],
        [(0, i, "k", 0) for i in range(6000)],
        [(i, 0, "k", 0) for i in range(6000)],
        [(0, 0, "k", i) for i in range(6000)],
    ):
        first = np.array([generator(*one).random() for one in where])
        histogram = np.histogram(first, 20, (0, 1))[0]
        assert ((histogram - 300) ** 2 / 300).sum() < 45, "chi-square, 19 degrees of freedom, far beyond 99.9 %"
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.05


def test_coordinates_are_kept_apart() -> None:
    coordinates = [(1, 11, "k", 1), (11, 1, "k", 1), (1, 1, "k", 11), (1, 1, "1|k", 1), (1, 1, "k|1", 1)]
    assert len({generator(*one).random() for one in coordinates}) == len(coordinates)


def test_field_seeds_fit_json_and_are_spread() -> None:
    rng = generator(0, 0, "k", 0)
    seeds = [field_seed(rng) for _ in range(1000)]
    assert all(0 <= seed < 2**48 for seed in seeds) and len(set(seeds)) == 1000
    assert max(seeds) > 0.95 * 2**48
    with pytest.raises(ValueError, match=r"seed = 1\.5: expected a whole number"):
        field_generator(1.5)  # type: ignore[arg-type]


def test_a_field_depends_on_its_own_seed_only() -> None:
    like = torch.zeros(1)
    fields = normal_fields([4, 5, 4], (3, 8, 8), like)
    assert torch.equal(fields[0], fields[2]) and not torch.equal(fields[0], fields[1])
    assert torch.equal(normal_fields([5], (3, 8, 8), like)[0], fields[1])
