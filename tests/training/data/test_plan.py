"""The order of the stream: exactly once an epoch, few shards at a time, the same from wherever it is entered."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.plan import SampleOrder, positions_of_batch

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
    per_rank=st.integers(1, 4),
    chain=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 5)), min_size=1, max_size=6),
)
def test_any_chain_of_world_sizes_reads_each_position_once(per_rank: int, chain: list[tuple[int, int]]) -> None:
    """A run killed after some steps and resumed with another number of ranks goes on where it was."""
    batch, step, read = per_rank * 4, 0, []
    for world_size, steps in chain:
        for done in range(step, step + steps):
            read += [p for rank in range(world_size) for p in positions_of_batch(done, batch, rank, world_size)]
        step += steps
    assert read == list(range(step * batch))
