"""Rain, haze and snow follow their equations, stay in [0, 1] and change brightness as physics says."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data

from datagen.degradations.weather import haze, haze_at, procedural_haze, rain, rain_streaks, snow, snow_flakes

PHOTO = torch.from_numpy(data.astronaut()[:128, 150:278].copy()).permute(2, 0, 1)[None].float() / 255
SQUARE = torch.zeros(1, 3, 256, 256)
SEEDS = [1, 2]


WEATHER = (
    lambda x, seed: rain(x, 0.005, 30.0, seed, angle=-20.0),
    lambda x, seed: snow(x, 0.005, 8.0, seed, angle=40.0),
    lambda x, seed: procedural_haze(x, 1.0, 0.8, seed),
)


def photos() -> torch.Tensor:
    return PHOTO.expand(2, -1, -1, -1)


def test_haze_is_the_scattering_equation() -> None:
    depth = torch.rand(2, 1, 128, 128) * 3
    result = haze(photos(), [0.5, 2.0], [0.8, 1.0], depth)
    for sample, beta, airlight, far in zip(result, (0.5, 2.0), (0.8, 1.0), depth, strict=True):
        t = torch.exp(-beta * far)
        assert torch.allclose(sample, PHOTO[0] * t + airlight * (1 - t), atol=1e-6)


def test_haze_has_the_right_limits() -> None:
    depth = torch.ones(2, 1, 128, 128)
    assert torch.equal(haze(photos(), 0.0, 0.8, depth), photos())
    assert torch.allclose(haze(photos(), 10.0, 0.8, 5 * depth), torch.tensor(0.8), atol=1e-6)
    contrasts = [float(haze(photos(), beta, 0.8, depth).std()) for beta in (0.2, 0.6, 1.8)]
    assert contrasts[0] > contrasts[1] > contrasts[2]
    assert contrasts[1] == pytest.approx(float(photos().std()) * math.exp(-0.6), rel=0.35)


def test_haze_refuses_depth_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"depth must be \(2, 1, 128, 128\), got \(2, 1, 64, 64\)"):
        haze(photos(), 1.0, 0.8, torch.ones(2, 1, 64, 64))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="depth must be finite and not negative"):
            haze(photos(), 1.0, 0.8, torch.full((2, 1, 128, 128), bad))
    with pytest.raises(ValueError, match=r"far = 1: must not be smaller than near = 2"):
        procedural_haze(photos(), 1.0, 0.8, SEEDS, near=2.0, far=1.0)


def test_a_given_depth_spans_from_near_to_far() -> None:
    depth = torch.rand(2, 1, 128, 128)
    given = haze_at(photos(), depth, 1.5, 0.9, near=[0.2, 1.0], far=[2.0, 1.0])
    assert torch.allclose(given[:1], haze(PHOTO, 1.5, 0.9, 0.2 + 1.8 * depth[:1]), atol=1e-6)
    assert torch.allclose(given[1:], haze(PHOTO, 1.5, 0.9, torch.ones(1, 1, 128, 128)), atol=1e-6)
    with pytest.raises(ValueError, match="far: must not be smaller than near"):
        haze_at(photos(), depth, 1.5, 0.9, near=2.0, far=1.0)


def test_rain_brightens_what_is_darker_than_drops_and_nothing_else() -> None:
    rainy = rain(photos(), 0.008, 30.0, SEEDS, angle=[0.0, 20.0], light=0.9)
    difference = rainy - photos()
    assert rainy.min() >= 0 and rainy.max() <= 1
    assert difference.min() >= -1e-6
    assert (difference[photos() > 0.9].abs() < 1e-6).all()
    assert difference.max() > 0.3
    means = [float(rain(photos(), density, 30.0, SEEDS).mean()) for density in (0.0, 0.002, 0.01, 0.03)]
    assert means == sorted(means) and means[0] == pytest.approx(float(PHOTO.mean()), abs=1e-6)


@pytest.mark.parametrize("angle", [-70.0, -40.0, 0.0, 25.0, 60.0])
def test_streaks_run_along_their_angle(angle: float) -> None:
    """The structure tensor's weakest direction is that of the streaks; positive angles lean to the right at the top."""
    field = rain_streaks(SQUARE, 0.002, 50.0, [3], angle=angle, width=5.0)[0, 0].double().numpy()
    dy, dx = np.gradient(ndimage.gaussian_filter(field, 2))  # differences of thin lines lean towards the diagonal
    across = 0.5 * math.atan2(2 * (dx * dy).mean(), (dx**2).mean() - (dy**2).mean())
    assert math.degrees(across) == pytest.approx(angle, abs=4)


