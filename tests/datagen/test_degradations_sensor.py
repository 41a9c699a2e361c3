"""Noise has the statistics its parameters state; low light follows its curve; eight bits are 256 levels."""

import numpy as np
import pytest
import torch

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
