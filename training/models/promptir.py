"""PromptIR (arXiv 2306.13090), the baseline that DyNet is compared with: the same blocks, none of them shared.

Each level has as many blocks as DyNet's large variant has repeats, and the prompts of levels 3 and 2 stand
behind the decoder's levels instead of on the skips.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from infra.config import Config
from training.models.blocks import (
    CheckpointLevels,
    Downsample,
    PromptBlock,
    TransformerBlock,
    Upsample,
    apply_blocks,
    check_heads,
)
from training.models.inputs import Variant, check_image, check_variant, pad_to_multiple

# Three halvings between the input and the latent.
STRIDE = 8


class PromptIRConfig(Config):
    """The defaults are the published network (35.377 M weights, none of them idle)."""

    name: Literal["promptir"] = "promptir"
    channels: int = Field(3, ge=1, le=4)
    dim: PositiveInt = Field(48, multiple_of=2, description="channels at level 1; they double at each level below")
    blocks: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (4, 6, 6, 8)
    heads: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 2, 4, 8)
    expansion: float = Field(2.66, gt=0)
    refinement_blocks: int = Field(4, ge=0)
    prompt_length: PositiveInt = 5
    prompt_channels: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (64, 128, 320), description="behind decoder level 2, behind decoder level 3, on the latent"
    )
    prompt_sizes: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 32, 16)
    prompt_heads: PositiveInt = 4
    checkpoint_levels: CheckpointLevels = ()

    @model_validator(mode="after")
    def _heads_divide(self) -> "PromptIRConfig":
        for level, heads in enumerate(self.heads):
            check_heads(self.dim << level, heads, f"heads: level {level + 1}")
        for level, prompt in enumerate(self.prompt_channels, start=1):
            check_heads((self.dim << level) + prompt, self.prompt_heads, f"prompt_heads: prompt at level {level + 1}")
        return self


class PromptIR(nn.Module):
    """See ``PromptIRConfig``."""

    def __init__(self, config: PromptIRConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.checkpoint_levels = frozenset(config.checkpoint_levels)
        dim, blocks, heads = config.dim, config.blocks, config.heads

        def stack(channels: int, heads: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(TransformerBlock(channels, heads, config.expansion) for _ in range(count)))

        def prompt_block(features: int, out_features: int, index: int) -> PromptBlock:
            return PromptBlock(
                features,
                out_features,
                prompt_channels=config.prompt_channels[index],
                length=config.prompt_length,
                size=config.prompt_sizes[index],
                heads=config.prompt_heads,
                expansion=config.expansion,
            )

        self.embed = nn.Conv2d(config.channels, dim, 3, padding=1, bias=False)
        self.encoder1 = stack(dim, heads[0], blocks[0])
        self.down1_2 = Downsample(dim)
        self.encoder2 = stack(2 * dim, heads[1], blocks[1])
        self.down2_3 = Downsample(2 * dim)
        self.encoder3 = stack(4 * dim, heads[2], blocks[2])
        self.down3_4 = Downsample(4 * dim)
        self.latent = stack(8 * dim, heads[3], blocks[3])
        self.prompt_latent = prompt_block(8 * dim, 4 * dim, 2)
        self.up4_3 = Upsample(4 * dim)
        self.fuse3 = nn.Conv2d(6 * dim, 4 * dim, 1, bias=False)
        self.decoder3 = stack(4 * dim, heads[2], blocks[2])
        self.prompt_decoder3 = prompt_block(4 * dim, 4 * dim, 1)
        self.up3_2 = Upsample(4 * dim)
        self.fuse2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder2 = stack(2 * dim, heads[1], blocks[1])
        self.prompt_decoder2 = prompt_block(2 * dim, 2 * dim, 0)
        self.up2_1 = Upsample(2 * dim)
        self.decoder1 = stack(2 * dim, heads[0], blocks[0])
        self.refinement = stack(2 * dim, heads[0], config.refinement_blocks)
        self.output = nn.Conv2d(2 * dim, config.channels, 3, padding=1, bias=False)

    def forward(self, image: Tensor, variant: Variant = "default") -> Tensor:
        """Restore ``image`` [N, channels, H, W], floating point in [0, 1], any H and W.

        Returns the same shape, not clamped. Raises ValueError for a wrong shape, dtype or channel count.
        """
        check_image(image, self.channels, "PromptIR")
        check_variant(variant, ("default",), "PromptIR")
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, STRIDE).contiguous(memory_format=torch.channels_last)

        skip1 = self._blocks(1, self.encoder1, self.embed(padded))
        skip2 = self._blocks(2, self.encoder2, self.down1_2(skip1))
        skip3 = self._blocks(3, self.encoder3, self.down2_3(skip2))
        x = self._blocks(4, self.latent, self.down3_4(skip3))

        x = self._blocks(4, [self.prompt_latent], x)
        x = self.fuse3(torch.cat([self.up4_3(x), skip3], dim=1))
        x = self._blocks(3, [*self.decoder3, self.prompt_decoder3], x)
        x = self.fuse2(torch.cat([self.up3_2(x), skip2], dim=1))
        x = self._blocks(2, [*self.decoder2, self.prompt_decoder2], x)
        x = torch.cat([self.up2_1(x), skip1], dim=1)
        x = self._blocks(1, [*self.decoder1, *self.refinement], x)
        return (self.output(x) + padded)[..., :height, :width]

    def _blocks(self, level: int, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        return apply_blocks(blocks, x, recompute=self.training and level in self.checkpoint_levels)
