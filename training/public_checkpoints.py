"""Weights trained with the public implementations, under the key names that those give them.

Which code a kind stands for: ``dynet`` akshaydudhane16/DyNet (net/DyNet_large.py and DyNet_small.py, whose weights are
the same), ``promptir`` va1shn9v/PromptIR (net/model.py), ``edsr`` and ``mdsr`` sanghyun-son/EDSR-PyTorch, and
``basicsr-edsr`` XPixelGroup/BasicSR (archs/edsr_arch.py).

A checkpoint says nothing of its network but names and shapes. The config is read from these; then the names and shapes
that the config stands for are compared with those that are there, and any difference is a fault.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from infra.config import Config
from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, PromptIRConfig, build_model
from training.public_files import CheckpointError, some
from training.public_names import Kind, public_name

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Made by the public classes and never used in their forward pass: 0.113 M weights of DyNet, 0.215 M of PromptIR.
_DEAD = {
    "dynet": re.compile(r"reduce_noise_channel_[123]\.weight"),
    "promptir": re.compile(r"(reduce_noise_channel_|chnl_reduce)[123]\.weight"),
}

# A key that only this kind has.
_SIGNATURES = {
    "dynet": re.compile(r"encoder_level\d\.(norm|attn|ffn)"),
    "promptir": re.compile(r"encoder_level\d\.\d+\.|chnl_reduce"),
    "mdsr": re.compile(r"pre_process\.|upsample\.\d\.\d\."),
    "edsr": re.compile(r"tail\.0\.\d\."),
    "basicsr-edsr": re.compile(r"conv_(first|after_body|last)\.|body\.\d+\.conv[12]\."),
    "ird export": re.compile(r"(encoder\d|decoder\d|latent)\.(\d+\.)?feed_forward\.|trunk\.\d+\.conv[12]\."),
}


class ImportOptions(Config):
    """What the weights do not say. None: as published."""

    residual_scale: float | None = Field(
        None, gt=0, description="EDSR, MDSR: factor on each block's residual; 0.1 from 256 features on, else 1"
    )
    image_range: float | None = Field(
        None, gt=0, description="EDSR, MDSR: value of white in training; read from sub_mean where that is, else 255"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="EDSR, MDSR: colour taken off, one value a channel in [0, 1]; DIV2K's when not given"
    )


@dataclass(frozen=True)
class Finding:
    """One key that is not plainly taken over. ``ignored`` is no fault, everything else is."""

    kind: Literal["missing", "unexpected", "of another shape", "bad values", "ignored"]
    key: str
    expected: str = ""
    found: str = ""


@dataclass(frozen=True)
class Match:
    """What a checkpoint was read as. ``weights`` has our names, float32, and is whole where ``faults`` is empty."""

    config: ModelConfig
    weights: dict[str, Tensor]
    findings: list[Finding]
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind != "ignored"]


def match_checkpoint(tensors: Mapping[str, Tensor], kind: Kind, options: ImportOptions | None = None) -> Match:
    """Read ``tensors``, named as in the public code of ``kind``, as one of our networks.

    Raises:
        CheckpointError: the names are those of another kind or of none, or the shapes are of no network that our
            config can say, or an option does not suit the kind.
    """
    options = options or ImportOptions()
    _check_kind(tensors, kind)
    if kind in ("dynet", "promptir"):
        given = sorted(options.model_dump(exclude_none=True))
        if given:
            raise CheckpointError(f"{', '.join(given)}: not an option of {kind}, but of edsr, mdsr and basicsr-edsr")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    findings: list[Finding] = []
    notes: list[str] = []
    if kind in _DEAD:
        for name in sorted(name for name in shapes if _DEAD[kind].fullmatch(name)):
            unused = f"{math.prod(shapes[name]):,} weights that the public network never uses"
            findings.append(Finding("ignored", name, "", unused))
    try:
        if kind == "dynet":
            config: ModelConfig = _dynet_config(shapes)
        elif kind == "promptir":
            config = _promptir_config(shapes)
        else:
            config, colours = _residual_config(tensors, shapes, kind, options, notes)
            findings += colours
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CheckpointError(f"shapes of a {kind} that cannot be built here: {faults}") from None

    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
    public = {name: public_name(name, config, kind) for name in own}
    weights = {}
    for name, shape in own.items():
        key = public[name]
        expected = (1, *shape) if key.endswith(".prompt_param") else shape
        if key not in tensors:
            findings.append(Finding("missing", key, _times(expected), "nothing"))
        elif shapes[key] != expected:
            findings.append(Finding("of another shape", key, _times(expected), _times(shapes[key])))
        elif not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            what = "NaN or infinity" if tensors[key].is_floating_point() else str(tensors[key].dtype)
            findings.append(Finding("bad values", key, "finite floating point", what))
        else:
            weights[name] = tensors[key].detach().to(torch.float32).reshape(shape)
    known = {*public.values(), *(finding.key for finding in findings)}
    findings += [Finding("unexpected", key, "nothing", _times(shapes[key])) for key in sorted(shapes.keys() - known)]
    return Match(config, weights, findings, notes)


def _check_kind(names: Iterable[str], kind: Kind) -> None:
    counts = {other: sum(bool(sign.match(name)) for name in names) for other, sign in _SIGNATURES.items()}
    if counts[kind]:
        return
    likely, count = max(counts.items(), key=lambda item: item[1])
    if count == 0:
        raise CheckpointError(f"no key of a {kind} among {some(sorted(names))}; expected such as {_EXAMPLES[kind]}")
    if likely == "ird export":
        raise CheckpointError(f"not a {kind} of the public code but an export of ird; use its folder as it is")
    raise CheckpointError(f"looks like {likely}, not {kind} (keys {some(sorted(names))}); import it as {likely}")


_EXAMPLES = {
    "dynet": "encoder_level1.attn.qkv.weight",
    "promptir": "encoder_level1.0.attn.qkv.weight",
    "edsr": "tail.0.0.weight",
    "mdsr": "pre_process.0.0.body.0.weight",
    "basicsr-edsr": "body.0.conv1.weight",
}


# Configs from shapes. Several tensors say the same; the most common answer is taken, so that one broken tensor is
# reported as such and does not make all the others look wrong.


def _vote(answers: Iterable[int], published: int) -> int:
    counts = Counter(answers)
    return counts.most_common(1)[0][0] if counts else published


def _sizes(shapes: Shapes, pattern: str, axis: int, share: Callable[[int], int] = int) -> Iterator[int]:
    """Size along ``axis`` of each tensor whose name matches, after ``share``."""
    for name, shape in shapes.items():
        if re.fullmatch(pattern, name) and len(shape) > axis:
            yield share(shape[axis])


def _count(shapes: Shapes, prefix: str) -> int:
    """How many of ``prefix``0, ``prefix``1, … there are, without a gap."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
    return next(n for n in range(len(numbers) + 1) if str(n) not in numbers)


