"""Histograms of measures over any number of pictures, and their drawing."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from datagen.report.words import Measure

# Geometry in SVG units, which are CSS pixels at full width.
WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 8, 8, 20, 22

_FINEST = 2.0**-16
_MOST_BINS = 4096
_BARS = 40
_FLOOR = 0.01  # The least value that a logarithmic axis tells from 0.
_CEILING = 1e13  # Beyond it the number of a finest bin would not fit.
# From so many values on, a share at either end is drawn in the outermost bar, so that a few do not squeeze all others.
_MANY = 1000
_OUTLIERS = 0.001
_REACH = 1.0  # A limit farther away than so many spans of the data is told by an arrow.


class Histogram:
    """How often which values occur, in at most ``_MOST_BINS`` bins: their width doubles whenever there would be more.

    So neither range nor number of values need to be known, and the order in which they come makes no difference.
    """

    def __init__(self, log: bool = False) -> None:
        self.log = log
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self._width = _FINEST
        self._bins = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        """Take in float values ``[N]``; those that are not finite count as not there."""
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self.count += len(values)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        places = np.clip(self.place(values), -_CEILING, _CEILING)
        bins = np.floor(places / self._width).astype(np.int64)
        self._merge(np.concatenate([self._bins, bins]), np.concatenate([self._counts, np.ones_like(bins)]))

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values lie on the axis."""
        return np.log10(np.maximum(values, _FLOOR)) if self.log else values

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        """Middle of each bin on the axis, rising, float64 ``[B]``, and how many values lie in it, int64 ``[B]``."""
        return (self._bins + 0.5) * self._width, self._counts

    def _merge(self, bins: np.ndarray, counts: np.ndarray) -> None:
        while True:
            self._bins, places = np.unique(bins, return_inverse=True)
            self._counts = np.bincount(places, weights=counts).astype(np.int64)
            if len(self._bins) <= _MOST_BINS:
                return
            self._width *= 2
            bins, counts = self._bins // 2, self._counts


class Limit(NamedTuple):
    """A limit of a gate and how many pictures lie on its wrong side. ``lower``: what is below it is wrong."""

    value: float
    lower: bool
    wrong: int


class Bar(NamedTuple):
    """A bar of a chart, in SVG units."""

    x: float
    y: float
    width: float
    height: float
    wrong: bool
    title: str


class Line(NamedTuple):
    """A limit as drawn, or the arrow to one that is beyond the edge (``inside`` is false then).

    ``anchor``: which point of the label is at ``x``: start, middle or end.
    """

    x: float
    label: str
    anchor: str
    inside: bool


@dataclasses.dataclass(frozen=True)
class Chart:
    """A histogram as the template draws it. Ticks are (x, label, where the text stands)."""

    name: str
    title: str
    meaning: str
    count: int
    limits: list[Limit]
    bars: list[Bar]
    lines: list[Line]
    ticks: list[tuple[float, str, str]]
    text: str


def chart(name: str, words: Measure, histogram: Histogram, limits: list[Limit]) -> Chart:
    """Draw a histogram that holds at least one value."""
    middles, counts = histogram.contents()
    marks = [float(histogram.place(np.array([limit.value]))[0]) for limit in limits]
    edges = _edges(middles, counts, histogram, marks, words.whole)
    heights = np.bincount(np.clip(np.searchsorted(edges, middles, side="right") - 1, 0, len(edges) - 2), counts)
    heights = np.pad(heights, (0, len(edges) - 1 - len(heights)))
    span = edges[-1] - edges[0]

    def x_of(place: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (place - edges[0]) / span, 2)

    bars = []
    room = HEIGHT - TOP - BOTTOM
    for low, high, number in zip(edges[:-1], edges[1:], heights.astype(int).tolist()):
        if not number:
            continue
        middle = (low + high) / 2
        wrong = any(middle < mark if limit.lower else middle > mark for mark, limit in zip(marks, limits))
        height = round(max(1.5, room * number / heights.max()), 2)
        left, right = x_of(low), x_of(high)
        title = f"{_number(_value(low, histogram))} to {_number(_value(high, histogram))}: {number:,}"
        bars.append(Bar(left + 0.4, HEIGHT - BOTTOM - height, max(1, right - left - 0.8), height, wrong, title))
    unit = f" {words.unit}" if words.unit else ""
    text = (
        f"{words.title}{unit and ' in' + unit}: {histogram.count:,} values from {_number(histogram.low)} to "
        f"{_number(histogram.high)}"
    )
    return Chart(
        name=name,
        title=words.title + (f", {words.unit}" if words.unit else ""),
        meaning=words.meaning,
        count=histogram.count,
        limits=limits,
        bars=bars,
        lines=[_line(limit, mark, edges, x_of) for limit, mark in zip(limits, marks)],
        ticks=[(x_of(place), label, _anchor(x_of(place), 20)) for place, label in _ticks(edges, histogram.log)],
        text=text,
    )


