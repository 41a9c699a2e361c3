"""The order of the stream: exactly once an epoch, few shards at a time, the same from wherever it is entered."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.plan import BatchPlan, Phase, SampleOrder

counts = st.lists(st.integers(1, 7), min_size=1, max_size=9)


def order_of(shards: list[int], seed: int = 0, window: int = 2) -> SampleOrder:
    return SampleOrder(np.cumsum([0, *shards]), seed, window)


@given(shards=counts, seed=st.integers(0, 99), epoch=st.integers(0, 9), window=st.integers(1, 5))
@settings(deadline=None)
def test_an_epoch_is_a_permutation_and_opens_few_shards(shards: list[int], seed: int, epoch: int, window: int) -> None:
    order = order_of(shards, seed, window)
    positions = range(epoch * order.samples, (epoch + 1) * order.samples)
    drawn = [order.at(position) for position in positions]
    assert {e for e, _ in drawn} == {epoch}
    assert sorted(sample for _, sample in drawn) == list(range(order.samples))
    shard_of_sample = np.repeat(np.arange(len(shards)), shards)
    used: dict[tuple[int, int], set[int]] = {}
    for position, (_, sample) in zip(positions, drawn):
        used.setdefault(order.window_at(position), set()).add(int(shard_of_sample[sample]))
    # A window is done with before the next begins, holds at most so many shards, and says which.
    windows = [order.window_at(position) for position in positions]
    assert windows == sorted(windows)
    assert all(read == set(order.shards_of(*one)) and len(read) <= window for one, read in used.items())


@given(shards=counts, window=st.integers(1, 5), data=st.data())
@settings(deadline=None)
def test_a_position_holds_the_same_sample_however_it_is_reached(
    shards: list[int], window: int, data: st.DataObject
) -> None:
    walked = order_of(shards, window=window)
    stream = [walked.at(position) for position in range(3 * walked.samples)]
    jumping = order_of(shards, window=window)
    for position in data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=20)):
        assert jumping.at(position) == stream[position]


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = order_of([25] * 4, seed)
        return tuple(order.at(number * 100 + offset)[1] for offset in range(100))

    assert len({epoch(seed, number) for seed in (0, 1) for number in (0, 1)}) == 4


def test_the_window_after_the_last_is_the_first_of_the_next_epoch() -> None:
    order = order_of([3, 4, 5], window=2)
    assert order.shards_of(0, 2) == order.shards_of(1, 0)
    assert sorted(order.shards_of(0, 0) + order.shards_of(0, 1)) == [0, 1, 2]


@given(
    phases=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    chain=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(0, 5)), min_size=1, max_size=6
    ),
)
def test_any_chain_of_world_sizes_reads_each_position_once(
    phases: list[tuple[int, int]], chain: list[tuple[int, int, int]]
) -> None:
    """A run killed after some steps and resumed with another number of ranks, or of accumulated parts, goes on where
    it was, over batches that change their size."""
    starts = [0, *accumulate(steps for steps, _ in phases[:-1])]
    plan = BatchPlan([Phase(start, 8, 8 * unit) for start, (_, unit) in zip(starts, phases)])
    step, read = 0, list[int]()
    for world_size, parts, steps in chain:
        assert plan.samples_before(step) == len(read) and plan.step_after(len(read)) == step
        for done in range(step, step + steps):
            for part in range(world_size * parts):
                read += plan.positions(done, part, world_size * parts)
        step += steps
    assert read == list(range(len(read)))


def test_a_phase_says_the_patch_and_no_step_begins_inside_a_batch() -> None:
    plan = BatchPlan([Phase(0, 32, 8), Phase(3, 64, 2)])
    assert [plan.phase_of(step).patch for step in range(5)] == [32, 32, 32, 64, 64]
    assert [plan.samples_before(step) for step in range(6)] == [0, 8, 16, 24, 26, 28]
    for inside in (4, 25):
        with pytest.raises(ValueError, match="no step begins"):
            plan.step_after(inside)
