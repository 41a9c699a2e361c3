"""torch.compile by region: the block that a network repeats is the unit, so that every depth runs the same code."""

from collections.abc import Callable
from typing import Any

from torch import nn

from training.models.blocks import TransformerBlock
from training.models.edsr import ResidualBlock

# By default dynamo gives up on a function after eight graphs, and DyNet's blocks alone have eight shapes. This is its
# bound on the graphs of all regions together.
_GRAPHS = 256


def compile_blocks(model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the repeated blocks of ``model`` compiled when they are first called; names of weights stay as they are.

    DyNet and PromptIR: each transformer block, those inside the prompt blocks included. EDSR and MDSR: each residual
    block. MZSR has no block, and its meta-learning takes gradients of gradients, which compiled code does not have:
    nothing is compiled.

    Blocks of one shape share a graph, whatever their number, and the number of repeats is no part of it: a change of
    variant compiles nothing. Sizes are fixed in a graph, because code for open sizes is slower; each new size of
    picture, dtype and mode (with or without gradients) compiles anew. It therefore suits training on patches, and
    tiles of one size, not folders of pictures of any size.

    Args:
        backend: as in ``torch.compile``.
    """
    for module in model.modules():
        if isinstance(module, TransformerBlock | ResidualBlock):
            module.compile(backend=backend, dynamic=False, recompile_limit=_GRAPHS)
