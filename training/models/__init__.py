"""The networks. A model is its config: ``build_model(config)`` makes it, ``config.name`` says which it is.

Every network is called as ``model(image, variant)`` with pictures NCHW in [0, 1]; where ``variants_of`` gives
``("default",)`` alone, the variant may be left out.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from training.models.compilation import compile_blocks
from training.models.dynet import DyNet, DyNetConfig
from training.models.edsr import EDSR, MDSR, EDSRConfig, MDSRConfig
from training.models.mzsr import MZSR, MZSRConfig
from training.models.promptir import PromptIR, PromptIRConfig

__all__ = [
    "EDSR",
    "MDSR",
    "MZSR",
    "DyNet",
    "DyNetConfig",
    "EDSRConfig",
    "MDSRConfig",
    "MZSRConfig",
    "ModelConfig",
    "PromptIR",
    "PromptIRConfig",
    "build_model",
    "compile_blocks",
    "scale_of",
    "variants_of",
]

ModelConfig = Annotated[
    DyNetConfig | PromptIRConfig | EDSRConfig | MDSRConfig | MZSRConfig, Field(discriminator="name")
]

_NETWORKS: dict[str, Callable[[Any], nn.Module]] = {
    "dynet": DyNet,
    "promptir": PromptIR,
    "edsr": EDSR,
    "mdsr": MDSR,
    "mzsr": MZSR,
}


def build_model(config: ModelConfig) -> nn.Module:
    """A freshly initialised network, float32, in training mode, on torch's default device."""
    return _NETWORKS[config.name](config)


def variants_of(config: ModelConfig) -> tuple[str, ...]:
    """Names of the variants that one set of weights holds, in the order of the config."""
    if isinstance(config, DyNetConfig):
        return tuple(config.variants)
    if isinstance(config, MDSRConfig):
        return tuple(f"x{scale}" for scale in config.scales)
    return ("default",)


def scale_of(config: ModelConfig, variant: str = "default") -> int:
    """Side of the output over side of the input. MDSR's depends on the variant.

    MZSR counts as 1: its input is the picture enlarged already.

    Raises:
        ValueError: MDSR, and ``variant`` is none of its scales.
    """
    if isinstance(config, EDSRConfig):
        return config.scale
    if isinstance(config, MDSRConfig):
        for scale in config.scales:
            if variant == f"x{scale}":
                return scale
        raise ValueError(f"MDSR: unknown variant {variant!r}; allowed: {', '.join(variants_of(config))}")
    return 1
