"""What every model asks of its input: pictures of the right kind, a variant that exists, sides that divide."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

Variant = str | Sequence[int]


def check_image(image: Tensor, channels: int, model: str) -> None:
    """Refuse anything but a floating-point NCHW batch with ``channels`` channels.

    Raises:
        ValueError: wrong rank, dtype or channel count; the message says what was expected and what came.
    """
    shape = tuple(image.shape)
    if image.dim() != 4:
        raise ValueError(f"{model}: expected a batch of pictures [N, {channels}, H, W], got shape {shape}")
    if image.shape[1] != channels:
        raise ValueError(f"{model}: built for {channels} channel(s), got {image.shape[1]} in shape {shape} (NCHW)")
    if not image.is_floating_point():
        raise ValueError(f"{model}: expected floating point in [0, 1], got {image.dtype}; divide 8-bit pictures by 255")
    if 0 in shape:
        raise ValueError(f"{model}: empty batch or picture, shape {shape}")


def check_variant(variant: Variant, allowed: Sequence[str], model: str) -> None:
    """Refuse a variant that is not in ``allowed``, naming those that are.

    Raises:
        ValueError: ``variant`` is not one of ``allowed``.
    """
    if variant not in allowed:
        raise ValueError(f"{model}: unknown variant {variant!r}; allowed: {', '.join(allowed)}")


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Grow an NCHW batch to the right and below until both sides divide by ``multiple``.

    The border is reflected, which continues texture; pictures smaller than the border they need have
    nothing to reflect and are continued by their last pixels.
    """
    height, width = image.shape[-2:]
    below, right = -height % multiple, -width % multiple
    if below == 0 and right == 0:
        return image
    mode = "reflect" if below < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, below), mode=mode)