def test_density_length_and_opacity_of_streaks_mean_what_they_say() -> None:
    def cover(**changes: float) -> float:
        settings = {"density": 0.001, "length": 20.0, "opacity": 0.5} | changes
        return float(rain_streaks(SQUARE.expand(6, -1, -1, -1), seed=range(6), **settings).mean())

    base = cover()
    assert cover(density=0.002) == pytest.approx(2 * base, rel=0.12)
    assert cover(length=40.0) == pytest.approx(2 * base, rel=0.12)
    assert cover(opacity=0.25) == pytest.approx(base / 2, rel=0.12)
    assert cover(opacity=0.0) == 0
    assert rain_streaks(SQUARE, 0.05, 100.0, [0], opacity=1.0).max() <= 1


def test_veil_mixes_in_airlight_and_takes_contrast() -> None:
    plain = rain(photos(), 0.004, 30.0, SEEDS)
    veiled = rain(photos(), 0.004, 30.0, SEEDS, veil=[0.3, 0.6], airlight=0.7)
    assert torch.allclose(veiled[0], plain[0] * 0.7 + 0.3 * 0.7, atol=1e-6)
    assert torch.allclose(veiled[1], plain[1] * 0.4 + 0.6 * 0.7, atol=1e-6)


def test_snow_whitens_and_grows_with_density_and_size() -> None:
    snowy = snow(photos(), 0.01, 8.0, SEEDS, light=0.95)
    assert snowy.min() >= 0 and snowy.max() <= 1
    assert (snowy - photos()).min() >= -1e-6 and (snowy - photos()).max() > 0.3

    def cover(**changes: float) -> float:
        settings = {"density": 0.002, "size": 8.0} | changes
        return float(snow_flakes(SQUARE.expand(8, -1, -1, -1), seed=range(8), **settings).mean())

    assert cover(density=0.004) == pytest.approx(2 * cover(), rel=0.2)
    assert cover(size=14.0) > 1.8 * cover()
    assert cover(density=0.0) == 0


def test_a_sample_of_a_batch_is_that_of_its_seed() -> None:
    for function in WEATHER:
        for height, width in ((128, 128), (97, 61)):
            batch = function(photos()[..., :height, :width], [7, 8])
            assert torch.allclose(batch[1:], function(PHOTO[..., :height, :width], [8]), atol=1e-6)
            assert not torch.equal(batch[0], batch[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_weather() -> None:
    """Positions are the same numbers; sums of streaks and products of matrices may round differently."""
    for function in WEATHER:
        assert torch.allclose(function(photos().cuda(), SEEDS).cpu(), function(photos(), SEEDS), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: rain(x, 0.5, 30.0, SEEDS),
            r"density = 0.5: outside the allowed \[0, 0.05\] \(streaks a pixel of area\)",
        ),
        (lambda x: rain(x, 0.01, 500.0, SEEDS), r"length = 500: outside the allowed \[2, 120\]"),
        (lambda x: rain(x, 0.01, 30.0, SEEDS, layers=0), r"layers = 0: outside the allowed \[1, 8\]"),
        (lambda x: snow(x, 0.01, 90.0, SEEDS), r"size = 90: outside the allowed \[1, 30\]"),
        (lambda x: procedural_haze(x, 1.0, 1.5, SEEDS), r"airlight = 1.5: outside the allowed \[0, 1\]"),
        (lambda x: procedural_haze(x, 99.0, 0.5, SEEDS), r"beta = 99: outside the allowed \[0, 10\]"),
    ],
)
def test_bad_weather_is_refused_with_its_range(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(photos())
