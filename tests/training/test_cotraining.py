"""Which variants a step trains."""

from collections import Counter
from itertools import pairwise

from training.cotraining import CotrainingConfig, variants_of_step
from training.models import DyNetConfig

MODEL = DyNetConfig()


def test_alternation_is_even_random_and_a_function_of_seed_and_step() -> None:
    config = CotrainingConfig(mode="alternate")
    drawn = [variants_of_step(config, MODEL, 7, step) for step in range(2000)]
    assert drawn == [variants_of_step(config, MODEL, 7, step) for step in range(2000)]
    counts = Counter(drawn)
    assert set(counts) == {("small",), ("large",)} and min(counts.values()) > 900
    changes = sum(a != b for a, b in pairwise(drawn))
    assert 900 < changes < 1100  # drawn, not L S L S
    assert drawn != [variants_of_step(config, MODEL, 8, step) for step in range(2000)]


def test_sandwich_trains_all_and_separate_one() -> None:
    assert variants_of_step(CotrainingConfig(mode="sandwich"), MODEL, 0, 3) == ("small", "large")
    assert variants_of_step(CotrainingConfig(mode="separate", variants=("large",)), MODEL, 0, 3) == ("large",)
