"""The three steps of a transformer block, each with a backward pass that is written out.

Autograd would keep the result of every operation. Here a step keeps its inputs alone and computes the cheap parts
anew (a normalisation, a GELU and a product; never a convolution), and gradients of the parts of one tensor are
written into one tensor instead of being joined by a copy. Values are those of the plain operations, which run
wherever nothing is kept (without gradients) or a compiler does better by itself (``torch.compile``, exports).

All tensors have channels last: [..., C]. The steps can be differentiated once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPSILON = 1e-5  # of the layer normalisation
_SHORTEST = 1e-12  # as in F.normalize


def normed_projection(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
    """``linear(layer_norm(x), weight)``: [..., C] -> [..., D]; ``weight`` is [D, C].

    Keeps ``x``; the normalised tensor, and under autocast its float32 copy, are made anew.
    """
    if _plain():
        return F.linear(layer_norm(x, norm_weight, norm_bias), weight)
    return cast(Tensor, _NormedProjection.apply(x, norm_weight, norm_bias, weight))


def gated_projection(x: Tensor, weight: Tensor) -> Tensor:
    """``linear(gelu(a) * b, weight)`` with a, b the halves of ``x``: [..., 2 D] -> [..., C]; ``weight`` is [C, D].

    Keeps ``x``; GELU and product are made anew.
    """
    if _plain():
        return _gate_and_project(x, weight)
    return cast(Tensor, _GatedProjection.apply(x, weight))


def channel_attention(qkv: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    """MDTA behind its convolutions: queries, keys, values [N, pixels, 3 C] -> [N, pixels, C].

    ``temperature`` is [heads, 1, 1], ``weight`` [C, C] the projection behind the attention. Keeps ``qkv`` and
    matrices of channels by channels.
    """
    if _plain():
        cosine, _ = _cosines(qkv, len(temperature))
        return _mix(qkv, (cosine * temperature).softmax(dim=-1), weight)
    return cast(Tensor, _ChannelAttention.apply(qkv, temperature, weight))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least and contiguous; no copy where ``x`` is both."""
    # Under autocast CPU kernels take bfloat16 as it comes, and their gradients of weight and bias are then far off.
    return F.layer_norm(x.to(_at_least_float32(x)), weight.shape, weight, bias, EPSILON)


def _plain() -> bool:
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _backward(function: Callable[..., Any]) -> Any:
    """A backward pass in the dtypes of its tensors, whatever autocast says where it is called."""

    @wraps(function)
    def run(ctx: Any, gradient: Tensor) -> Any:
        with _no_autocast(gradient):
            return function(ctx, gradient)

    return staticmethod(once_differentiable(run))


class _NormedProjection(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)
        return F.linear(layer_norm(x, norm_weight, norm_bias), weight)

    @_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        wide = x.to(_at_least_float32(x))
        normed, mean, deviation = torch.native_layer_norm(wide, norm_weight.shape, norm_weight, norm_bias, EPSILON)
        to_weight = gradient.flatten(0, -2).t() @ normed.to(gradient.dtype).flatten(0, -2)
        to_normed = (gradient @ weight.to(gradient.dtype)).to(wide.dtype)
        to_x, to_norm_weight, to_norm_bias = torch.ops.aten.native_layer_norm_backward(
            to_normed, wide, norm_weight.shape, mean, deviation, norm_weight, norm_bias, [True, True, True]
        )
        return to_x.to(x.dtype), to_norm_weight, to_norm_bias, to_weight


