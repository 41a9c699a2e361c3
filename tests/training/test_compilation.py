"""Blocks compiled by region: one graph a shape, none more when the variant changes, the same numbers."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.training.networks import CONFIGS, assert_close, built, picture
from tests.training.test_models import Counting
from training.models import compile_blocks, variants_of
from training.models.blocks import TransformerBlock

GAINS = CONFIGS["dynet"].model_copy(update={"variant_gains": True})


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_together_checkpointed_and_without_gradients() -> None:
    """The ways a training run calls a network: no graph for one is made twice."""
    config = CONFIGS["dynet"].model_copy(update={"checkpoint_levels": (1, 2, 3, 4), "prompts": "none"})
    model, image, counted = built(config), picture(config, 32, 32), Counting()
    expected = gradients(model, sum(model(image, variants=["small", "large"])))
    compile_blocks(model, backend=counted)
    for _ in range(2):
        found = gradients(model, sum(model(image, variants=["small", "large"])))
    assert counted.graphs == 5
    for name, slope in expected.items():
        assert_close(found[name], slope, 1e-5)
    with torch.no_grad():
        for variant in variants_of(config):
            model.eval()(image, variant)
    assert counted.graphs == 10


@pytest.mark.slow
def test_generated_code_computes_the_block() -> None:
    """Inductor's own code, float32; ``test_blocks.py`` has the gradients of what it is made from."""
    torch.manual_seed(0)
    block, x = TransformerBlock(16, 2, 2.0), torch.randn(2, 16, 9, 13)
    with torch.no_grad():
        expected = block(x)
        compile_blocks(block)
        assert_close(block(x), expected, 1e-5)
