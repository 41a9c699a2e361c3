"""EDSR and MDSR: super-resolution by residual blocks without batch norm and a sub-pixel upsampler (arXiv 1707.02921).

Pictures go in and come out in [0, 1]. Inside, both networks work on the published scale: values times
``image_range`` (255) with the mean colour of DIV2K taken off, so that published weights and learning rates apply.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from infra.config import Config
from training.models.inputs import Variant, check_image, check_variant

Scale = Literal[2, 3, 4]


class _ResidualNetConfig(Config):
    blocks: PositiveInt = Field(16, description="residual blocks of the trunk: 16 in the baselines, 32 EDSR, 80 MDSR")
    features: PositiveInt = Field(64, description="channels of the trunk: 64 in the baselines and MDSR, 256 EDSR")
    residual_scale: float = Field(
        1.0, gt=0, description="factor on each block's residual: 1 in the baselines, 0.1 EDSR"
    )
    channels: int = Field(3, ge=1, le=4)
    mean: tuple[float, ...] = Field((0.4488, 0.4371, 0.4040), description="colour taken off the input, one per channel")
    image_range: float = Field(255.0, gt=0, description="value of white inside the network")

    @model_validator(mode="after")
    def _mean_per_channel(self) -> "_ResidualNetConfig":
        if len(self.mean) != self.channels:
            raise ValueError(f"mean: expected {self.channels} value(s), one per channel, got {len(self.mean)}")
        return self


class EDSRConfig(_ResidualNetConfig):
    """EDSR; the defaults are the x2 baseline (1,369,859 weights). Full: 32 blocks, 256 features, residual scale 0.1."""

    name: Literal["edsr"] = "edsr"
    scale: Scale = 2


class MDSRConfig(_ResidualNetConfig):
    """MDSR; the defaults are the baseline (3,227,203 weights). The full model has 80 blocks."""

    name: Literal["mdsr"] = "mdsr"
    scales: tuple[Scale, ...] = Field((2, 3, 4), min_length=1, description="each is a variant: x2, x3, x4")

    @model_validator(mode="after")
    def _scales_once(self) -> "MDSRConfig":
        if len(set(self.scales)) != len(self.scales):
            raise ValueError(f"scales: each at most once, got {list(self.scales)}")
        return self


class EDSR(nn.Module):
    """Head, residual trunk with a skip around it, upsampler, tail (paper, figure 3)."""

    def __init__(self, config: EDSRConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.colour = _ColourShift(config)
        self.head = _conv3x3(config.channels, config.features)
        self.trunk = _trunk(config)
        self.upsampler = _upsampler(config.features, config.scale)
        self.tail = _conv3x3(config.features, config.channels)

    def forward(self, image: Tensor, variant: Variant = "default") -> Tensor:
        """Enlarge ``image`` [N, channels, H, W], floating point in [0, 1], to [N, channels, scale H, scale W].

        Not clamped. Raises ValueError for a wrong shape, dtype or channel count.
        """
        check_image(image, self.colour.channels, "EDSR")
        check_variant(variant, ("default",), "EDSR")
        x = self.head(self.colour.inward(image))
        return self.colour.outward(self.tail(self.upsampler(x + self.trunk(x))))


class MDSR(nn.Module):
    """One trunk for several scales; each has its own pre-processing and upsampler (paper, figure 5).

    The last convolution is shared by the scales, as in the authors' PyTorch code.
    """

    def __init__(self, config: MDSRConfig) -> None:
        super().__init__()
        self.colour = _ColourShift(config)
        self.head = _conv3x3(config.channels, config.features)
        self.preprocess = nn.ModuleDict(
            {
                f"x{scale}": nn.Sequential(
                    *(ResidualBlock(config.features, 5, config.residual_scale) for _ in range(2))
                )
                for scale in config.scales
            }
        )
        self.trunk = _trunk(config)
        self.upsampler = nn.ModuleDict({f"x{scale}": _upsampler(config.features, scale) for scale in config.scales})
        self.tail = _conv3x3(config.features, config.channels)

    def forward(self, image: Tensor, variant: Variant) -> Tensor:
        """Enlarge ``image`` [N, channels, H, W], floating point in [0, 1], by the variant's scale ("x2", "x3", "x4").

        Not clamped. Raises ValueError for a wrong shape, dtype, channel count or variant.
        """
        check_image(image, self.colour.channels, "MDSR")
        check_variant(variant, tuple(self.upsampler), "MDSR")
        x = self.preprocess[str(variant)](self.head(self.colour.inward(image)))
        return self.colour.outward(self.tail(self.upsampler[str(variant)](x + self.trunk(x))))


def branch_of(parameter: str) -> str:
    """The scale ("x3") that alone uses the weight of this name in an MDSR; empty for what all of them use."""
    parts = parameter.split(".")
    return parts[1] if len(parts) > 2 and parts[0] in ("preprocess", "upsampler") and parts[1].startswith("x") else ""


class _ColourShift(nn.Module):
    """[0, 1] to the scale of the weights and back. The mean is data of the config, not of a checkpoint."""

    mean: Tensor

    def __init__(self, config: _ResidualNetConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.range = config.image_range
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)

    def inward(self, image: Tensor) -> Tensor:
        return ((image - self.mean) * self.range).contiguous(memory_format=torch.channels_last)

    def outward(self, x: Tensor) -> Tensor:
        # Half precision would round the picture itself to 8 bits of mantissa; the sum is made in the mean's precision.
        return x.to(self.mean.dtype) / self.range + self.mean


class ResidualBlock(nn.Module):
    """Two convolutions with a ReLU between them, scaled and added to the input."""

    def __init__(self, features: int, kernel: int, residual_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(features, features, kernel, padding=kernel // 2)
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> Tensor:
        """[N, features, H, W] -> the same shape."""
        return torch.add(x, self.conv2(F.relu(self.conv1(x), inplace=True)), alpha=self.residual_scale)


def _conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def _trunk(config: _ResidualNetConfig) -> nn.Sequential:
    blocks = (ResidualBlock(config.features, 3, config.residual_scale) for _ in range(config.blocks))
    return nn.Sequential(*blocks, _conv3x3(config.features, config.features))


def _upsampler(features: int, scale: int) -> nn.Sequential:
    """Sub-pixel convolution: one stage of 3, or a stage of 2 for each doubling."""
    factors = [3] if scale == 3 else [2] * int(math.log2(scale))
    stages = ([_conv3x3(features, factor**2 * features), nn.PixelShuffle(factor)] for factor in factors)
    return nn.Sequential(*(layer for stage in stages for layer in stage))
