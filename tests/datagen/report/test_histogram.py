"""Histograms in bounded memory, and their drawing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from datagen.report.histogram import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Histogram, Limit, chart
from datagen.report.words import Measure, measure_words

FLOATS = arrays.arrays(np.float64, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32))
PLAIN, LOG = Measure("Noise", "grey levels", ""), Measure("Sharpness", "", "", log=True)


def filled(values: np.ndarray, pieces: int = 1, log: bool = False) -> Histogram:
    histogram = Histogram(log)
    for piece in np.array_split(values, pieces):
        histogram.add(piece)
    return histogram


@settings(max_examples=30, deadline=None)
@given(FLOATS, st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_order_and_pieces_make_no_difference(values: np.ndarray, pieces: int, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(values)
    for one, other in zip(filled(values).contents(), filled(shuffled, pieces).contents()):
        assert np.array_equal(one, other)


def test_memory_is_bounded_and_no_value_is_lost() -> None:
    values = np.random.default_rng(0).lognormal(3, 4, 200_000)
    histogram = filled(values, 50)
    middles, counts = histogram.contents()
    assert len(middles) <= 4096 and counts.sum() == histogram.count == len(values)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    width = histogram._width
    for limit in np.quantile(values, [0.999, 0.9999]):
        assert (values < limit - width).sum() <= counts[middles < limit].sum() <= (values < limit + width).sum()


def test_what_is_not_finite_counts_as_not_there() -> None:
    histogram = filled(np.array([np.nan, np.inf, -np.inf, 1e300, 2.0]))
    assert histogram.count == 2 and histogram.contents()[1].sum() == 2


@settings(max_examples=50, deadline=None)
@given(FLOATS, st.floats(-1e7, 1e7), st.booleans(), st.booleans())
def test_a_chart_of_anything_stays_in_its_frame(values: np.ndarray, limit: float, lower: bool, log: bool) -> None:
    words = LOG if log else PLAIN
    drawn = chart("any", words, filled(np.abs(values) if log else values, log=log), [Limit(limit, lower, 0)])
    assert drawn.bars and drawn.count == len(values)
    for bar in drawn.bars:
        assert bar.x >= LEFT - 1 and bar.x + bar.width <= WIDTH - RIGHT + 1.5
        assert bar.y >= 0 and bar.y + bar.height <= HEIGHT - BOTTOM + 0.01
    assert all(
        LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        for x in [*(tick[0] for tick in drawn.ticks), *(line.x for line in drawn.lines)]
    )


def test_bars_on_the_wrong_side_of_a_limit_are_marked() -> None:
    values = np.repeat([10.0, 20.0, 30.0, 40.0], [1, 2, 3, 4])
    drawn = chart("noise", PLAIN, filled(values), [Limit(25.0, False, 7)])
    numbers = [int(bar.title.rpartition(": ")[2]) for bar in drawn.bars]
    assert numbers == [1, 2, 3, 4] and [bar.wrong for bar in drawn.bars] == [False, False, True, True]
    (line,) = drawn.lines
    assert line.inside and drawn.bars[1].x < line.x < drawn.bars[2].x
    drawn = chart("noise", PLAIN, filled(values), [Limit(9000.0, False, 0)])
    assert not drawn.lines[0].inside and "9,000" in drawn.lines[0].label


def test_whole_numbers_have_bars_of_their_own() -> None:
    drawn = chart("jpeg_quality", measure_words("jpeg_quality"), filled(np.array([75.0, 90, 95, 95])), [])
    assert [bar.title.rpartition(": ")[2] for bar in drawn.bars] == ["1", "1", "2"]


@pytest.mark.parametrize("name", ["score_pretty", "niqe"])
def test_every_measure_has_words(name: str) -> None:
    assert measure_words(name).title and measure_words(name).meaning
