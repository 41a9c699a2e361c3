"""What the public codes call the weights that have names of our own."""

import re
from typing import Literal

from training.models import MDSRConfig, ModelConfig

Kind = Literal["dynet", "promptir", "edsr", "mdsr", "basicsr-edsr"]

# Names of ours and what they are called in the public code, by the start of a name and by its parts.
_RESTORMER_STARTS = {
    "embed.": "patch_embed.proj.",
    "prompt_latent.prompt.": "prompt3.",
    "prompt_latent.block.": "noise_level3.",
    "prompt_latent.reduce.": "reduce_noise_level3.",
    "fuse3.": "reduce_chan_level3.",
    "fuse2.": "reduce_chan_level2.",
    **{f"encoder{level}.": f"encoder_level{level}." for level in (1, 2, 3)},
    **{f"decoder{level}.": f"decoder_level{level}." for level in (1, 2, 3)},
    **{f"{resize}.conv.": f"{resize}.body.0." for resize in ("down1_2", "down2_3", "down3_4")},
    **{f"{resize}.conv.": f"{resize}.body.0." for resize in ("up4_3", "up3_2", "up2_1")},
    **{
        f"prompt_{place}{level}.{ours}.": public.format(level - 1)
        for place in ("skip", "decoder")
        for level in (3, 2)
        for ours, public in (("prompt", "prompt{}."), ("block", "noise_level{}."), ("reduce", "reduce_noise_level{}."))
    },
}
_BASICSR = {"head": "conv_first", "upsampler": "upsample", "tail": "conv_last"}
_RESTORMER_PARTS = {
    "norm1.": "norm1.body.",
    "norm2.": "norm2.body.",
    "attention.": "attn.",
    "qkv_depthwise.": "qkv_dwconv.",
    "feed_forward.": "ffn.",
    ".depthwise.": ".dwconv.",
    "components": "prompt_param",
    "mixer.": "linear_layer.",
}


def public_name(name: str, config: ModelConfig, kind: Kind) -> str:
    """What the public code of ``kind`` calls the weight that is ``name`` here."""
    if kind in ("dynet", "promptir"):
        for start, public in _RESTORMER_STARTS.items():
            if name.startswith(start):
                name = public + name.removeprefix(start)
                break
        if re.match(r"prompt\d\.conv\.", name):
            return name.replace("conv.", "conv3x3.")
        for part, public in _RESTORMER_PARTS.items():
            name = name.replace(part, public)
        return name
    if kind == "basicsr-edsr":
        name = re.sub(r"^trunk\.(?=\d+\.conv)", "body.", name)
        name = re.sub(r"^trunk\.\d+", "conv_after_body", name)
        return re.sub(r"^(head|tail|upsampler)", lambda part: _BASICSR[part[0]], name)
    if isinstance(config, MDSRConfig):  # preprocess.x3.0.conv1.weight: its scales are numbered in their order
        for number, scale in enumerate(config.scales):
            name = name.replace(f"preprocess.x{scale}.", f"pre_process.{number}.")
            name = name.replace(f"upsampler.x{scale}.", f"upsample.{number}.")
    name = re.sub(r"\.conv([12])\.", lambda conv: f".body.{2 * int(conv[1]) - 2}.", name)
    name = re.sub(r"^trunk\.", "body.", name)
    name = re.sub(r"^tail\.", "tail.0." if kind == "mdsr" else "tail.1.", name)
    return re.sub(r"^upsampler\.", "tail.0.", re.sub(r"^head\.", "head.0.", name))
