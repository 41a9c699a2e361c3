"""The table of networks that tests of ``training.models`` run over, and what they measure with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.config import Config
from training.models import (
    DyNetConfig,
    EDSRConfig,
    MDSRConfig,
    ModelConfig,
    MZSRConfig,
    PromptIRConfig,
    build_model,
    variants_of,
)

# One block and few channels a level: what is left of a test's time is the number of operations.
SMALL_DYNET: dict[str, Any] = {
    "dim": 8,
    "prompt_sizes": (16, 8, 4, 2),
    "variants": {"small": (1, 1, 1, 2), "large": (2, 2, 1, 3)},
    "refinement_blocks": 1,
}
CONFIGS: dict[str, ModelConfig] = {
    "dynet": DyNetConfig(**SMALL_DYNET),
    "dynet-figure": DyNetConfig(**SMALL_DYNET, prompts="figure"),
    "dynet-no-prompts": DyNetConfig(**SMALL_DYNET, prompts="none"),
    "dynet-gains": DyNetConfig(**SMALL_DYNET, variant_gains=True),
    "dynet-grey": DyNetConfig(**SMALL_DYNET | {"refinement_blocks": 0}, channels=1),
    "promptir": PromptIRConfig(
        dim=8, blocks=(1, 2, 1, 1), refinement_blocks=1, prompt_channels=(8, 12, 16), prompt_sizes=(8, 4, 2)
    ),
    "edsr-x2": EDSRConfig(blocks=2, features=8),
    "edsr-x3": EDSRConfig(blocks=2, features=8, scale=3, residual_scale=0.1),
    "edsr-x4": EDSRConfig(blocks=2, features=8, scale=4),
    "edsr-grey": EDSRConfig(blocks=2, features=8, channels=1, mean=(0.5,)),
    "mdsr": MDSRConfig(blocks=2, features=8),
    "mzsr": MZSRConfig(features=16),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


class Stage(Config):
    """As a stage holds a model, for errors that name the key."""

    model: ModelConfig


def built(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("gains."):
                p += 0.3 * torch.randn_like(p)  # as they are made, at 1, they would hide a mistake
    return model


def depths_of(config: ModelConfig) -> tuple[str | list[int], ...]:
    """Every variant, and for DyNet a vector that none of them has."""
    return (*variants_of(config), *([[1, 3, 1, 2]] if isinstance(config, DyNetConfig) else []))


def picture(config: ModelConfig, height: int = 24, width: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, config.channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Largest difference at most ``bound`` of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


def assert_equals_plain(model: nn.Module, x: Tensor, found: Tensor, expected_of: object, bound: float = 1e-5) -> None:
    """Output and every gradient, each relative to its largest value."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = expected_of(weights, reference)
    assert_close(found.detach(), expected.detach(), bound)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad}
    for name, gradient in gradients.items():
        target = reference.grad if name == "input" else weights[name].grad
        assert (gradient - target).abs().max() <= bound * target.abs().max(), name
