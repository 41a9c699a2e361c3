"""The parts DyNet and PromptIR are built from: Restormer's transformer block, resizing, and the prompt block.

Sources: Restormer (arXiv 2111.09881, section 3) for MDTA and GDFN, PromptIR (arXiv 2306.13090, section 3)
for the prompts; sizes as in the released codes. Every part maps NCHW to NCHW.

The fast paths compute in channels-last memory, where a normalisation over channels and a 1x1 convolution
read each pixel's features in one piece; any other memory layout is accepted and gives the same values.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.models.kept import channel_attention, gated_projection, layer_norm, normed_projection


def _each_once(levels: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(levels)) != len(levels):
        raise ValueError(f"each level at most once, got {list(levels)}")
    return levels


# Left out of what is saved while empty: exports and runs then read as they did before the option was there.
CheckpointLevels = Annotated[
    tuple[Literal[1, 2, 3, 4], ...],
    AfterValidator(_each_once),
    Field(
        exclude_if=lambda levels: not levels,
        description="levels (4 is the latent, 1 takes refinement in) whose blocks keep only their input in training "
        "and are computed anew in the backward pass; weights, outputs and gradients stay as they are. DyNet large, "
        "128x128, batch 1, float32: (1,) keeps 794 MiB instead of 1,858, (1, 2) 421, (1, 2, 3, 4) 108, beside one "
        "block's own activations at a time; a block that is computed anew costs 20 % more CPU time",
    ),
]

# Layer scale [C] of a block's attention and of its feed-forward network.
Gains = tuple[Tensor, Tensor]


def check_heads(channels: int, heads: int, where: str) -> None:
    """Refuse a number of attention heads that does not divide the channels (ValueError naming ``where``)."""
    if channels % heads:
        raise ValueError(f"{where}: {heads} head(s) do not divide its {channels} channels; change heads or channels")


class LayerNorm(nn.Module):
    """Normalise the channels of each pixel to mean 0 and variance 1 (biased, epsilon 1e-5), then scale and shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, in channels-last memory and float32 at least; no copy where ``x`` is both."""
        return _planes(layer_norm(_pixels(x), self.weight, self.bias))


class MDTA(nn.Module):
    """Multi-Dconv-head transposed attention: channels attend to channels (Restormer eq. 1).

    Published form, a head at a time: ``softmax(normalise(Q) normalise(K)^T * temperature) V``, then a 1x1
    projection; Q and K are normalised over all pixels. Two rearrangements, equal in exact arithmetic, save
    passes over full-resolution tensors: the Gram matrix is divided by the norms of its rows and columns
    instead of normalising Q and K, and the projection is multiplied into the small attention matrices.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.qkv_depthwise = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, norm: LayerNorm | None = None, gain: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> the same shape, behind ``norm`` and times ``gain`` [C] where they are given.

        Norms and softmax are float32 at least, also under autocast.
        """
        batch, channels, height, width = x.shape
        qkv = _pixels(self.qkv_depthwise(_planes(_project(_pixels(x), norm, self.qkv.weight.flatten(1)))))
        projection = _scaled(self.project_out.weight.flatten(1), gain)
        out = channel_attention(qkv.reshape(batch, height * width, 3 * channels), self.temperature, projection)
        return _planes(out.view(batch, height, width, channels))


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network (Restormer eq. 2): ``W (gelu(a) * b)``, a and b from 1x1 then 3x3 depthwise.

    The published widths of a and b (127, 255, 510, 1021, ...) leave every row of pixels off the boundaries that
    processors read at. Both are computed with channels of zero weights up to a multiple of 16: the values are the
    same, and half of the depthwise convolution's time is saved.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=False)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor, norm: LayerNorm | None = None, gain: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> the same shape, behind ``norm`` and times ``gain`` [C] where they are given."""
        # A file for other programs stays free of it.
        more = 0 if torch.compiler.is_exporting() else -self.project_out.in_channels % 16
        depthwise = _widened(self.depthwise.weight, more)
        hidden = _planes(_project(_pixels(x), norm, _widened(self.project_in.weight.flatten(1), more)))
        hidden = F.conv2d(hidden, depthwise, padding=1, groups=len(depthwise))
        projection = F.pad(_scaled(self.project_out.weight.flatten(1), gain), (0, more))
        return _planes(gated_projection(_pixels(hidden), projection))


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], a view."""
    return x.permute(0, 2, 3, 1)


def _planes(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W], a view."""
    return x.permute(0, 3, 1, 2)


