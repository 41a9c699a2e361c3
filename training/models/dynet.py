"""DyNet: one set of weights, any depth (arXiv 2404.02154).

A four-level encoder-decoder of Restormer blocks with one block a level, applied as often as the variant says.
The same weights serve every depth, so a variant is an argument of ``forward`` and not another model.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from infra.config import Config
from training.models.blocks import (
    CheckpointLevels,
    Downsample,
    Gains,
    PromptBlock,
    TransformerBlock,
    Upsample,
    apply_blocks,
    check_heads,
)
from training.models.inputs import Variant, check_image, pad_to_multiple

# Three halvings between the input and the latent.
STRIDE = 8

Depth = tuple[int, int, int, int]


class DyNetConfig(Config):
    """What a DyNet is made of. The defaults are the published network (16.613 M weights, none of them idle).

    ``prompts`` is ``released`` (on the latent and on the skips of levels 3 and 2, as the released code has it),
    ``figure`` (as the paper draws it: a fourth prompt on the skip of level 1, a 3x3 convolution behind each
    prompt block, and a 1x1 fusion that lets level 1 of the decoder run at ``dim`` channels) or ``none`` (a
    1x1 convolution stands for the block on the latent, the skips pass unchanged).
    """

    name: Literal["dynet"] = "dynet"
    channels: int = Field(3, ge=1, le=4, description="channels of the input and of the output picture")
    dim: PositiveInt = Field(48, description="channels at level 1; they double at each of the three levels below")
    variants: dict[str, tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]] = Field(
        default={"small": (2, 3, 3, 4), "large": (4, 6, 6, 8)},
        min_length=1,
        description="how often the block of levels 1, 2, 3 and of the latent is applied; the decoder mirrors it",
    )
    heads: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (1, 2, 4, 8)
    expansion: float = Field(2.66, gt=0, description="hidden over input channels in GDFN")
    refinement_blocks: int = Field(4, ge=0, description="unshared blocks at full resolution behind the decoder")
    prompts: Literal["released", "figure", "none"] = "released"
    prompt_length: PositiveInt = 5
    prompt_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None, description="for levels 1 (used by 'figure' alone), 2, 3 and the latent; none scales 32, 64, 128, 320"
    )
    prompt_sizes: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (128, 64, 32, 16)
    prompt_heads: PositiveInt = 4
    checkpoint_levels: CheckpointLevels = ()
    # Left out of what is saved while false, as ``checkpoint_levels`` while empty.
    variant_gains: bool = Field(
        False,
        exclude_if=lambda gains: not gains,
        description="each variant has its own layer scale, initialised to 1, on the two residual branches of each "
        "repeated block, so that shared weights need not suit every depth alike: 2,208 weights a variant, 0.01 % "
        "(private scales for shared weights: slimmable networks, arXiv 1812.08928; NASViT, ICLR 2022)",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> "DyNetConfig":
        if self.dim % 2:
            raise ValueError(f"dim: {self.dim} is odd; downsampling halves it")
        for level, heads in enumerate(self.heads):
            check_heads(self.dim << level, heads, f"heads: level {level + 1}")
        if self.prompts != "none":
            for level, prompt in enumerate(self.resolved_prompt_channels):
                check_heads(
                    (self.dim << level) + prompt, self.prompt_heads, f"prompt_heads: prompt at level {level + 1}"
                )
        if self.variant_gains and any("." in name for name in self.variants):
            raise ValueError(f"variants: with variant_gains a name holds no dot, got {', '.join(self.variants)}")
        return self

    @property
    def resolved_prompt_channels(self) -> tuple[int, int, int, int]:
        """``prompt_channels``, or the published sizes scaled to ``dim`` so that ``prompt_heads`` divides each block."""
        if self.prompt_channels is not None:
            return self.prompt_channels

        def scaled(published: int, level: int) -> int:
            features = self.dim << level
            blocks = round((features + published * self.dim / 48) / self.prompt_heads)
            return max(blocks * self.prompt_heads - features, self.prompt_heads)

        return scaled(32, 0), scaled(64, 1), scaled(128, 2), scaled(320, 3)


class DyNet(nn.Module):
    """See ``DyNetConfig``. Encoder and decoder of a level have a block each; a block is repeated, never copied."""

    def __init__(self, config: DyNetConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.variants = dict(config.variants)
        self.checkpoint_levels = frozenset(config.checkpoint_levels)
        dim, heads, figure = config.dim, config.heads, config.prompts == "figure"

        def block(channels: int, heads: int) -> TransformerBlock:
            return TransformerBlock(channels, heads, config.expansion)

        def prompt_block(level: int, out_features: int) -> PromptBlock:
            return PromptBlock(
                dim << level,
                out_features,
                prompt_channels=config.resolved_prompt_channels[level],
                length=config.prompt_length,
                size=config.prompt_sizes[level],
                heads=config.prompt_heads,
                expansion=config.expansion,
                smooth=figure,
            )

        self.embed = nn.Conv2d(config.channels, dim, 3, padding=1, bias=False)
        self.encoder1 = block(dim, heads[0])
        self.down1_2 = Downsample(dim)
        self.encoder2 = block(2 * dim, heads[1])
        self.down2_3 = Downsample(2 * dim)
        self.encoder3 = block(4 * dim, heads[2])
        self.down3_4 = Downsample(4 * dim)
        self.latent = block(8 * dim, heads[3])

        if config.prompts == "none":
            self.prompt_latent: nn.Module = nn.Conv2d(8 * dim, 4 * dim, 1, bias=False)
            self.prompt_skip3: nn.Module = nn.Identity()
            self.prompt_skip2: nn.Module = nn.Identity()
        else:
            self.prompt_latent = prompt_block(3, 4 * dim)
            self.prompt_skip3 = prompt_block(2, 4 * dim)
            self.prompt_skip2 = prompt_block(1, 2 * dim)
        self.prompt_skip1 = prompt_block(0, dim) if figure else nn.Identity()

        self.up4_3 = Upsample(4 * dim)
        self.fuse3 = nn.Conv2d(6 * dim, 4 * dim, 1, bias=False)
        self.decoder3 = block(4 * dim, heads[2])
        self.up3_2 = Upsample(4 * dim)
        self.fuse2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=False)
        self.decoder2 = block(2 * dim, heads[1])
        self.up2_1 = Upsample(2 * dim)
        self.fuse1 = nn.Conv2d(2 * dim, dim, 1, bias=False) if figure else nn.Identity()
        level1 = dim if figure else 2 * dim
        self.decoder1 = block(level1, heads[0])
        self.refinement = nn.Sequential(*(block(level1, heads[0]) for _ in range(config.refinement_blocks)))
        self.output = nn.Conv2d(level1, config.channels, 3, padding=1, bias=False)

        widths = {"encoder1": dim, "encoder2": 2 * dim, "encoder3": 4 * dim, "latent": 8 * dim}
        widths |= {"decoder3": 4 * dim, "decoder2": 2 * dim, "decoder1": level1}
        self.gains = nn.ModuleDict(
            {
                name: nn.ParameterDict(
                    {
                        f"{variant}_{branch}": torch.ones(width)
                        for variant in config.variants
                        for branch in ("attention", "feed_forward")
                    }
                )
                for name, width in widths.items()
                if config.variant_gains
            }
        )

    def depth_of(self, variant: Variant) -> Depth:
        """How often the blocks of levels 1, 2, 3 and of the latent run for a variant's name or an explicit vector.

        Raises:
            ValueError: no such name, or not four whole numbers of at least 1; the message says what is allowed.
        """
        if isinstance(variant, str) and variant in self.variants:
            return self.variants[variant]
        if not isinstance(variant, str) and len(variant) == 4 and all(type(n) is int and n >= 1 for n in variant):
            return variant[0], variant[1], variant[2], variant[3]
        known = ", ".join(f"{name} = {list(depth)}" for name, depth in self.variants.items())
        raise ValueError(
            f"DyNet: no variant {variant!r}; allowed: {known}, or four whole numbers of at least 1 "
            "(repeats at levels 1, 2, 3 and at the latent)"
        )

    def gains_of(self, variant: Variant) -> str:
        """Name of the variant whose gains apply: for a depth vector, the one nearest in number of block applications.

        Of two that are equally near, the deeper. Raises ValueError as ``depth_of``.
        """
        depth = self.depth_of(variant)
        if isinstance(variant, str):
            return variant

        def distance(name: str) -> tuple[bool, int, int]:
            own = self.variants[name]
            return own != depth, abs(_applications(own) - _applications(depth)), -_applications(own)

        return min(self.variants, key=distance)

    def forward(
        self, image: Tensor, variant: Variant = "large", *, variants: Sequence[Variant] | None = None
    ) -> Tensor | list[Tensor]:
        """Restore ``image`` [N, channels, H, W], floating point in [0, 1], any H and W, at a variant's depth.

        Args:
            variants: several depths for the same pictures, instead of ``variant``. What their computations have in
                common from the start is done once: the embedding, and the repeats at level 1 of the encoder (with
                ``variant_gains`` the embedding alone). Outputs equal those of separate calls bit for bit.

        Returns:
            The same shape; not clamped, so that a loss sees how far it overshoots. With ``variants``, a list of them.

        Raises:
            ValueError: wrong shape, dtype or channels, no such variant, or an empty list of them.
        """
        check_image(image, self.channels, "DyNet")
        wanted = [variant] if variants is None else list(variants)
        if not wanted:
            raise ValueError("DyNet: variants is empty; name at least one, or leave it out")
        for each in wanted:
            self.depth_of(each)
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, STRIDE).contiguous(memory_format=torch.channels_last)

        restored = [
            (self._behind_level1(skip1, each) + padded)[..., :height, :width]
            for skip1, each in zip(self._level1(self.embed(padded), wanted), wanted)
        ]
        return restored[0] if variants is None else restored

    def _level1(self, x: Tensor, variants: list[Variant]) -> list[Tensor]:
        """Features behind level 1 of the encoder, [N, dim, H, W], for each variant."""
        if self.gains:
            return [self._trunk(1, "encoder1", x, variant) for variant in variants]
        times = [self.depth_of(variant)[0] for variant in variants]
        after: dict[int, Tensor] = {}
        for number in range(1, max(times) + 1):
            x = self._blocks(1, self.encoder1, x)
            if number in times:
                after[number] = x
        return [after[number] for number in times]

    def _behind_level1(self, skip1: Tensor, variant: Variant) -> Tensor:
        """What is added to the picture, [N, channels, H, W]."""
        skip2 = self._trunk(2, "encoder2", self.down1_2(skip1), variant)
        skip3 = self._trunk(3, "encoder3", self.down2_3(skip2), variant)
        x = self._trunk(4, "latent", self.down3_4(skip3), variant)

        x = self._blocks(4, self.prompt_latent, x)
        x = self.fuse3(torch.cat([self.up4_3(x), self._blocks(3, self.prompt_skip3, skip3)], dim=1))
        x = self._trunk(3, "decoder3", x, variant)
        x = self.fuse2(torch.cat([self.up3_2(x), self._blocks(2, self.prompt_skip2, skip2)], dim=1))
        x = self._trunk(2, "decoder2", x, variant)
        x = self.fuse1(torch.cat([self.up2_1(x), self._blocks(1, self.prompt_skip1, skip1)], dim=1))
        x = self._trunk(1, "decoder1", x, variant)
        for block in self.refinement:
            x = self._blocks(1, block, x)
        return self.output(x)

    def _trunk(self, level: int, name: str, x: Tensor, variant: Variant) -> Tensor:
        """A level's block, as often as the variant has it."""
        gains = None
        if self.gains:
            own, whose = self.gains[name], self.gains_of(variant)
            assert isinstance(own, nn.ParameterDict)
            gains = (own[f"{whose}_attention"], own[f"{whose}_feed_forward"])
        return self._blocks(level, getattr(self, name), x, self.depth_of(variant)[level - 1], gains)

    def _blocks(self, level: int, block: nn.Module, x: Tensor, times: int = 1, gains: Gains | None = None) -> Tensor:
        recompute = self.training and level in self.checkpoint_levels and not isinstance(block, nn.Identity)
        return apply_blocks(repeat(block, times), x, recompute=recompute, gains=gains)


def _applications(depth: Depth) -> int:
    """How many blocks of the trunk run: the decoder mirrors the encoder's three levels."""
    return 2 * sum(depth[:3]) + depth[3]
