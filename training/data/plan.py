"""Which sample stands at which position of the training stream: pure functions of the index and the seed.

The stream is endless: epoch after epoch, every sample exactly once in each, with no gap and no
padding where one epoch ends inside a batch. A position therefore says everything about progress,
and any number of ranks or workers can share the stream out by position.
"""

from dataclasses import dataclass

import numpy as np

from datagen.degradations.random import generator


@dataclass(frozen=True)
class StreamState:
    """Progress of a loader, whole and explicit: no worker, rank or buffer holds any more of it."""

    dataset_id: str
    seed: int
    samples_consumed: int  # over all ranks and epochs


def epoch_order(shard_of_sample: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """Order in which the samples of one epoch are read.

    Shards are shuffled, then samples within each run of ``window`` shards, so that at most that many
    shards are open at a time. Shards are fair samples of the corpus (``datagen pack`` shuffles it as
    a whole), so a window is one too.

    Args:
        shard_of_sample: int array [samples], the shard number of each sample in index order.
        seed: of the run.
        epoch: from 0.
        window: number of shards shuffled together.

    Returns:
        int64 array [samples], a permutation of the sample numbers.
    """
    rng = generator(seed, epoch, "epoch-order", 0)
    shards = np.unique(shard_of_sample)
    rank_of_shard = np.empty(int(shards.max(initial=-1)) + 1, dtype=np.int64)
    rank_of_shard[rng.permutation(shards)] = np.arange(len(shards))
    window_of_sample = rank_of_shard[shard_of_sample] // window
    return np.lexsort((rng.random(len(shard_of_sample)), window_of_sample))


def positions_of_batch(step: int, samples_per_batch: int, rank: int, world_size: int) -> range:
    """Stream positions that ``rank`` reads for the global batch of ``step``.

    The global batch of a step is the same set of positions whatever the world size.
    """
    share = samples_per_batch // world_size
    first = step * samples_per_batch + rank * share
    return range(first, first + share)