def _gate_and_project(x: Tensor, weight: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.linear(F.gelu(gate) * value, weight)


class _GatedProjection(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _gate_and_project(x, weight)

    @_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        to_x = torch.empty_like(x)
        to_gate, to_value = to_x.chunk(2, dim=-1)
        to_product = gradient @ weight.to(gradient.dtype)
        opened = F.gelu(gate)
        torch.mul(to_product, opened, out=to_value)
        to_weight = gradient.flatten(0, -2).t() @ opened.mul_(value).flatten(0, -2)
        torch.ops.aten.gelu_backward.grad_input(to_product.mul_(value), gate, grad_input=to_gate)
        return to_x, to_weight


def _cosines(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Cosine of each query with each key of its head, [N, heads, C/heads, C/heads], and their lengths [N, 2 C].

    Both in float32 at least; a length is at least 1e-12. The Gram matrix is divided by the lengths, which gives the
    product of normalised queries and keys without making those.
    """
    queries, keys, _ = qkv.chunk(3, dim=-1)
    batch, _, channels = queries.shape
    per_head = channels // heads
    # One product over all channels and its diagonal blocks: one kernel without a copy, where products per head would
    # first have to gather each head's channels.
    gram = (queries.transpose(1, 2) @ keys).view(batch, heads, per_head, heads, per_head)
    gram = gram.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).to(_at_least_float32(qkv))
    both = qkv[..., : 2 * channels].to(gram.dtype)
    # Clamped before the root, whose slope at zero is infinite.
    lengths = (both * both).sum(dim=1).clamp_min(_SHORTEST**2).sqrt()
    rows, columns = lengths.split(channels, dim=-1)
    return gram / (rows.view(batch, heads, per_head, 1) * columns.view(batch, heads, 1, per_head)), lengths


def _mixing(attention: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Projection times attention, [N, C, C]: the values are then read once, and nothing of their size is kept.

    Rounded to ``dtype`` once: an error here is one and the same at every pixel.
    """
    batch, heads, per_head, _ = attention.shape
    with _no_autocast(attention):
        by_head = weight.to(attention.dtype).view(len(weight), heads, per_head)
        mixing = torch.einsum("ohc,nhcd->nohd", by_head, attention)
    return mixing.reshape(batch, len(weight), -1).to(dtype)


def _mix(qkv: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
    return qkv.chunk(3, dim=-1)[2] @ _mixing(attention, weight, qkv.dtype).transpose(1, 2)


class _ChannelAttention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
        cosine, lengths = _cosines(qkv, len(temperature))
        attention = (cosine * temperature).softmax(dim=-1)
        ctx.save_for_backward(qkv, temperature, weight, cosine, lengths, attention)
        return _mix(qkv, attention, weight)

    @_backward
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv, temperature, weight, cosine, lengths, attention = ctx.saved_tensors
        queries, keys, values = qkv.chunk(3, dim=-1)
        batch, heads, per_head, _ = attention.shape
        channels, dtype = heads * per_head, qkv.dtype

        # Of the small matrices.
        to_mixing = (gradient.transpose(1, 2) @ values).view(batch, channels, heads, per_head).to(attention.dtype)
        to_weight = torch.einsum("nohd,nhcd->ohc", to_mixing, attention).reshape(channels, channels)
        by_head = weight.to(attention.dtype).view(channels, heads, per_head)
        to_attention = torch.einsum("nohd,ohc->nhcd", to_mixing, by_head)
        along = (to_attention * attention).sum(dim=-1, keepdim=True)
        to_logits = attention * (to_attention - along)
        to_temperature = (to_logits * cosine).sum(dim=(0, 2, 3)).view_as(temperature)
        to_cosine = to_logits * temperature
        rows, columns = lengths.split(channels, dim=-1)
        rows, columns = rows.view(batch, heads, per_head, 1), columns.view(batch, heads, 1, per_head)
        to_gram = qkv.new_zeros(batch, heads, per_head, heads, per_head)
        to_gram.diagonal(dim1=1, dim2=3).copy_((to_cosine / (rows * columns)).permute(0, 2, 3, 1))
        to_gram = to_gram.view(batch, channels, channels)
        # A cosine falls with either length: the slope along a query is its own direction times this. A length that
        # was clamped does not change.
        shares = to_cosine * cosine
        shrink = torch.cat([shares.sum(dim=-1).flatten(1), shares.sum(dim=-2).flatten(1)], dim=-1)
        shrink = (-shrink / lengths.square()).where(lengths > _SHORTEST, 0).to(dtype).unsqueeze(1)

        # Of the pixels.
        to_qkv = torch.empty_like(qkv)
        to_queries, to_keys, to_values = to_qkv.chunk(3, dim=-1)
        torch.mul(qkv[..., : 2 * channels], shrink, out=to_qkv[..., : 2 * channels])
        to_queries.baddbmm_(keys, to_gram.transpose(1, 2))
        to_keys.baddbmm_(queries, to_gram)
        torch.bmm(gradient, _mixing(attention, weight, dtype), out=to_values)
        return to_qkv, to_temperature, to_weight
