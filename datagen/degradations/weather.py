"""Rain, haze and snow: fields made on the CPU from a seed, and the equations that lay them over it."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datagen.degradations.checks import Parameter, PerSample, check_images
from datagen.degradations.random import field_generator

Field = NDArray[np.float32]

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

LAYER_RATIO = 0.62
"""How much smaller each layer looks than the one before it; an own choice, made by eye."""

_CLUMPS = 5


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
    """Rain streaks and the veil behind them: y = (1 - v) * (x + S * max(L - x, 0)) + v * A.

    S, the opacity of the streaks, is ``rain_streaks``. A drop refracts the light of a wide sky, so a streak is as
    bright as its surroundings (``light``) and never darkens what it covers (Garg & Nayar, IJCV 2007). The veil is
    the accumulation of the heavy-rain model (Yang et al., CVPR 2017; Li et al., CVPR 2019), with one transmission
    1 - ``veil`` for the picture. Published ranges: length 21-60 px and airlight 0.3-0.9 (Outdoor-Rain), 0.002-0.010
    drops a pixel, length 25-55 px, angle up to 60 degrees (public generators).
    """
    check_images(x)
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
    fields = [
        rain_streaks(height, width_px, one, density=d, length=n, angle=a, width=w, opacity=o, layers=layers)
        for d, n, a, w, o, one in columns
    ]
    lit = _lay_over(x, fields, LIGHT.column(light, x))
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
    transmission = torch.exp(-BETA.column(beta, x) * depth.to(x))
    return x * transmission + HAZE_AIRLIGHT.column(airlight, x) * (1 - transmission)


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
    """``haze`` for pictures without a depth map, with ``procedural_depth`` in its place."""
    check_images(x)
    count, _, height, width = x.shape
    columns = zip(
        NEAR.check_all(near, count),
        FAR.check_all(far, count),
        HORIZON.check_all(horizon, count),
        RELIEF.check_all(relief, count),
        seed,
        strict=True,
    )
    fields = [procedural_depth(height, width, s, near=n, far=f, horizon=h, relief=r) for n, f, h, r, s in columns]
    return haze(x, beta, airlight, torch.from_numpy(np.stack(fields)[:, None]).to(x))


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
    fields = [
        snow_flakes(height, width, one, density=d, size=z, angle=a, drift=f, opacity=o, layers=layers)
        for d, z, a, f, o, one in columns
    ]
    lit = _lay_over(x, fields, LIGHT.column(light, x))
    return _veiled(lit, VEIL.column(veil, x), AIRLIGHT.column(airlight, x))


def rain_streaks(
    height: int,
    width_px: int,
    seed: int,
    *,
    density: float,
    length: float,
    angle: float = 0.0,
    width: float = 1.5,
    opacity: float = 0.8,
    layers: int = 3,
) -> Field:
    """Opacity (height, width_px) in [0, 1] of straight streaks in ``layers`` of depth.

    Each layer looks ``LAYER_RATIO`` times smaller than the one in front, and fainter, and holds more drops (their
    number grows with the volume seen). Within a layer lengths vary by a third, angles by 1.5 degrees, opacities
    from a quarter to the whole; a streak fades at both ends. Layers are composed as independent covers.
    """
    rng = field_generator(seed)
    clear = np.ones((height, width_px), dtype=np.float32)
    for scale, drops in _layers(int(RAIN_LAYERS.check(layers)), density * height * width_px):
        lengths = length * scale * rng.uniform(0.67, 1.33, drops)
        angles = np.radians(angle + 1.5 * rng.standard_normal(drops))
        strengths = opacity * scale**0.5 * rng.uniform(0.25, 1, drops)
        sigma = max(width * scale / 2.355, 0.3)
        # Unit mass a pixel of path, widened to sigma (and by bilinear splatting): this peak makes the centre line 1.
        peak = math.sqrt(2 * math.pi * (sigma**2 + 1 / 6))
        clear *= 1 - _strokes(height, width_px, rng, lengths, angles, strengths * peak, sigma)
    return 1 - clear


def snow_flakes(
    height: int,
    width: int,
    seed: int,
    *,
    density: float,
    size: float,
    angle: float = 0.0,
    drift: float = 3.0,
    opacity: float = 0.95,
    layers: int = 3,
) -> Field:
    """Opacity (height, width) in [0, 1] of flakes in ``layers`` of depth, each flake smeared along its own path.

    Layers as in ``rain_streaks``; within a layer diameters vary by half, paths turn by 25 degrees. A flake is a few
    clumps scattered about its centre, so that no two have the same outline.
    """
    rng = field_generator(seed)
    clear = np.ones((height, width), dtype=np.float32)
    for scale, flakes in _layers(int(SNOW_LAYERS.check(layers)), density * height * width):
        # Three classes of size in a layer: a blur has one width, and snow of a single size looks like a pattern.
        for factor, share in ((1.0, 0.25), (0.7, 0.35), (0.45, 0.4)):
            some = round(flakes * share)
            diameter = size * scale * factor
            sigma = max(diameter / 5, 0.45)
            lengths = np.maximum(drift * scale * rng.uniform(0.5, 1.5, some), 0.05)
            angles = np.radians(angle + 25 * rng.standard_normal(some))
            # The nearest flakes are out of focus, so they let the background through.
            strengths = (1 - 0.45 * scale * factor) * rng.uniform(0.6, 1.2, some)
            # Mass of a path whose middle, blurred and spread over its clumps, reaches 1 before opacity.
            spread = 2 * math.pi * (sigma**2 + (diameter / 6) ** 2 + 1 / 6)
            masses = (spread + np.sqrt(spread) * lengths) / lengths
            clump = (_CLUMPS, diameter / 6)
            field = _strokes(height, width, rng, lengths, angles, strengths * masses, sigma, clump=clump)
            clear *= 1 - np.float32(opacity) * field
    return 1 - clear


def procedural_depth(
    height: int,
    width: int,
    seed: int,
    *,
    near: float = 0.1,
    far: float = 1.0,
    horizon: float = 0.2,
    relief: float = 0.4,
) -> Field:
    """A plausible depth map (height, width) from ``near`` to ``far`` for a picture that has none.

    A ground plane seen in perspective, whose depth grows as one over the distance below the horizon and is ``far``
    above it, tilted by up to 10 degrees, mixed with smooth fractal noise of three octaves (``relief``) that stands
    for objects. It knows nothing of the picture: what varies is how dense the haze is where, as a network must
    expect. A horizon outside [0, 1] gives crops without sky or without ground.
    """
    if far < near:
        raise ValueError(f"far = {far:g}: must not be smaller than near = {near:g}")
    rng = field_generator(seed)
    tilt = math.radians(rng.uniform(-10, 10))
    rows = (np.arange(height, dtype=np.float32) + 0.5) / height
    across = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height
    below = (rows[:, None] - horizon) + math.tan(tilt) * across[None, :]
    # The distance of a plane is one over the drop below the horizon; rounded off, so that no edge shows there.
    closest = 0.12
    plane = closest / np.sqrt(np.maximum(below, 0) ** 2 + closest**2)
    noise = np.zeros((height, width), dtype=np.float32)
    for octave in range(3):
        cells = 2 ** (octave + 1) + 1
        grid = rng.uniform(0, 1, (cells, cells)).astype(np.float32)
        noise += 0.5**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = np.clip(noise / 1.75, 0, 1)
    return (near + (far - near) * np.clip((1 - relief) * plane + relief * noise, 0, 1)).astype(np.float32)


def _layers(layers: int, total: float) -> list[tuple[float, int]]:
    """(apparent scale, number of particles) from the nearest layer to the farthest; numbers add up to ``total``."""
    scales = [LAYER_RATIO**layer for layer in range(layers)]
    shares = [1 / scale**2 for scale in scales]
    return [(scale, round(total * share / sum(shares))) for scale, share in zip(scales, shares, strict=True)]


def _strokes(
    height: int,
    width: int,
    rng: np.random.Generator,
    lengths: NDArray[np.float64],
    angles: NDArray[np.float64],
    strengths: NDArray[np.float64],
    sigma: float,
    clump: tuple[int, float] = (1, 0.0),
) -> Field:
    """Straight strokes at random places, splatted bilinearly and widened by a Gaussian; values in [0, 1].

    ``strengths`` is the mass a pixel of path; places reach beyond the picture, so that strokes enter it from outside.
    ``clump``: (pieces, deviation in px): each stroke is split into parallel pieces scattered about its centre.
    """
    field = np.zeros((height, width), dtype=np.float32)
    if not len(lengths):
        return field
    margin = float(lengths.max())
    # The margin takes its part of the particles too: the density inside stays what was asked for.
    extra = (height + margin) * (width + margin) / (height * width)
    repeats = rng.integers(0, len(lengths), round(len(lengths) * (extra - 1)))
    chosen = np.concatenate([np.arange(len(lengths)), repeats])
    lengths, angles, strengths = lengths[chosen], angles[chosen], strengths[chosen]
    y = rng.uniform(-margin / 2, height + margin / 2, len(chosen))
    x = rng.uniform(-margin / 2, width + margin / 2, len(chosen))
    pieces, deviation = clump
    if pieces > 1:
        lengths, angles, strengths = (np.repeat(one, pieces) for one in (lengths, angles, strengths / pieces))
        y = np.repeat(y, pieces) + deviation * rng.standard_normal(len(lengths))
        x = np.repeat(x, pieces) + deviation * rng.standard_normal(len(lengths))
    points = max(2, math.ceil(margin))
    along = (np.arange(points) + 0.5) / points - 0.5
    taper = 1 - (2 * np.abs(along)) ** 3
    py = y[:, None] + np.cos(angles)[:, None] * lengths[:, None] * along
    px = x[:, None] - np.sin(angles)[:, None] * lengths[:, None] * along
    mass = (strengths * lengths / points)[:, None] * taper
    inside = (py >= 0) & (py < height - 1) & (px >= 0) & (px < width - 1)
    py, px, mass = py[inside], px[inside], mass[inside]
    top, left = py.astype(np.int64), px.astype(np.int64)
    fy, fx = py - top, px - left
    corner = top * width + left
    places = np.concatenate([corner, corner + 1, corner + width, corner + width + 1])
    shares = np.concatenate([mass * (1 - fy) * (1 - fx), mass * (1 - fy) * fx, mass * fy * (1 - fx), mass * fy * fx])
    field = np.bincount(places, shares, minlength=height * width).astype(np.float32).reshape(height, width)
    return np.minimum(cv2.GaussianBlur(field, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.float32(1))


def _lay_over(x: Tensor, opacities: list[Field], light: Tensor) -> Tensor:
    opacity = torch.from_numpy(np.stack(opacities)[:, None]).to(x)
    return x + opacity * (light - x).clamp_min(0)


def _veiled(x: Tensor, veil: Tensor, airlight: Tensor) -> Tensor:
    return x * (1 - veil) + airlight * veil
