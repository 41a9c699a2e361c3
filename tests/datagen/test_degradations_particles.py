"""What particles stop is laid down where they are, in the amount that they have."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from datagen.degradations.particles import Shower, flakes, lay_down, streaks
from datagen.degradations.random import field_generator

LIKE = torch.zeros(1)


def one(half: float, angle: float, radius: float, depth: float, y: float = 40, x: float = 30) -> Shower:
    along, sideways = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    shapes = np.array([[half, along, sideways, radius, 0, 0.2, -0.3]])
    return Shower(shapes, np.array([0]), np.array([[y, x]]), np.array([depth]))


def capsule(half: float, angle: float, radius: float, depth: float, y: float, x: float) -> np.ndarray:
    """The same, pixel by pixel from the definition."""
    rows, columns = np.mgrid[:80, :60]
    dy, dx = rows - y - 0.2, columns - x + 0.3
    along, sideways = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    on = dy * along + dx * sideways
    beyond = on - np.clip(on, -half, half)
    off = dx * along - dy * sideways
    near = np.maximum(1 - (off**2 + beyond**2) / radius**2, 0)
    return 1 - np.exp(-depth * near**2)


@pytest.mark.parametrize("angle", [-80.0, -46.0, -20.0, 0.0, 44.0, 60.0, 80.0])
@pytest.mark.parametrize(("half", "radius"), [(0.0, 6.0), (12.0, 1.5), (25.0, 4.0)])
@pytest.mark.parametrize(("y", "x"), [(40, 30), (-3, 58), (85, -4)])
def test_a_particle_is_a_capsule_whatever_its_direction(
    angle: float, half: float, radius: float, y: float, x: float
) -> None:
    laid = lay_down([one(half, angle, radius, 1.3, y, x)], 80, 60, LIKE)[0, 0].numpy()
    assert np.abs(laid - capsule(half, angle, radius, 1.3, y, x)).max() < 2e-5


def test_particles_cover_each_other_as_independent_ones_do() -> None:
    many = one(10, 0, 3, 0.7)
    twice = Shower(many.shapes, np.array([0, 0]), many.places.repeat(2, axis=0), many.depths.repeat(2))
    single, double = (lay_down([shower], 80, 60, LIKE) for shower in (many, twice))
    assert torch.allclose(double, 1 - (1 - single) ** 2, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (37, 41)])
def test_showers_of_a_batch_do_not_touch_each_other(size: tuple[int, int]) -> None:
    showers = [
        streaks(field_generator(seed), *size, density=0.01, length=40.0, angle=a, width=2.0, opacity=0.9, layers=3)
        for seed, a in enumerate((-70.0, 0.0, 50.0))
    ]
    showers.append(
        flakes(field_generator(9), *size, density=0.01, size=9.0, angle=0.0, drift=8.0, opacity=0.9, layers=3)
    )
    together = lay_down(showers, *size, LIKE)
    for shower, laid in zip(showers, together, strict=True):
        assert torch.equal(lay_down([shower], *size, LIKE)[0], laid)


def test_as_many_fall_near_the_border_as_in_the_middle() -> None:
    """What begins or ends outside is there too: no band along the border is emptier."""
    covers = [
        lay_down(
            [
                streaks(
                    field_generator(s), 96, 96, density=0.004, length=50.0, angle=30.0, width=2.0, opacity=0.8, layers=2
                )
            ],
            96,
            96,
            LIKE,
        )
        for s in range(40)
    ]
    mean = torch.cat(covers).mean(dim=(0, 1))
    middle = mean[30:66, 30:66].mean()
    for band in (mean[:8], mean[-8:], mean[:, :8], mean[:, -8:]):
        assert float(band.mean()) == pytest.approx(float(middle), rel=0.12)


def test_density_is_particles_a_pixel() -> None:
    shower = streaks(
        field_generator(0), 400, 400, density=0.002, length=4.0, angle=0.0, width=1.0, opacity=0.9, layers=1
    )
    inside = ((shower.places >= 0) & (shower.places < 400)).all(axis=1).sum()
    assert inside == pytest.approx(0.002 * 400**2, rel=0.06)


def test_near_flakes_are_larger_fewer_and_softer_than_far_ones() -> None:
    shower = flakes(field_generator(0), 256, 256, density=0.01, size=16.0, angle=0.0, drift=2.0, opacity=0.9, layers=3)
    radius = shower.shapes[:, 3][shower.shape]
    large, small = radius > np.quantile(radius, 0.9), radius < np.quantile(radius, 0.3)
    assert shower.depths[large].mean() < shower.depths[small].mean()
    field = lay_down([shower], 256, 256, LIKE)[0, 0].numpy()
    _, count = ndimage.label(field > 0.3)
    assert 100 < count < 0.01 * 256**2
