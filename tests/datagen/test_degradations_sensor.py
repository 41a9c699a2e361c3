"""Noise has the statistics its parameters state; low light follows its curve; eight bits are 256 levels."""

import numpy as np
import pytest
import torch
from scipy import stats

from datagen.degradations.sensor import gaussian_noise, low_light, poisson_gaussian_noise, quantise, speckle_noise

SEEDS = (11, 12)


def flat(value: float) -> torch.Tensor:
    return torch.full((2, 3, 192, 192), value)


def test_gaussian_noise_has_its_sigma_no_mean_and_no_correlation() -> None:
    noise = 255 * (gaussian_noise(flat(0.5), [15.0, 50.0], SEEDS, clip=False) - 0.5)
    count = noise[0].numel()
    for sample, sigma in zip(noise, (15, 50), strict=True):
        assert abs(float(sample.mean())) < 5 * sigma / count**0.5
        assert float(sample.std()) == pytest.approx(sigma, rel=0.015)
        kurtosis = float(((sample / sample.std()) ** 4).mean())
        assert kurtosis == pytest.approx(3, abs=0.1)
    channels = np.corrcoef(noise[0].reshape(3, -1).numpy())
    assert np.abs(channels - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(noise[0, 0, :, 1:].ravel(), noise[0, 0, :, :-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02


def test_grey_noise_is_the_same_in_all_channels() -> None:
    noisy = gaussian_noise(flat(0.5), 25.0, SEEDS, grey=True)
    assert torch.equal(noisy[:, 0], noisy[:, 1]) and torch.equal(noisy[:, 0], noisy[:, 2])
    assert not torch.equal(noisy[0], noisy[1])


def test_clipping_is_as_asked() -> None:
    white = flat(1.0)
    assert gaussian_noise(white, 25.0, SEEDS).max() == 1
    assert gaussian_noise(white, 25.0, SEEDS, clip=False).max() > 1.2


@pytest.mark.parametrize("level", [0.05, 0.4, 1.0])
def test_shot_noise_grows_with_the_square_root_of_light(level: float) -> None:
    noise = 255 * (poisson_gaussian_noise(flat(level), [10.0, 40.0], SEEDS, read=[0.0, 6.0], clip=False) - level)
    for sample, shot, read in zip(noise, (10, 40), (0, 6), strict=True):
        assert float(sample.std()) == pytest.approx((shot**2 * level + read**2) ** 0.5, rel=0.02)
        assert abs(float(sample.mean())) < 5 * shot / sample.numel() ** 0.5


def test_shot_noise_counts_whole_photons() -> None:
    noisy = poisson_gaussian_noise(flat(0.5), 40.0, SEEDS, clip=False).double()
    counts = noisy * (255 / 40) ** 2
    assert float((counts - counts.round()).abs().max()) < 1e-3


@pytest.mark.parametrize("photons_seen", [0.2, 1.0, 3.0, 12.0])
def test_shot_noise_in_the_dark_counts_as_poisson_does(photons_seen: float) -> None:
    """The mean over all pixels is one photon and less; zero, one, two photons are as frequent as they should be."""
    shot = 40.0
    photons = (255 / shot) ** 2
    noisy = poisson_gaussian_noise(flat(photons_seen / photons), shot, SEEDS, clip=False).double()
    counts = np.bincount((noisy * photons).round().int().flatten().numpy())
    expected = noisy.numel() * stats.poisson.pmf(np.arange(len(counts)), photons_seen)
    common = expected > 25
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert stats.chi2.sf(chi_square, common.sum() - 1) > 1e-4


def test_read_noise_has_nothing_to_do_with_shot_noise() -> None:
    shot = poisson_gaussian_noise(flat(0.5), 20.0, SEEDS, clip=False) - 0.5
    both = poisson_gaussian_noise(flat(0.5), 20.0, SEEDS, read=20.0, clip=False) - 0.5
    assert abs(np.corrcoef(shot.ravel(), (both - shot).ravel())[0, 1]) < 0.01
    assert float(255 * (both - shot).std()) == pytest.approx(20, rel=0.015)


def test_grey_shot_noise_is_the_same_in_all_channels() -> None:
    x = torch.tensor([0.2, 0.5, 0.8]).reshape(1, 3, 1, 1).repeat(2, 1, 64, 64)
    noise = poisson_gaussian_noise(x, 25.0, SEEDS, read=5.0, grey=True, clip=False) - x
    assert torch.allclose(noise[:, :1].expand_as(noise), noise, atol=1e-6)
    assert float(255 * noise.std()) == pytest.approx((25**2 * 0.5 + 5**2) ** 0.5, rel=0.05)


def test_a_sample_is_the_same_in_any_batch_and_precision() -> None:
    x = torch.rand(3, 3, 33, 35, generator=torch.Generator().manual_seed(0))
    for noise in (
        lambda x, seed: gaussian_noise(x, 25.0, seed),
        lambda x, seed: poisson_gaussian_noise(x, 60.0, seed, read=3.0),
        lambda x, seed: speckle_noise(x, 25.0, seed),
    ):
        batch = noise(x, (5, 6, 7))
        for index in range(3):
            assert torch.equal(noise(x[index : index + 1], (5 + index,))[0], batch[index])
        assert torch.equal(noise(x.to(memory_format=torch.channels_last), (5, 6, 7)), batch)
        double = noise(x.double(), (5, 6, 7))
        assert double.dtype == torch.float64
        assert float(((double - batch).abs() > 1e-5).double().mean()) < 1e-3, "a photon more or less, now and then"


def test_noise_leaves_its_input_alone_and_passes_its_gradient() -> None:
    x = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    for noisy in (gaussian_noise(x, 9.0, [1], clip=False), poisson_gaussian_noise(x, 9.0, [1], clip=False)):
        (gradient,) = torch.autograd.grad(noisy.sum(), x)
        assert torch.equal(gradient, torch.ones_like(x))
    assert torch.equal(x, torch.full_like(x, 0.5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no gpu with cuda")
def test_a_gpu_makes_the_noise_of_the_cpu() -> None:
    x = torch.rand(2, 3, 64, 65, generator=torch.Generator().manual_seed(0))
    for noise in (gaussian_noise, speckle_noise):
        assert torch.allclose(noise(x.cuda(), 25.0, SEEDS).cpu(), noise(x, 25.0, SEEDS), atol=2e-6)
    here, there = (poisson_gaussian_noise(y, 30.0, SEEDS, read=3.0) for y in (x, x.cuda()))
    assert float(((there.cpu() - here).abs() > 2e-6).double().mean()) < 1e-4


def test_speckle_is_in_proportion_to_the_signal() -> None:
    for level in (0.2, 0.8):
        noise = 255 * (speckle_noise(flat(level), 30.0, SEEDS, clip=False) - level)
        assert float(noise.std()) == pytest.approx(30 * level, rel=0.02)
    assert torch.equal(speckle_noise(flat(0.0), 30.0, SEEDS), flat(0.0))


def test_low_light_follows_its_formula_and_only_darkens() -> None:
    x = torch.rand(2, 3, 16, 16)
    dark = low_light(x, [1.5, 4.0], gain=[0.9, 1.0], scale=0.7)
    assert torch.allclose(dark[0], 0.7 * (0.9 * x[0]) ** 1.5, atol=1e-6)
    assert torch.allclose(dark[1], 0.7 * x[1] ** 4, atol=1e-6)
    assert (dark <= x).all()


def test_quantise_rounds_to_256_levels() -> None:
    levels = quantise(torch.linspace(0, 1, 5001)) * 255
    assert torch.equal(levels, levels.round()) and len(levels.unique()) == 256


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: gaussian_noise(x, 300.0, SEEDS),
            r"sigma = 300: outside the allowed \[0, 255\] \(standard deviation in",
        ),
        (lambda x: gaussian_noise(x, [1.0], SEEDS), "sigma: 1 values for a batch of 2"),
        (lambda x: gaussian_noise(x, float("nan"), SEEDS), "sigma = nan: expected a number in"),
        (lambda x: poisson_gaussian_noise(x, 0.0, SEEDS), r"shot = 0: outside the allowed \[0.1, 255\]"),
        (lambda x: low_light(x, 0.5), r"gamma = 0.5: outside the allowed \[1, 6\] \(exponent\)"),
        (lambda x: gaussian_noise(x, 5.0, (1, -2)), r"seed = -2: expected a whole number in \[0, 2\^48\)"),
    ],
)
def test_bad_parameters_are_refused_with_their_range(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(flat(0.5))
