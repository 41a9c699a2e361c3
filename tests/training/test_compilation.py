"""Blocks compiled by region: one graph a shape, none more when the variant changes, the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.test_models import CONFIGS, assert_close, built, depths_of, picture
from training.models import ModelConfig, compile_blocks, variants_of
from training.models.blocks import TransformerBlock

GAINS = CONFIGS["dynet"].model_copy(update={"variant_gains": True})


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs a graph as it was captured, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


def gradients(model: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        # Shapes: levels 1 to 3 and the latent, level 1 of the decoder (as the refinement), and three prompt blocks.
        (CONFIGS["dynet"], 8),
        # Level 1 of the decoder has gains, and the refinement none.
        (GAINS, 9),
        (CONFIGS["promptir"], 8),
        (CONFIGS["edsr-x2"], 1),
        # The trunk's blocks, and those of 5x5 before it.
        (CONFIGS["mdsr"], 2),
        (CONFIGS["mzsr"], 0),
    ],
    ids=["dynet", "dynet-gains", "promptir", "edsr", "mdsr", "mzsr"],
)
def test_a_graph_for_each_shape_and_none_for_a_variant(config: ModelConfig, graphs: int) -> None:
    model, image, counted = built(config), picture(config, 32, 32), Counting()
    names, found, expected = list(model.state_dict()), {}, {}
    for variant in depths_of(config):
        expected[str(variant)] = (out := model(image, variant)).detach(), gradients(model, out)
    compile_blocks(model, backend=counted)
    assert list(model.state_dict()) == names
    for number, variant in enumerate(depths_of(config)):
        found[str(variant)] = (out := model(image, variant)).detach(), gradients(model, out)
        assert counted.graphs == graphs, f"after {number + 1} variants"
    for variant, (out, slopes) in expected.items():
        assert_close(found[variant][0], out, 1e-6)
        for name, slope in slopes.items():
            assert_close(found[variant][1][name], slope, 1e-5)


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
    """Inductor's own code, forward and backward, float32."""
    torch.manual_seed(0)
    block, x = TransformerBlock(16, 2, 2.0), torch.randn(2, 16, 9, 13, requires_grad=True)
    expected = block(x)
    slopes = gradients(block, expected)
    compile_blocks(block)
    assert_close((out := block(x)).detach(), expected.detach(), 1e-5)
    for name, slope in gradients(block, out).items():
        assert_close(slope, slopes[name], 1e-5)
