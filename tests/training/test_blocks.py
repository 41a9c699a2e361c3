"""The parts of DyNet and PromptIR against their equations, output and gradients."""

import pytest
import torch
from torch import nn

from tests.training import plain
from tests.training.networks import assert_equals_plain
from training.models.blocks import GDFN, MDTA, LayerNorm, PromptBlock, TransformerBlock, apply_blocks


def blocks() -> dict[str, tuple[nn.Module, object, int]]:
    torch.manual_seed(0)
    prompt = {"prompt_channels": 12, "length": 5, "size": 5, "heads": 4, "expansion": 2.66}
    return {
        "layer-norm": (LayerNorm(12), plain.layer_norm, 12),
        "mdta-1-head": (MDTA(12, 1), plain.mdta, 12),
        "mdta-4-heads": (MDTA(24, 4), plain.mdta, 24),
        "gdfn": (GDFN(12, 2.66), plain.gdfn, 12),
        "block": (TransformerBlock(24, 2, 2.66), plain.transformer_block, 24),
        "prompt-block": (PromptBlock(12, 6, **prompt), plain.prompt_block, 12),
        "smoothed-prompt-block": (PromptBlock(12, 6, **prompt, smooth=True), plain.prompt_block, 12),
    }


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("size", [(8, 6), (5, 7), (1, 1)], ids=str)
def test_block_equals_its_equations(name: str, layout: torch.memory_format, size: tuple[int, int]) -> None:
    block, reference, channels = blocks()[name]
    with torch.no_grad():
        for p in block.parameters():
            p += 0.2 * torch.randn_like(p)  # temperatures and norms start at 1 and 0, which hides mistakes
    x = torch.randn(2, channels, *size).to(memory_format=layout)
    if size == (1, 1):
        # At a single pixel every cosine is 1 or -1 whatever the query, and float32 leaves of its slope only rounding.
        x, block = x.double(), block.double()
    x.requires_grad_()
    assert_equals_plain(block, x, block(x), reference, 1e-9 if size == (1, 1) else 1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("heads", [1, 4])
def test_bfloat16_autocast_is_within_two_percent(heads: int, recompute: bool) -> None:
    """Of the equations in float32: each result's root mean square error over its root mean square.

    bfloat16 rounds by 0.2 %. Published width of level 1, a size with a border, a backward pass inside autocast too.
    """
    torch.manual_seed(0)
    block, x = TransformerBlock(48, heads, 2.66), torch.randn(2, 48, 15, 17, requires_grad=True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    weights = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    expected = plain.transformer_block(weights, x)
    expected.backward(direction)
    reference, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_blocks([block], x, recompute=recompute)
        (out.float() * direction).sum().backward()
    found = {name: p.grad for name, p in block.named_parameters()} | {"input": x.grad, "output": out.detach()}
    right = {name: w.grad for name, w in weights.items()} | {"input": reference, "output": expected.detach()}
    for name, value in found.items():
        assert (value - right[name]).norm() <= 0.02 * right[name].norm(), name


def test_a_second_derivative_is_refused() -> None:
    """Rather than being wrong: the backward passes are written out once."""
    block, x = TransformerBlock(8, 1, 2.0), torch.randn(1, 8, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("channels", [8, 24])
def test_pixels_of_zeros_give_no_nan(channels: int) -> None:
    """A length of zero is taken as 1e-12, and has no slope."""
    block, x = MDTA(channels, 2), torch.zeros(1, channels, 4, 4, requires_grad=True)
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *block.parameters()))


def test_a_block_compiles_as_one_graph_forward_and_backward() -> None:
    """The block is the unit to compile: every variant repeats it. aot_eager leaves out only the code generation."""
    block, reference, channels = blocks()["block"]
    x = torch.randn(2, channels, 8, 6, requires_grad=True)
    assert_equals_plain(block, x, torch.compile(block, backend="aot_eager", fullgraph=True)(x), reference)