def _edges(
    middles: np.ndarray, counts: np.ndarray, histogram: Histogram, marks: list[float], whole: bool
) -> np.ndarray:
    """Edges of the bars on the axis, rising, so that the first limit in reach lies between two bars."""
    low, high = (float(histogram.place(np.array([value]))[0]) for value in (histogram.low, histogram.high))
    if histogram.count >= _MANY:
        share = np.cumsum(counts) / histogram.count
        low = max(low, float(middles[np.searchsorted(share, _OUTLIERS)]))
        high = min(high, float(middles[np.searchsorted(share, 1 - _OUTLIERS)]))
    if histogram.log and math.isclose(low, high):
        low, high = low - 0.2, high + 0.2
    elif math.isclose(low, high):
        margin = max(0.05 * abs(low), 1.0 if whole else 1e-3)
        low, high = low - margin, high + margin
    span = high - low
    near = [mark for mark in marks if low - _REACH * span <= mark <= high + _REACH * span]
    low, high = min([low, *near]), max([high, *near])
    step = (high - low) / _BARS
    if whole and not histogram.log:
        step = max(1.0, math.ceil(step))
    origin = near[0] if near else (math.floor(low) if whole and not histogram.log else low)
    first = math.floor((low - origin) / step - 1e-9)
    last = math.floor((high - origin) / step + 1e-9) + 1
    return origin + step * np.arange(first, last + 1)


def _line(limit: Limit, mark: float, edges: np.ndarray, x_of: Callable[[float], float]) -> Line:
    label = f"{'min' if limit.lower else 'max'} {_number(limit.value)}"
    if mark > edges[-1]:
        return Line(WIDTH - RIGHT, f"{label} →", "end", False)
    if mark < edges[0]:
        return Line(LEFT, f"← {label}", "start", False)
    x = x_of(mark)
    return Line(x, label, _anchor(x, 60), True)


def _anchor(x: float, margin: float) -> str:
    """Which point of a label is at ``x``, so that it does not leave the picture."""
    return "start" if x < margin else "end" if x > WIDTH - margin else "middle"


def _ticks(edges: np.ndarray, log: bool) -> list[tuple[float, str]]:
    low, high = float(edges[0]), float(edges[-1])
    if not log:
        return [(float(v), _number(float(v))) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
    subs = (1.0,) if high - low > 4 else (1.0, 3.0) if high - low > 2 else (1.0, 2.0, 5.0)
    values = [float(v) for v in LogLocator(subs=subs).tick_values(10**low, 10**high)]
    inside = [v for v in values if low <= math.log10(v) <= high]
    if len(inside) < 2:  # Less than an octave, where no round power lies.
        inside = [float(v) for v in MaxNLocator(4).tick_values(10**low, 10**high) if 10**low <= v <= 10**high]
    return [(math.log10(v), _number(v)) for v in inside]


def _value(place: float, histogram: Histogram) -> float:
    return float(10**place if histogram.log else place)


def _number(value: float) -> str:
    """Three figures, without an exponent where a person would not write one."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}"
