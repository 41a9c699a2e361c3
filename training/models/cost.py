"""What a network costs for a picture of a given size, counted on the meta device: nothing is computed or stored."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.models import ModelConfig, build_model
from training.models.blocks import MDTA
from training.models.inputs import Variant


@dataclass(frozen=True)
class Cost:
    """Weights, and multiply-accumulates for one picture; one MAC is two FLOPs.

    ``convolution_macs`` holds the convolutions and the few linear layers: the count that papers print, which at
    224x224 is the 242 GFLOPs quoted for DyNet-L and PromptIR. ``attention_macs`` holds the two matrix products
    of every MDTA that such counts leave out.
    """

    parameters: int
    convolution_macs: int
    attention_macs: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.convolution_macs + self.attention_macs


def count_cost(config: ModelConfig, variant: Variant, height: int, width: int) -> Cost:
    """Count a variant's cost for one input picture of ``height`` x ``width`` pixels.

    The operations counted are the published ones: each head's own attention matrix, and the projection behind
    it as a 1x1 convolution at full resolution.

    Raises:
        ValueError: the model has no such variant.
    """
    with torch.device("meta"):
        model = build_model(config)
        image = torch.empty(1, config.channels, height, width)
    macs = {"convolution": 0, "attention": 0}

    def convolution(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        macs["convolution"] += output.numel() * module.weight[0].numel()

    def linear(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        macs["convolution"] += output.numel() * module.in_features

    def attention(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, MDTA)
        channels = output.shape[1]
        macs["convolution"] += output.numel() * channels
        macs["attention"] += 2 * output.numel() * channels // module.heads

    hooks = {nn.Conv2d: convolution, nn.Linear: linear, MDTA: attention}
    for module in model.modules():
        if type(module) in hooks:
            module.register_forward_hook(hooks[type(module)])
    with torch.no_grad():
        model(image, variant)
    return Cost(sum(p.numel() for p in model.parameters()), macs["convolution"], macs["attention"])
