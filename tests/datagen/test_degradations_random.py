"""Keyed random numbers: fixed for all time, and as good across keys as along one stream."""

import numpy as np
import pytest
import torch
from scipy import stats

from datagen.degradations import random
from datagen.degradations.random import (
    field_generator,
    field_seed,
    generator,
    normal_fields,
    philox_words,
    poisson_counts,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no gpu: cuda"))]

PINNED_INTEGERS = [528347991, 1749181257, 4186649516]
PINNED_FIELD_INTEGERS = [888999057, 3151414882, 226028104]
PINNED_NORMALS = [0.643495, 1.147719, -0.549085]


def test_the_numbers_are_pinned() -> None:
    """A change here changes every degradation of every published run: it must be meant."""
    assert generator(1, 2, "key", 3).integers(1 << 32, size=3).tolist() == PINNED_INTEGERS
    assert field_generator(5).integers(1 << 32, size=3).tolist() == PINNED_FIELD_INTEGERS
    field = normal_fields([5], (3, 8, 8), torch.zeros(1))
    assert field[0, :, 1, 2].tolist() == pytest.approx(PINNED_NORMALS, abs=1e-5)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stream", [0, 1])
def test_torch_computes_the_bits_that_numpy_draws(device: str, stream: int) -> None:
    seeds = [0, 1, 5, 2**31, 2**32 + 7, 2**48 - 1]
    words = philox_words(seeds, 4096, device, stream=stream).cpu().numpy().view(np.uint64)
    for row, seed in zip(words, seeds, strict=True):
        assert np.array_equal(row, np.random.Philox(key=seed | stream << 64).random_raw(4096))
        assert np.array_equal(row, field_generator(seed, stream).integers(1 << 64, size=4096, dtype=np.uint64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 7), (1,), (3, 64, 65)])
def test_fields_of_all_devices_agree(device: str, shape: tuple[int, ...]) -> None:
    """On the CPU too the path of other devices is run, over the bits that torch computes."""
    seeds = [3, 2**48 - 2]
    expected = normal_fields(seeds, shape, torch.zeros(1))
    count = expected[0].numel()
    bits = philox_words(seeds, 4 * -(-count // 8), device).view(torch.int32)
    made = torch.empty(bits.shape, device=device)
    random._box_muller(bits, made)
    assert torch.allclose(made[:, :count].reshape(expected.shape).cpu(), expected, atol=1e-5, rtol=0)
    elsewhere = normal_fields(seeds, shape, torch.zeros(1, device=device))
    assert elsewhere.device.type == device and torch.allclose(elsewhere.cpu(), expected, atol=1e-5, rtol=0)


def test_fields_are_normal_to_the_tails() -> None:
    fields = normal_fields(range(40), (3, 256, 256), torch.zeros(1)).flatten(1).double()
    every = fields.flatten()
    count = every.numel()
    assert abs(float(every.mean())) < 4 / count**0.5
    assert float(every.var()) == pytest.approx(1, abs=4 * (2 / count) ** 0.5)
    assert float((every**3).mean()) == pytest.approx(0, abs=4 * (15 / count) ** 0.5)
    assert float((every**4).mean()) == pytest.approx(3, abs=4 * (96 / count) ** 0.5)
    assert stats.kstest(every[::8].numpy(), "norm").pvalue > 1e-4
    for bound in (2, 3, 4, 4.5):
        for beyond in ((every > bound).sum(), (every < -bound).sum()):
            expected = count * stats.norm.sf(bound)
            assert abs(int(beyond) - expected) < 4.5 * expected**0.5
    assert 4.8 < float(every.abs().max()) < 6.67


def test_numbers_of_one_field_and_of_neighbouring_seeds_are_independent() -> None:
    fields = normal_fields([0, 1, 2, 2**47, 2**47 + 1], (65536,), torch.zeros(1)).double()
    second = normal_fields([0], (65536,), torch.zeros(1), stream=1).double()
    bound = 4.5 / 65536**0.5
    for power in (1, 2):  # squares too: the two numbers of a Box-Muller pair share their radius bits
        all_of_them = torch.cat((fields, second)) ** power
        assert float((torch.corrcoef(all_of_them) - torch.eye(6)).abs().max()) < bound
        for lag in (1, 2, 3, 4, 8, 32768):
            pair = torch.stack((all_of_them[0, lag:], all_of_them[0, :-lag]))
            assert abs(float(torch.corrcoef(pair)[0, 1])) < bound * (65536 / (65536 - lag)) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [0.003, 0.05, 0.5, 1.0, 2.5, 3.9, 4.1, 6.0, 20.0, 90.0])
def test_photon_counts_follow_the_poisson_distribution(mean: float, device: str) -> None:
    normal = normal_fields([9], (200_000,), torch.zeros(1, device=device))
    counts = poisson_counts(torch.full_like(normal, mean), normal)[0].cpu().numpy().astype(int)
    seen = np.bincount(counts)
    expected = len(counts) * stats.poisson.pmf(np.arange(len(seen)), mean)
    common = expected > 25
    chi_square = ((seen - expected)[common] ** 2 / expected[common]).sum()
    assert stats.chi2.sf(chi_square, max(1, common.sum() - 1)) > 1e-4
    assert counts.mean() == pytest.approx(mean, abs=4.5 * (mean / len(counts)) ** 0.5)


@pytest.mark.parametrize("mean", [0.0, 1e-4, 0.02, 0.3, 2.0, 3.99, 4.0, 5.0, 25.0, 400.0])
def test_photon_counts_keep_their_stated_bounds(mean: float) -> None:
    """Without chance: all quantiles on a fine grid, against the exact distribution."""
    edges = torch.linspace(-6.6, 6.6, 1_000_001, dtype=torch.float64)
    cumulative = stats.norm.cdf(edges.numpy())
    middle = ((edges[1:] + edges[:-1]) / 2).float()
    counts = poisson_counts(torch.full_like(middle, mean), middle).numpy()
    assert (counts == np.floor(counts)).all() and counts.min() >= 0
    assert (np.diff(counts) >= 0).all(), "counts rise with the quantile"
    probability = np.bincount(counts.astype(int), np.diff(cumulative))
    support = np.arange(len(probability))
    wrong = np.abs(probability - stats.poisson.pmf(support, mean)).sum() / 2
    found = (probability * support).sum()
    variance = (probability * (support - found) ** 2).sum()
    grid = 1.1e-5 * (1 + mean**0.5)  # a step of the grid, times the steps between counts
    assert wrong < grid + (0 if mean < random.EXACT_BELOW else 8e-4 * 4 / mean)
    assert found == pytest.approx(mean, rel=2e-4, abs=2e-6)
    assert variance == pytest.approx(mean, rel=6e-4, abs=2e-6)


def test_no_light_gives_no_photons_and_much_light_gives_as_many() -> None:
    normal = normal_fields([9], (1000,), torch.zeros(1))
    assert torch.equal(poisson_counts(torch.zeros(1, 1000), normal), torch.zeros(1, 1000))
    bright = poisson_counts(torch.full((1, 1000), 6.5e6), normal)
    assert torch.allclose(bright, 6.5e6 + 6.5e6**0.5 * normal, atol=6)
