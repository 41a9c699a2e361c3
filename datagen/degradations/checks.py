"""Refusing bad input: the ranges of physical parameters, and what an image tensor must be."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4
"""How far a value may stray from [0, 1]: float32 arithmetic upstream may overshoot, a 0-255 image may not pass."""

PerSample = float | Sequence[float]
"""A parameter of a batched degradation: one number for the batch, or one a sample."""


@dataclass(frozen=True)
class Parameter:
    """A numeric parameter with its allowed range and unit.

    ``default`` is a number, the name of another parameter of the same step (same value as that one),
    or None when the parameter must be given.
    """

    name: str
    low: float
    high: float
    unit: str
    default: float | str | None = None
    integer: bool = False
    odd: bool = False

    @property
    def range(self) -> str:
        return f"[{self.low:g}, {self.high:g}] ({self.unit})"

    def check(self, value: Any) -> float | int:
        """Return ``value`` as int or float.

        Raises:
            ValueError: not a number, not whole where a whole number is needed, or out of range.
        """
        kind = "a whole number" if self.integer else "a number"
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (self.integer and value != int(value)):
            raise ValueError(f"{self.name} = {value!r}: expected {kind} in {self.range}")
        if not self.low <= value <= self.high:
            raise ValueError(f"{self.name} = {value:g}: outside the allowed {self.range}")
        if self.odd and value % 2 == 0:
            raise ValueError(f"{self.name} = {value:g}: must be odd")
        return int(value) if self.integer else float(value)

    def check_all(self, values: PerSample, count: int) -> list[float]:
        """``count`` checked values from one number or from one a sample."""
        many = [values] * count if isinstance(values, numbers.Real) else list(values)  # type: ignore[arg-type]
        if len(many) != count:
            raise ValueError(f"{self.name}: {len(many)} values for a batch of {count}")
        return [self.check(value) for value in many]

    def column(self, values: PerSample, like: Tensor) -> Tensor:
        """The checked values as an (N, 1, 1, 1) tensor that broadcasts over the batch ``like``."""
        checked = self.check_all(values, like.shape[0])
        return torch.tensor(checked, dtype=like.dtype, device=like.device).reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Option:
    """A parameter that takes one of a few values."""

    name: str
    allowed: tuple[str | bool | int, ...]
    default: str | bool | int | None = None

    @property
    def range(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.allowed)

    def check(self, value: Any) -> str | bool | int:
        """Return ``value``. Raises ValueError unless it is one of ``allowed`` (True is not 1)."""
        if not any(value == one and type(value) is type(one) for one in self.allowed):
            raise ValueError(f"{self.name} = {value!r}: expected {self.range}")
        return value


def check_images(x: Tensor, channels: int | None = None) -> None:
    """Refuse what is not a batch of images.

    Raises:
        TypeError: not a float32 or float64 tensor.
        ValueError: not (N, C, H, W), empty, another number of channels than ``channels``, not finite,
            or outside [0, 1] by more than ``TOLERANCE``.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"images must be a float32 or float64 tensor with values in [0, 1], got {found}")
    wanted = f"(N, {channels or 'C'}, H, W)"
    if x.ndim != 4 or (channels is not None and x.shape[1] != channels):
        raise ValueError(f"images must have shape {wanted}, got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"images are empty: shape {tuple(x.shape)}")
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images hold NaN or infinite values")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        hint = "; divide 8-bit images by 255" if high > 2 else ""
        raise ValueError(f"images must lie in [0, 1], found values from {low:g} to {high:g}{hint}")