def _restormer_parts(shapes: Shapes, blocks: str) -> dict[str, Any]:
    """What DyNet and PromptIR have in common; ``blocks`` matches the number of a block in its level."""
    dim = _vote(
        [
            *_sizes(shapes, r"patch_embed\.proj\.weight", 0),
            *_sizes(shapes, rf"encoder_level1\.{blocks}norm[12]\.body\.weight", 0),
            *_sizes(shapes, rf"latent\.{blocks}norm[12]\.body\.weight", 0, lambda n: n // 8),
        ],
        48,
    )
    levels = ["(en|de)coder_level1", "(en|de)coder_level2", "(en|de)coder_level3", "latent"]
    return {
        "channels": _vote([*_sizes(shapes, r"patch_embed\.proj\.weight", 1), *_sizes(shapes, r"output\.weight", 0)], 3),
        "dim": dim,
        "heads": tuple(
            _vote(_sizes(shapes, rf"{level}\.{blocks}attn\.temperature", 0), heads)
            for level, heads in zip(levels, (1, 2, 4, 8))
        ),
        "expansion": _expansion(shapes),
        "refinement_blocks": _count(shapes, "refinement."),
        "prompt_length": _vote(
            [*_sizes(shapes, r"prompt\d\.prompt_param", 1), *_sizes(shapes, r"prompt\d\.linear_layer\.bias", 0)], 5
        ),
        "prompt_heads": _vote(_sizes(shapes, r"noise_level\d\.attn\.temperature", 0), 4),
    }


def _expansion(shapes: Shapes) -> float:
    """A factor that gives most blocks the hidden width they have: 2.66 where it does, else the roundest."""
    widths = {
        (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith("ffn.project_out.weight") and len(shape) > 1
    }
    candidates = [2.66]
    low = max((hidden / channels for channels, hidden in widths), default=0.0)
    high = min(((hidden + 1) / channels for channels, hidden in widths), default=0.0)
    for lower, upper in [(low, high), *((hidden / c, (hidden + 1) / c) for c, hidden in sorted(widths))]:
        for digits in range(1, 8):
            rounded = math.ceil(lower * 10**digits) / 10**digits
            if lower <= rounded < upper:
                candidates.append(rounded)
                break
    return max(candidates, key=lambda factor: sum(int(channels * factor) == hidden for channels, hidden in widths))


def _prompt_sizes(shapes: Shapes, number: int, channels: int, side: int) -> tuple[int, int]:
    """Channels and side of the maps of prompt ``number``; the published ones where nothing says them."""
    name = rf"prompt{number}\."
    found = [*_sizes(shapes, name + r"prompt_param", 2), *_sizes(shapes, name + r"conv3x3\.weight", 0)]
    return _vote(found, channels), _vote(_sizes(shapes, name + "prompt_param", 4), side)


def _dynet_config(shapes: Shapes) -> DyNetConfig:
    parts = _restormer_parts(shapes, "")
    scaled = DyNetConfig(**parts).resolved_prompt_channels
    found = [_prompt_sizes(shapes, n, scaled[n], side) for n, side in ((1, 64), (2, 32), (3, 16))]
    channels = (scaled[0], *(channels for channels, _ in found))
    sides = (2 * found[0][1], *(side for _, side in found))
    return DyNetConfig(**parts, prompt_sizes=sides, prompt_channels=None if channels == scaled else channels)


_LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")


def _promptir_config(shapes: Shapes) -> PromptIRConfig:
    parts = _restormer_parts(shapes, r"\d+\.")
    found = [_prompt_sizes(shapes, *published) for published in ((1, 64, 64), (2, 128, 32), (3, 320, 16))]
    return PromptIRConfig(
        **parts,
        blocks=tuple(_count(shapes, f"{level}.") for level in _LEVELS),
        prompt_channels=tuple(channels for channels, _ in found),
        prompt_sizes=tuple(side for _, side in found),
    )


def _residual_config(
    tensors: Mapping[str, Tensor], shapes: Shapes, kind: Kind, options: ImportOptions, notes: list[str]
) -> tuple[EDSRConfig | MDSRConfig, list[Finding]]:
    head = r"conv_first\.weight" if kind == "basicsr-edsr" else r"head\.0\.weight"
    tail = {"edsr": r"tail\.1\.weight", "mdsr": r"tail\.0\.weight", "basicsr-edsr": r"conv_last\.weight"}[kind]
    tail_bias = tail.replace("weight", "bias")
    features = _vote(_sizes(shapes, r"body\..+\.bias|conv_after_body\.bias", 0), 64)
    channels = _vote([*_sizes(shapes, head, 1), *_sizes(shapes, tail, 0), *_sizes(shapes, tail_bias, 0)], 3)
    # EDSR-PyTorch counts the convolution behind the blocks among them.
    blocks = _count(shapes, "body.") - (kind != "basicsr-edsr")
    residual_scale = options.residual_scale or (0.1 if features >= 256 and kind != "mdsr" else 1.0)
    if options.residual_scale is None:
        notes.append(f"residual_scale {residual_scale:g}: as published for {features} features; not in the weights")
    mean = options.mean or EDSRConfig().mean
    if len(mean) != channels:
        raise CheckpointError(
            f"a network of {channels} channel(s), a mean colour of {len(mean)}: give one value a channel in [0, 1] "
            f"as the mean of its training, in place of {list(mean)}"
        )
    image_range, findings = (
        (options.image_range or 255.0, [])
        if kind == "basicsr-edsr"
        else _mean_shift(tensors, mean, options.image_range, notes)
    )
    if kind == "basicsr-edsr" and options.image_range is None:
        notes.append(f"image_range {image_range:g}, mean {list(mean)}: as published; not in the weights")
    trunk = {
        "blocks": blocks,
        "features": features,
        "channels": channels,
        "residual_scale": residual_scale,
        "image_range": image_range,
        "mean": mean,
    }
    if kind == "mdsr":
        upsamplers = _count(shapes, "upsample.")
        scales = tuple(_scale(shapes, f"upsample.{n}.", features) for n in range(upsamplers))
        return MDSRConfig(**trunk, scales=scales), findings
    return EDSRConfig(**trunk, scale=_scale(shapes, "tail.0." if kind == "edsr" else "upsample.", features)), findings


def _scale(shapes: Shapes, prefix: str, features: int) -> Any:
    """Of an upsampler: 3 by a convolution to nine times the features, else a doubling for each convolution."""
    stages = {name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)}
    widths = [*_sizes(shapes, re.escape(prefix) + r"0\.(weight|bias)", 0)]
    return 3 if 9 * features in widths else 2 ** len(stages)


def _mean_shift(
    tensors: Mapping[str, Tensor], mean: tuple[float, ...], image_range: float | None, notes: list[str]
) -> tuple[float, list[Finding]]:
    """The range of values that the frozen MeanShift convolutions speak of, and what is wrong with them.

    Ours has them as constants, so that they must be what ``MeanShift`` makes: the identity, and the mean colour times
    the range, taken off by sub_mean and added by add_mean.
    """
    colour = torch.tensor(mean)
    bias = tensors.get("sub_mean.bias")
    if image_range is None and bias is not None and bias.shape == colour.shape:
        ratio = float((-bias.float() / colour).median())
        if math.isfinite(ratio) and ratio > 0:
            image_range = round(ratio) if abs(ratio - round(ratio)) < 1e-3 * ratio else ratio
            notes.append(f"image_range {image_range:g}: read from sub_mean")
    value_range = image_range or 255.0
    findings = []
    for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
        for part, expected in (("weight", torch.eye(len(mean))), ("bias", sign * value_range * colour)):
            key, found = f"{layer}.{part}", tensors.get(f"{layer}.{part}")
            what = f"the {'identity' if part == 'weight' else f'mean colour times {sign * value_range:g}'}"
            if found is None and image_range is None:
                findings.append(Finding("missing", key, what, "nothing; give image_range if it was trained without"))
            elif found is None:
                continue
            elif found.numel() == expected.numel() and torch.allclose(
                found.float().reshape(expected.shape), expected, rtol=1e-3, atol=1e-6
            ):
                findings.append(Finding("ignored", key, "", f"{what}, a constant here"))
            else:
                values = ", ".join(f"{value:.4g}" for value in found.flatten()[:4].tolist())
                findings.append(
                    Finding(
                        "bad values", key, what, f"{values}{', …' * (found.numel() > 4)}; give mean and image_range"
                    )
                )
    return value_range, findings


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "one number"
