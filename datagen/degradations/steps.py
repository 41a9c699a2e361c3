"""Every step a recipe can name: its function, its parameters, and how drawn parameters become recorded ones."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from datagen.degradations import blur, jpeg, kernels, mask, resample, sensor, weather
from datagen.degradations.checks import Option, Parameter
from datagen.degradations.kernels import mzsr_variances

Values = dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """What a step may need to know about the picture while its parameters are drawn: sizes in pixels, and whether it
    comes with a depth map."""

    height: int
    width: int
    output_height: int
    output_width: int
    depth: bool = False


@dataclass(frozen=True)
class StepType:
    """A step: ``apply(x, **values)``, the parameters a recipe may give, and what else it needs.

    ``seeded``: it draws a random field from a recorded ``seed``. ``needs_clean``: ``apply`` takes the clean image
    as its second argument. ``resolve`` turns drawn values into (name, values) of the step that is recorded and run;
    without it they are the same. ``apply_at``: takes the depth map (N, 1, H, W) as its second argument, and runs in
    place of ``apply`` where the record says ``depth: given``.
    """

    apply: Callable[..., Tensor] | None
    parameters: tuple[Parameter | Option, ...] = ()
    seeded: bool = False
    needs_clean: bool = False
    resolve: Callable[[Values, np.random.Generator, Frame], tuple[str, Values]] | None = None
    apply_at: Callable[..., Tensor] | None = None

    def named(self) -> Mapping[str, Parameter | Option]:
        return {parameter.name: parameter for parameter in self.parameters}


def _resolve_resize(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    factor, relative_to = values.pop("factor"), values.pop("relative_to")
    to_output = relative_to == "output"
    height, width = (frame.output_height, frame.output_width) if to_output else (frame.height, frame.width)
    # A patch of a few pixels holds nothing that a later step could work on.
    size = {"height": max(8, round(height * factor)), "width": max(8, round(width * factor))}
    return "resize", values | size


def _resolve_output(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    return "resize", values | {"height": frame.output_height, "width": frame.output_width}


def _resolve_mzsr(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    var1, var2, theta = mzsr_variances(rng, values["scale"])
    sigmas = {"sigma1": math.sqrt(var1), "sigma2": math.sqrt(var2)}
    return "gaussian_blur", {"size": kernels.MZSR_SIZE, **sigmas, "theta": theta}


def _resolve_motion(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    # No point of a path is farther than half its length from its centre of mass.
    return "motion_blur", values | {"size": 2 * math.ceil(values["length"] / 2) + 3}


def _resolve_defocus(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    return "defocus_blur", values | {"size": 2 * math.ceil(values["radius"]) + 1}


def _resolve_haze(values: Values, rng: np.random.Generator, frame: Frame) -> tuple[str, Values]:
    if not frame.depth:
        return "haze", values | {"depth": "procedural"}
    shared = {name: value for name, value in values.items() if name not in ("horizon", "relief")}
    return "haze", shared | {"depth": "given"}


STEPS: dict[str, StepType] = {
    "gaussian_noise": StepType(sensor.gaussian_noise, (sensor.SIGMA, sensor.GREY, sensor.CLIP), seeded=True),
    "poisson_gaussian_noise": StepType(
        sensor.poisson_gaussian_noise, (sensor.SHOT, sensor.READ, sensor.GREY, sensor.CLIP), seeded=True
    ),
    "speckle_noise": StepType(sensor.speckle_noise, (sensor.SIGMA, sensor.CLIP), seeded=True),
    "low_light": StepType(sensor.low_light, (sensor.GAMMA, sensor.GAIN, sensor.SCALE)),
    "quantise": StepType(sensor.quantise),
    "jpeg": StepType(jpeg.jpeg, (jpeg.QUALITY, jpeg.SUBSAMPLING)),
    "gaussian_blur": StepType(
        blur.gaussian_blur, (kernels.SIZE, blur.SIGMA1, blur.SIGMA2, blur.THETA, kernels.SHAPE, kernels.BETA)
    ),
    "mzsr_blur": StepType(None, (kernels.MZSR_SCALE,), resolve=_resolve_mzsr),
    "motion_blur": StepType(
        blur.motion_blur, (kernels.LENGTH, kernels.ANGLE, kernels.WANDER), seeded=True, resolve=_resolve_motion
    ),
    "defocus_blur": StepType(blur.defocus_blur, (kernels.RADIUS,), resolve=_resolve_defocus),
    "sinc_blur": StepType(blur.sinc_blur, (kernels.CUTOFF, kernels.SIZE)),
    "resize": StepType(
        resample.resize,
        (resample.FACTOR, resample.FILTER, resample.ANTIALIAS, resample.RELATIVE_TO),
        resolve=_resolve_resize,
    ),
    "resize_to_output": StepType(None, (resample.FILTER, resample.ANTIALIAS), resolve=_resolve_output),
    "downsample_direct": StepType(resample.downsample_direct, (resample.SUBSAMPLING,)),
    "rain": StepType(
        weather.rain,
        (
            weather.STREAK_DENSITY,
            weather.STREAK_LENGTH,
            weather.STREAK_ANGLE,
            weather.STREAK_WIDTH,
            weather.RAIN_OPACITY,
            weather.RAIN_LAYERS,
            weather.LIGHT,
            weather.VEIL,
            weather.AIRLIGHT,
        ),
        seeded=True,
    ),
    "haze": StepType(
        weather.procedural_haze,
        (weather.BETA, weather.HAZE_AIRLIGHT, weather.NEAR, weather.FAR, weather.HORIZON, weather.RELIEF),
        seeded=True,
        resolve=_resolve_haze,
        apply_at=weather.haze_at,
    ),
    "snow": StepType(
        weather.snow,
        (
            weather.FLAKE_DENSITY,
            weather.FLAKE_SIZE,
            weather.STREAK_ANGLE,
            weather.DRIFT,
            weather.SNOW_OPACITY,
            weather.SNOW_LAYERS,
            weather.LIGHT,
            weather.VEIL,
            weather.AIRLIGHT,
        ),
        seeded=True,
    ),
    "block_mask": StepType(
        mask.block_mask, (mask.MASKED, mask.RESTORED, mask.BLOCK, mask.FILL), seeded=True, needs_clean=True
    ),
}
