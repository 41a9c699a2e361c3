"""MZSR's network: eight 3x3 convolutions that correct an enlarged picture (arXiv 2002.12213, figure 4 and code).

It is small so that it can learn a single picture in a few steps. Meta-training hands it other weights than its
own through ``torch.func.functional_call``; nothing here stands in the way of gradients of gradients or of vmap.
"""

import itertools
import math
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from infra.config import Config
from training.models.inputs import Variant, check_image, check_variant


class MZSRConfig(Config):
    """The defaults are the published network (225,091 weights). The scale belongs to the task, not to the network."""

    name: Literal["mzsr"] = "mzsr"
    layers: int = Field(8, ge=2)
    features: PositiveInt = 64
    channels: int = Field(3, ge=1, le=4)


class MZSR(nn.Module):
    """Convolutions with ReLU between them; their result is added to the input."""

    def __init__(self, config: MZSRConfig) -> None:
        super().__init__()
        self.channels = config.channels
        widths = [config.channels, *[config.features] * (config.layers - 1), config.channels]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                # Variance 1 / fan-in from a normal cut at two sigma, whose own standard deviation is 0.8796.
                sigma = math.sqrt(1 / parameter[0].numel()) / 0.87962566
                nn.init.trunc_normal_(parameter, std=sigma, a=-2 * sigma, b=2 * sigma)

    def forward(self, image: Tensor, variant: Variant = "default") -> Tensor:
        """Sharpen ``image`` [N, channels, H, W], in [0, 1], already enlarged to its final size by cubic interpolation.

        Returns the same shape, not clamped. Raises ValueError for a wrong shape, dtype or channel count.
        """
        check_image(image, self.channels, "MZSR")
        check_variant(variant, ("default",), "MZSR")
        x = image
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return image + self.layers[-1](x)
