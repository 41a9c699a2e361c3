"""Gates: one measure, one limit, one reason. They judge a picture by itself, so part by part of the inventory."""

import math
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from datagen.config import SelectConfig
from datagen.picture.quality import WHOLE_PICTURE_MEASURES
from infra.config import ConfigError


class Gate(NamedTuple):
    """Reject for ``reason`` when ``measure`` lies on the wrong side of ``limit`` (a field of SelectConfig)."""

    reason: str
    measure: str
    limit: str


GATES = (
    Gate("too_small", "shorter_side", "min_side"),
    Gate("too_elongated", "aspect", "max_aspect"),
    Gate("low_jpeg_quality", "jpeg_quality", "min_jpeg_quality"),
    Gate("low_bits_per_pixel", "jpeg_bits_per_pixel", "min_bits_per_pixel"),
    Gate("flat", "flat_fraction", "max_flat_fraction"),
    Gate("blurred", "laplacian_variance", "min_laplacian_variance"),
    Gate("low_entropy", "entropy", "min_entropy"),
    Gate("blocky", "blockiness", "max_blockiness"),
    Gate("noisy", "noise", "max_noise"),
    Gate("high_niqe", "niqe", "max_niqe"),
    Gate("overexposed", "overexposed", "max_overexposed"),
    Gate("underexposed", "underexposed", "max_underexposed"),
)

_COLUMNS = ("width", "height", "jpeg_quality", "bits_per_pixel", *WHOLE_PICTURE_MEASURES, "niqe")


class Bound(NamedTuple):
    """A gate with its limit at hand. ``lower``: what is below the limit is rejected, else what is above it.

    ``limit`` is NaN where the configuration sets none: nothing lies on the wrong side of NaN.
    """

    reason: str
    measure: str
    lower: bool
    limit: float

    def rejects(self, values: np.ndarray) -> np.ndarray:
        """Bool ``[N]`` of the measure's float64 ``[N]``; NaN, which stands for no measure, is not rejected."""
        return values < self.limit if self.lower else values > self.limit

    def detail(self, value: float) -> str:
        """Why a picture with this value was rejected, for people."""
        return f"{self.measure} {value:.4g} {'<' if self.lower else '>'} {self.limit:g}"


def bounds(config: SelectConfig) -> list[Bound]:
    """All gates of a configuration in the order in which they are asked: :data:`GATES`, then the learned scores."""
    found = []
    for gate in GATES:
        limit = getattr(config, gate.limit)
        found.append(Bound(gate.reason, gate.measure, gate.limit.startswith("min_"), _number(limit)))
    for name, limits in sorted(config.scores.items()):
        for limit, lower in ((limits.min, True), (limits.max, False)):
            if limit is not None:
                found.append(Bound(f"score_{name}", f"score_{name}", lower, limit))
    return found


def measure_columns(config: SelectConfig) -> list[str]:
    """What of the inventory :func:`measures` reads."""
    return [*_COLUMNS, *(["scores"] if config.scores else [])]


def measures(part: pa.Table, config: SelectConfig) -> dict[str, np.ndarray]:
    """Every measure that a gate looks at, by name, float64 ``[N]``; NaN where a picture has none."""
    values = {name: part.column(name).to_numpy().astype(np.float64) for name in _COLUMNS}
    width, height = values["width"], values["height"]
    values["shorter_side"] = np.minimum(width, height)
    values["aspect"] = np.maximum(width, height) / values["shorter_side"]
    values["jpeg_bits_per_pixel"] = np.where(np.isnan(values["jpeg_quality"]), np.nan, values["bits_per_pixel"])
    if config.scores:
        column = part.column("scores").combine_chunks()
        edges = column.offsets.to_numpy()
        inner = slice(edges[0], edges[-1])
        row = np.repeat(np.arange(len(column)), np.diff(edges))
        keys, scores = column.keys.to_numpy(zero_copy_only=False)[inner], column.items.to_numpy(zero_copy_only=False)
        for name in config.scores:
            values[f"score_{name}"] = np.full(len(column), np.nan)
            values[f"score_{name}"][row[keys == name]] = scores[inner][keys == name]
    return values


def require_scores(config: SelectConfig, scored: dict[str, int], measured: int) -> None:
    """Refuse limits for a score that not one of the ``measured`` pictures has; ``scored`` counts those that have it.

    Raises:
        ConfigError: with the key to set.
    """
    for name in sorted(config.scores):
        if measured and not scored.get(f"score_{name}"):
            raise ConfigError(
                f"select.scores.{name}: no picture of the inventory has this score; "
                f"name its function as scan.scores.{name}=module:function and run `python -m datagen scan`, "
                f"or take the limit out"
            )


def first_rejection(values: dict[str, np.ndarray], gates: list[Bound]) -> tuple[np.ndarray, np.ndarray]:
    """The first gate that rejects each picture, int16 ``[N]`` (-1: none), and the value it saw, float64 ``[N]``."""
    count = len(values["width"])
    first, seen = np.full(count, -1, dtype=np.int16), np.full(count, np.nan)
    for index, gate in enumerate(gates):
        fresh = gate.rejects(values[gate.measure]) & (first < 0)
        first[fresh] = index
        seen[fresh] = values[gate.measure][fresh]
    return first, seen


def _number(limit: float | None) -> float:
    return math.nan if limit is None else float(limit)