def _project(x: Tensor, norm: LayerNorm | None, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if norm is None else normed_projection(x, norm.weight, norm.bias, weight)


def _scaled(projection: Tensor, gain: Tensor | None) -> Tensor:
    """A projection [out, in] with its outputs times ``gain`` [out]: no pass over any pixel."""
    return projection if gain is None else projection * gain.view(-1, 1)


def _widened(weight: Tensor, more: int) -> Tensor:
    """[2 D, ...] -> [2 (D + more), ...]: each half of the outputs with ``more`` outputs of zero weights behind it."""
    if not more:
        return weight
    halves = weight.unflatten(0, (2, -1))
    return F.pad(halves, (0, 0) * (weight.dim() - 1) + (0, more)).flatten(0, 1)


class TransformerBlock(nn.Module):
    """MDTA and GDFN, each behind a LayerNorm and a residual connection."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attention = MDTA(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.feed_forward = GDFN(channels, expansion)

    def forward(self, x: Tensor, gains: Gains | None = None) -> Tensor:
        """[N, C, H, W] -> the same shape. ``gains`` scale what attention and feed-forward network add."""
        attention, feed_forward = gains or (None, None)
        x = x + self.attention(x, self.norm1, attention)
        return x + self.feed_forward(x, self.norm2, feed_forward)


def apply_blocks(blocks: Iterable[nn.Module], x: Tensor, *, recompute: bool, gains: Gains | None = None) -> Tensor:
    """``x`` through one block after the other; a block that is given twice is applied twice.

    ``gains``, where given, go to each block; the blocks are then transformer blocks.

    With ``recompute`` and while gradients are recorded, only the input of each block is kept for the backward pass,
    which then computes the block anew (activation checkpointing). It does so with the weights that the block has by
    then: not for ``torch.func.functional_call``, whose weights are gone when it returns.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        # No block draws random numbers, so there is no generator state to keep.
        inputs = (x,) if gains is None else (x, gains)
        x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if recompute else block(*inputs)
    return x


class Downsample(nn.Module):
    """Half the sides, twice the channels: 3x3 convolution C -> C/2, then pixel-unshuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] with even H, W -> [N, 2C, H/2, W/2], channels-last."""
        return F.pixel_unshuffle(self.conv(x), 2).contiguous(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Twice the sides, half the channels: 3x3 convolution C -> 2C, then pixel-shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C/2, 2H, 2W], channels-last."""
        return F.pixel_shuffle(self.conv(x), 2).contiguous(memory_format=torch.channels_last)


class Prompt(nn.Module):
    """Learned feature maps, mixed by what the input looks like (PromptIR's prompt generation module)."""

    def __init__(self, features: int, channels: int, length: int, size: int) -> None:
        super().__init__()
        self.components = nn.Parameter(torch.rand(length, channels, size, size))
        self.mixer = nn.Linear(features, length)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, C, H, W] -> prompt [N, channels, H, W], channels-last."""
        weights = self.mixer(x.mean(dim=(2, 3))).softmax(dim=1)
        mixed = (weights.to(self.components.dtype) @ self.components.flatten(1)).unflatten(1, self.components.shape[1:])
        resized = F.interpolate(mixed, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.conv(resized.contiguous(memory_format=torch.channels_last))


class PromptBlock(nn.Module):
    """Features with their prompt beside them, through one transformer block, then reduced by a 1x1 convolution.

    ``smooth`` adds the 3x3 convolution that the papers' figures draw behind the 1x1 and the released codes lack.
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        *,
        prompt_channels: int,
        length: int,
        size: int,
        heads: int,
        expansion: float,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        self.prompt = Prompt(features, prompt_channels, length, size)
        self.block = TransformerBlock(features + prompt_channels, heads, expansion)
        self.reduce = nn.Conv2d(features + prompt_channels, out_features, 1, bias=False)
        self.smooth = nn.Conv2d(out_features, out_features, 3, padding=1, bias=False) if smooth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, features, H, W] -> [N, out_features, H, W]."""
        return self.smooth(self.reduce(self.block(torch.cat([x, self.prompt(x)], dim=1))))
