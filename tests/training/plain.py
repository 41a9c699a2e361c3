"""The networks written straight from their equations, as functions of a dict of weights: slow, and easy to check.

Nothing here is shared with ``training.models`` but the names of the weights.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: w for name, w in weights.items() if name.startswith(prefix + ".")}


def layer_norm(weights: Weights, x: Tensor) -> Tensor:
    mean = x.mean(dim=1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weights["weight"].view(1, -1, 1, 1) + weights["bias"].view(
        1, -1, 1, 1
    )


def mdta(weights: Weights, x: Tensor) -> Tensor:
    """Restormer eq. 1 with Q and K normalised over the pixels, one head after another."""
    n, c, h, w = x.shape
    heads = len(weights["temperature"])
    qkv = F.conv2d(F.conv2d(x, weights["qkv.weight"]), weights["qkv_depthwise.weight"], padding=1, groups=3 * c)
    q, k, v = qkv.reshape(n, 3, heads, c // heads, h * w).unbind(1)
    out = []
    for head in range(heads):
        attention = F.normalize(q[:, head], dim=-1) @ F.normalize(k[:, head], dim=-1).transpose(1, 2)
        out.append((attention * weights["temperature"][head]).softmax(dim=-1) @ v[:, head])
    return F.conv2d(torch.cat(out, dim=1).reshape(n, c, h, w), weights["project_out.weight"])


def gdfn(weights: Weights, x: Tensor) -> Tensor:
    """Restormer eq. 2."""
    x = F.conv2d(x, weights["project_in.weight"])
    x = F.conv2d(x, weights["depthwise.weight"], padding=1, groups=x.shape[1])
    half = x.shape[1] // 2
    return F.conv2d(F.gelu(x[:, :half]) * x[:, half:], weights["project_out.weight"])


def transformer_block(weights: Weights, x: Tensor) -> Tensor:
    x = x + mdta(below(weights, "attention"), layer_norm(below(weights, "norm1"), x))
    return x + gdfn(below(weights, "feed_forward"), layer_norm(below(weights, "norm2"), x))


def prompt_block(weights: Weights, x: Tensor) -> Tensor:
    """PromptIR section 3: generation (pooled weights, mixed components, 3x3), then interaction (block, 1x1)."""
    share = F.linear(x.mean(dim=(2, 3)), weights["prompt.mixer.weight"], weights["prompt.mixer.bias"]).softmax(dim=1)
    prompt = sum(share[:, i, None, None, None] * c for i, c in enumerate(weights["prompt.components"]))
    prompt = F.interpolate(prompt, size=x.shape[-2:], mode="bilinear")
    prompt = F.conv2d(prompt, weights["prompt.conv.weight"], padding=1)
    x = F.conv2d(transformer_block(below(weights, "block"), torch.cat([x, prompt], 1)), weights["reduce.weight"])
    return F.conv2d(x, weights["smooth.weight"], padding=1) if "smooth.weight" in weights else x


def dynet(weights: Weights, image: Tensor, depth: Sequence[int]) -> Tensor:
    """DyNet as released; H and W must divide by 8. With the paper's figure where the weights of its parts are there."""

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], padding=padding)

    def repeat(name: str, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = transformer_block(below(weights, name), x)
        return x

    def optional_prompt(name: str, x: Tensor) -> Tensor:
        part = below(weights, name)
        return prompt_block(part, x) if part else x

    def down(name: str, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(conv(f"{name}.conv", x, 1), 2)

    def up(name: str, x: Tensor) -> Tensor:
        return F.pixel_shuffle(conv(f"{name}.conv", x, 1), 2)

    enc1 = repeat("encoder1", conv("embed", image, 1), depth[0])
    enc2 = repeat("encoder2", down("down1_2", enc1), depth[1])
    enc3 = repeat("encoder3", down("down2_3", enc2), depth[2])
    latent = repeat("latent", down("down3_4", enc3), depth[3])
    if "prompt_latent.weight" in weights:
        latent = conv("prompt_latent", latent)
    else:
        latent = prompt_block(below(weights, "prompt_latent"), latent)

    dec3 = conv("fuse3", torch.cat([up("up4_3", latent), optional_prompt("prompt_skip3", enc3)], 1))
    dec3 = repeat("decoder3", dec3, depth[2])
    dec2 = conv("fuse2", torch.cat([up("up3_2", dec3), optional_prompt("prompt_skip2", enc2)], 1))
    dec2 = repeat("decoder2", dec2, depth[1])
    dec1 = torch.cat([up("up2_1", dec2), optional_prompt("prompt_skip1", enc1)], 1)
    if "fuse1.weight" in weights:
        dec1 = conv("fuse1", dec1)
    x = repeat("decoder1", dec1, depth[0])
    refinement = 0
    while f"refinement.{refinement}.norm1.weight" in weights:
        x = repeat(f"refinement.{refinement}", x, 1)
        refinement += 1
    return conv("output", x, 1) + image


def edsr(weights: Weights, image: Tensor, factors: Sequence[int], residual_scale: float) -> Tensor:
    """EDSR of the paper's figure 3 and table 1 on the 0..255 scale; ``factors`` are those of the upsampler's stages."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    head = conv("head", 255 * image - mean)
    x, block = head, 0
    while f"trunk.{block}.conv1.weight" in weights:
        x = x + residual_scale * conv(f"trunk.{block}.conv2", F.relu(conv(f"trunk.{block}.conv1", x)))
        block += 1
    x = conv(f"trunk.{block}", x) + head
    for stage, factor in enumerate(factors):
        x = F.pixel_shuffle(conv(f"upsampler.{2 * stage}", x), factor)
    return (conv("tail", x) + mean) / 255
