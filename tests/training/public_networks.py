"""The networks as the public codes name their weights and compute them, for tests of the import; any width.

Written from the equations (see ``plain.py``); a name that stands here stands in the checkpoints that people have.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.4488, 0.4371, 0.4040)


def conv(inward: int, outward: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, kernel, padding=kernel // 2, groups=groups, bias=False)


def named(**children: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(children))


class Affine(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.project_out = conv(channels, 3 * channels, 1), conv(channels, channels, 1)
        self.qkv_dwconv = conv(3 * channels, 3 * channels, 3, groups=3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        q, k, v = (part.reshape(len(x), len(self.temperature), -1, x[0, 0].numel()) for part in parts)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * self.temperature
        return self.project_out((weights.softmax(-1) @ v).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in, self.project_out = conv(channels, 2 * hidden, 1), conv(hidden, channels, 1)
        self.dwconv = conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * value)


class Transformer(nn.Module):
    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = named(body=Affine(channels)), named(body=Affine(channels))
        self.attn, self.ffn = Attention(channels, heads), FeedForward(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Prompt(nn.Module):
    def __init__(self, features: int, channels: int, side: int, length: int) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, length, channels, side, side))
        self.linear_layer, self.conv3x3 = nn.Linear(features, length), conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        share = self.linear_layer(x.mean((2, 3))).softmax(1)
        mixed = torch.einsum("nl,lchw->nchw", share, self.prompt_param[0])
        return self.conv3x3(F.interpolate(mixed, x.shape[2:], mode="bilinear"))


class PublicRestorer(nn.Module):
    """DyNet where ``blocks`` is none (a block a level, repeated ``depth`` times on call), else PromptIR."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int] | None = None,
        *,
        dim: int = 48,
        heads: tuple[int, int, int, int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        refinement: int = 4,
        prompts: tuple[tuple[int, int], ...] = ((64, 64), (128, 32), (320, 16)),
        length: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.blocks = blocks

        def level(number: int, features: int) -> nn.Module:
            if blocks is None:
                return Transformer(features, heads[number], expansion)
            return nn.Sequential(*(Transformer(features, heads[number], expansion) for _ in range(blocks[number])))

        self.patch_embed = named(proj=conv(channels, dim, 3))
        self.encoder_level1, self.encoder_level2 = level(0, dim), level(1, 2 * dim)
        self.encoder_level3, self.latent = level(2, 4 * dim), level(3, 8 * dim)
        self.decoder_level3, self.decoder_level2, self.decoder_level1 = (
            level(2, 4 * dim),
            level(1, 2 * dim),
            level(0, 2 * dim),
        )
        for number, name in enumerate(("down1_2", "down2_3", "down3_4")):
            setattr(
                self, name, named(body=nn.Sequential(conv(dim << number, dim << number >> 1, 3), nn.PixelUnshuffle(2)))
            )
        for number, name in ((2, "up4_3"), (2, "up3_2"), (1, "up2_1")):
            setattr(
                self, name, named(body=nn.Sequential(conv(dim << number, dim << number << 1, 3), nn.PixelShuffle(2)))
            )
        self.reduce_chan_level3, self.reduce_chan_level2 = conv(6 * dim, 4 * dim, 1), conv(4 * dim, 2 * dim, 1)
        for number, (extra, side) in enumerate(prompts, start=1):
            features = dim << number
            setattr(self, f"prompt{number}", Prompt(features, extra, side, length))
            setattr(self, f"noise_level{number}", Transformer(features + extra, 4, expansion))
            outward = min(features, 4 * dim)
            setattr(self, f"reduce_noise_level{number}", conv(features + extra, outward, 1))
        self.refinement = nn.Sequential(*(Transformer(2 * dim, heads[0], expansion) for _ in range(refinement)))
        self.output = conv(2 * dim, channels, 3)
        # Made and never used.
        for number, extra in ((1, 64), (2, 128), (3, 256)):
            features = dim << number - 1
            setattr(self, f"reduce_noise_channel_{number}", conv(features + extra, features, 1))
            if blocks:
                setattr(self, f"chnl_reduce{number}", conv((64, 128, 320)[number - 1], extra, 1))

    def prompted(self, number: int, x: Tensor) -> Tensor:
        x = torch.cat([x, getattr(self, f"prompt{number}")(x)], 1)
        return getattr(self, f"reduce_noise_level{number}")(getattr(self, f"noise_level{number}")(x))

    def forward(self, image: Tensor, depth: tuple[int, int, int, int] = (1, 1, 1, 1)) -> Tensor:
        def run(block: nn.Module, x: Tensor, level: int) -> Tensor:
            for _ in range(depth[level]):
                x = block(x)
            return x

        dynet = self.blocks is None
        one = run(self.encoder_level1, self.patch_embed(image), 0)
        two = run(self.encoder_level2, self.down1_2(one), 1)
        three = run(self.encoder_level3, self.down2_3(two), 2)
        x = self.up4_3(self.prompted(3, run(self.latent, self.down3_4(three), 3)))
        x = self.reduce_chan_level3(torch.cat([x, self.prompted(2, three) if dynet else three], 1))
        x = run(self.decoder_level3, x, 2)
        x = self.up3_2(x if dynet else self.prompted(2, x))
        x = self.reduce_chan_level2(torch.cat([x, self.prompted(1, two) if dynet else two], 1))
        x = run(self.decoder_level2, x, 1)
        x = torch.cat([self.up2_1(x if dynet else self.prompted(1, x)), one], 1)
        return self.output(self.refinement(run(self.decoder_level1, x, 0))) + image


class MeanShift(nn.Conv2d):
    def __init__(self, image_range: float, sign: int) -> None:
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * image_range * torch.tensor(MEAN)


class Residual(nn.Module):
    def __init__(self, features: int, kernel: int, residual_scale: float, *, basicsr: bool = False) -> None:
        super().__init__()
        one, two = (nn.Conv2d(features, features, kernel, padding=kernel // 2) for _ in range(2))
        self.residual_scale = residual_scale
        if basicsr:
            self.conv1, self.conv2 = one, two
        else:
            self.body = nn.Sequential(one, nn.ReLU(), two)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.body(x) if hasattr(self, "body") else self.conv2(self.conv1(x).relu())
        return x + self.residual_scale * inner


def biased(inward: int, outward: int) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, 3, padding=1)


def upsampler(features: int, scale: int) -> nn.Sequential:
    factors = {2: [2], 3: [3], 4: [2, 2]}[scale]
    return nn.Sequential(
        *(layer for n in factors for layer in (biased(features, n * n * features), nn.PixelShuffle(n)))
    )


class PublicEDSR(nn.Module):
    """EDSR-PyTorch's, on 0..``image_range``."""

    def __init__(
        self, scale: int = 2, blocks: int = 16, features: int = 64, residual_scale: float = 1, image_range: float = 255
    ) -> None:
        super().__init__()
        self.sub_mean, self.add_mean = MeanShift(image_range, -1), MeanShift(image_range, 1)
        self.head = nn.Sequential(biased(3, features))
        trunk = [Residual(features, 3, residual_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*trunk, biased(features, features))
        self.tail = nn.Sequential(upsampler(features, scale), biased(features, 3))

    def forward(self, image: Tensor) -> Tensor:
        x = self.head(self.sub_mean(image))
        return self.add_mean(self.tail(x + self.body(x)))


class PublicMDSR(nn.Module):
    def __init__(self, scales: tuple[int, ...] = (2, 3, 4), blocks: int = 16, features: int = 64) -> None:
        super().__init__()
        self.sub_mean, self.add_mean = MeanShift(255, -1), MeanShift(255, 1)
        self.head, self.tail = nn.Sequential(biased(3, features)), nn.Sequential(biased(features, 3))
        self.pre_process = nn.ModuleList(
            nn.Sequential(Residual(features, 5, 1), Residual(features, 5, 1)) for _ in scales
        )
        self.body = nn.Sequential(*(Residual(features, 3, 1) for _ in range(blocks)), biased(features, features))
        self.upsample = nn.ModuleList(upsampler(features, scale) for scale in scales)

    def forward(self, image: Tensor, number: int) -> Tensor:
        x = self.pre_process[number](self.head(self.sub_mean(image)))
        return self.add_mean(self.tail(self.upsample[number](x + self.body(x))))


class PublicBasicSREDSR(nn.Module):
    """BasicSR's, on 0..1."""

    def __init__(
        self, scale: int = 4, blocks: int = 16, features: int = 64, residual_scale: float = 1, image_range: float = 255
    ) -> None:
        super().__init__()
        self.image_range = image_range
        self.conv_first, self.conv_after_body = biased(3, features), biased(features, features)
        self.body = nn.Sequential(*(Residual(features, 3, residual_scale, basicsr=True) for _ in range(blocks)))
        self.upsample, self.conv_last = upsampler(features, scale), biased(features, 3)

    def forward(self, image: Tensor) -> Tensor:
        mean = torch.tensor(MEAN).view(1, 3, 1, 1)
        x = self.conv_first((image - mean) * self.image_range)
        x = x + self.conv_after_body(self.body(x))
        return self.conv_last(self.upsample(x)) / self.image_range + mean


def randomised(network: nn.Module) -> nn.Module:
    """Norms and temperatures start at 1 and 0, which hides mistakes; frozen layers stay as they are."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "_mean." not in name:
                weight += 0.1 * torch.randn_like(weight)
    return network.eval().requires_grad_(False)
