"""Rain, haze and snow: the equations that lay streaks, flakes and scattered light over a picture.

Images are (N, C, H, W) float tensors in [0, 1]; each parameter is one number or one a sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from datagen.degradations.checks import Parameter, PerSample, check_images
from datagen.degradations.depth import procedural_depth
from datagen.degradations.particles import flakes, lay_down, streaks
from datagen.degradations.random import field_generator

STREAK_DENSITY = Parameter("density", 0, 0.05, "streaks a pixel of area")
STREAK_LENGTH = Parameter("length", 2, 120, "pixels, of the nearest layer")
STREAK_WIDTH = Parameter("width", 0.5, 6, "pixels, of the nearest layer", default=1.5)
STREAK_ANGLE = Parameter("angle", -80, 80, "degrees from the vertical, positive leans to the right", default=0.0)
RAIN_OPACITY = Parameter("opacity", 0, 1, "largest opacity of a single streak", default=0.8)
RAIN_LAYERS = Parameter("layers", 1, 8, "layers of depth", default=3, integer=True)
LIGHT = Parameter("light", 0, 1, "brightness of the drop or flake", default=0.95)
VEIL = Parameter("veil", 0, 0.95, "share of the light scattered by what is too far to be seen singly", default=0.0)
AIRLIGHT = Parameter("airlight", 0, 1, "atmospheric light", default=0.8)
BETA = Parameter("beta", 0, 10, "scattering coefficient, one over the unit of depth")
HAZE_AIRLIGHT = Parameter("airlight", 0, 1, "atmospheric light")
NEAR = Parameter("near", 0, 1000, "depth of the nearest point, in the unit of 1 / beta", default=0.1)
FAR = Parameter("far", 0, 1000, "depth of the farthest point, in the unit of 1 / beta", default=1.0)
HORIZON = Parameter("horizon", -2, 2, "height of the horizon, 0 the top and 1 the bottom of the picture", default=0.2)
RELIEF = Parameter("relief", 0, 1, "share of the depth that objects make, against the ground plane", default=0.4)
FLAKE_DENSITY = Parameter("density", 0, 0.05, "flakes a pixel of area")
FLAKE_SIZE = Parameter("size", 1, 30, "diameter of the nearest flakes in pixels")
SNOW_OPACITY = Parameter("opacity", 0, 1, "largest opacity of a single flake", default=0.95)
SNOW_LAYERS = Parameter("layers", 1, 8, "layers of depth", default=3, integer=True)
DRIFT = Parameter("drift", 0, 60, "path of the nearest flakes during the exposure in pixels", default=3.0)


def rain(
    x: Tensor,
    density: PerSample,
    length: PerSample,
    seed: Sequence[int],
    *,
    angle: PerSample = 0.0,
    width: PerSample = 1.5,
    opacity: PerSample = 0.8,
    layers: int = 3,
    light: PerSample = 0.95,
    veil: PerSample = 0.0,
    airlight: PerSample = 0.8,
) -> Tensor:
    """Rain streaks and the veil that lies over them: y = (1 - v) * (x + S * max(L - x, 0)) + v * A.

    S, the opacity of the streaks, is ``rain_streaks``. A drop refracts the light of a wide sky, so a streak is as
    bright as its surroundings (``light``) and never darkens what it covers (Garg & Nayar, IJCV 2007). The veil is
    the accumulation of the heavy-rain model (Yang et al., CVPR 2017; Li et al., CVPR 2019), with one transmission
    1 - ``veil`` for the picture. Published ranges: length 21-60 px and airlight 0.3-0.9 (Outdoor-Rain), 0.002-0.010
    drops a pixel, length 25-55 px, angle up to 60 degrees (public generators).
    """
    check_images(x)
    opacities = rain_streaks(x, density, length, seed, angle=angle, width=width, opacity=opacity, layers=layers)
    lit = _lay_over(x, opacities, LIGHT.column(light, x))
    return _veiled(lit, VEIL.column(veil, x), AIRLIGHT.column(airlight, x))


def haze(x: Tensor, beta: PerSample, airlight: PerSample, depth: Tensor) -> Tensor:
    """Atmospheric scattering (Koschmieder): y = x * t + A * (1 - t), t = exp(-beta * depth).

    ``depth``: (N, 1, H, W), not negative, in the unit of 1 / beta. Published ranges: RESIDE ITS A 0.7-1.0, beta
    0.6-1.8; OTS A 0.8-1.0, beta 0.04-0.20 (Li et al., TIP 2019). ITS is used here with the depth of a scene scaled
    to end at 1, OTS with metres.

    Raises:
        ValueError: depth has another size than the images, or is negative or not finite.
    """
    check_images(x)
    if depth.shape != (x.shape[0], 1, *x.shape[-2:]):
        raise ValueError(f"depth must be {(x.shape[0], 1, *x.shape[-2:])}, got {tuple(depth.shape)}")
    nearest, farthest = (float(value) for value in torch.aminmax(depth))
    if not (nearest >= 0 and math.isfinite(farthest)):
        raise ValueError(f"depth must be finite and not negative, found values from {nearest:g} to {farthest:g}")
    transmission = (depth.to(x) * -BETA.column(beta, x)).exp_()
    return (x * transmission).add_((1 - transmission).mul_(HAZE_AIRLIGHT.column(airlight, x)))


def procedural_haze(
    x: Tensor,
    beta: PerSample,
    airlight: PerSample,
    seed: Sequence[int],
    *,
    near: PerSample = 0.1,
    far: PerSample = 1.0,
    horizon: PerSample = 0.2,
    relief: PerSample = 0.4,
) -> Tensor:
    """``haze`` for pictures without a depth map, with ``depth.procedural_depth`` in its place.

    Raises:
        ValueError: as ``haze``, or a ``far`` is smaller than its ``near``.
    """
    check_images(x)
    count = x.shape[0]
    depth = procedural_depth(
        x,
        seed,
        near=NEAR.check_all(near, count),
        far=FAR.check_all(far, count),
        horizon=HORIZON.check_all(horizon, count),
        relief=RELIEF.check_all(relief, count),
    )
    return haze(x, beta, airlight, depth)


def haze_at(
    x: Tensor, depth: Tensor, beta: PerSample, airlight: PerSample, *, near: PerSample = 0.1, far: PerSample = 1.0
) -> Tensor:
    """``haze`` for pictures with a depth map (N, 1, H, W) in [0, 1], 0 the nearest: near + (far - near) * depth.

    Raises:
        ValueError: as ``haze``, or a ``far`` is smaller than its ``near``.
    """
    check_images(x)
    nearest, farthest = NEAR.column(near, x), FAR.column(far, x)
    if bool((farthest < nearest).any()):
        raise ValueError("far: must not be smaller than near")
    return haze(x, beta, airlight, nearest + (farthest - nearest) * depth.to(x))


def snow(
    x: Tensor,
    density: PerSample,
    size: PerSample,
    seed: Sequence[int],
    *,
    angle: PerSample = 0.0,
    drift: PerSample = 3.0,
    opacity: PerSample = 0.95,
    layers: int = 3,
    light: PerSample = 0.95,
    veil: PerSample = 0.0,
    airlight: PerSample = 0.8,
) -> Tensor:
    """Falling snow and its veil: y = (1 - v) * (x + M * max(L - x, 0)) + v * A, M being ``snow_flakes``.

    The mask model of DesnowNet (Liu et al., TIP 2018: y = M * flake + (1 - M) * x), for flakes of one brightness
    that are lit like a white surface and do not darken what is brighter than they are.
    """
    check_images(x)
    opacities = snow_flakes(x, density, size, seed, angle=angle, drift=drift, opacity=opacity, layers=layers)
    lit = _lay_over(x, opacities, LIGHT.column(light, x))
    return _veiled(lit, VEIL.column(veil, x), AIRLIGHT.column(airlight, x))


def rain_streaks(
    x: Tensor,
    density: PerSample,
    length: PerSample,
    seed: Sequence[int],
    *,
    angle: PerSample = 0.0,
    width: PerSample = 1.5,
    opacity: PerSample = 0.8,
    layers: int = 3,
) -> Tensor:
    """Opacity (N, 1, H, W) in [0, 1] of straight streaks in ``layers`` of depth, for pictures like ``x``.

    A layer looks ``particles.LAYER_RATIO`` times smaller than the one in front and holds more drops, as their number
    grows with the volume seen; within a layer depths are spread, so that sizes run on without a gap. Lengths vary by
    15 %, widths (full at half of the opacity) by 30 %, angles by 1.5 degrees, opacities from 0.3 of the largest. A
    streak fades at both ends. Those thinner than a pixel are as faint as the part of it that they cover.
    """
    count, _, height, width_px = x.shape
    columns = zip(
        STREAK_DENSITY.check_all(density, count),
        STREAK_LENGTH.check_all(length, count),
        STREAK_ANGLE.check_all(angle, count),
        STREAK_WIDTH.check_all(width, count),
        RAIN_OPACITY.check_all(opacity, count),
        seed,
        strict=True,
    )
    deep = int(RAIN_LAYERS.check(layers))
    drops = [
        streaks(field_generator(one), height, width_px, density=d, length=n, angle=a, width=w, opacity=o, layers=deep)
        for d, n, a, w, o, one in columns
    ]
    return lay_down(drops, height, width_px, like=x)


def snow_flakes(
    x: Tensor,
    density: PerSample,
    size: PerSample,
    seed: Sequence[int],
    *,
    angle: PerSample = 0.0,
    drift: PerSample = 3.0,
    opacity: PerSample = 0.95,
    layers: int = 3,
) -> Tensor:
    """Opacity (N, 1, H, W) in [0, 1] of flakes in ``layers`` of depth, each smeared along its own path.

    Layers as in ``rain_streaks``; diameters vary by about a third, paths turn by 25 degrees. The nearer a flake, the
    more it is out of focus, so the largest are soft and let the background through. What motion and defocus spread
    over a larger area gets fainter for it. A flake that is large enough to have a shape is a few clumps about its
    centre, so that no two have the same outline.
    """
    count, _, height, width = x.shape
    columns = zip(
        FLAKE_DENSITY.check_all(density, count),
        FLAKE_SIZE.check_all(size, count),
        STREAK_ANGLE.check_all(angle, count),
        DRIFT.check_all(drift, count),
        SNOW_OPACITY.check_all(opacity, count),
        seed,
        strict=True,
    )
    deep = int(SNOW_LAYERS.check(layers))
    falling = [
        flakes(field_generator(one), height, width, density=d, size=z, angle=a, drift=f, opacity=o, layers=deep)
        for d, z, a, f, o, one in columns
    ]
    return lay_down(falling, height, width, like=x)


def _lay_over(x: Tensor, opacity: Tensor, light: Tensor) -> Tensor:
    return (light - x).clamp_min_(0).mul_(opacity).add_(x)


def _veiled(x: Tensor, veil: Tensor, airlight: Tensor) -> Tensor:
    return x.mul_(1 - veil).add_(airlight * veil)
