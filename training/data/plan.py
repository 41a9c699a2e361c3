"""Which sample stands at which position of the training stream: a pure function of the index and the seed.

The stream is endless: epoch after epoch, every sample exactly once in each, with no gap and no padding where one
epoch ends inside a batch. A position therefore says everything about progress, and any number of ranks or workers
can share the stream out by position.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from datagen.degradations.random import generator


@dataclass(frozen=True)
class StreamState:
    """Progress of a loader, whole and explicit: no worker, rank or buffer holds any more of it."""

    dataset_id: str
    seed: int
    samples_consumed: int  # over all ranks and epochs


class SampleOrder:
    """The order in which samples are read, worked out one window of shards at a time.

    Each epoch shuffles the shards, then the samples of each run of ``window`` shards. At most that many shards are in
    use at a time, and a position anywhere costs the order of its window alone, never that of the whole epoch. Shards
    of ``datagen pack`` are fair samples of the corpus, so a window of them is one too; tars from elsewhere may not be,
    and want a window that spans what their order hides.
    """

    def __init__(self, first: np.ndarray, seed: int, window: int) -> None:
        """``first``: int64 [shards + 1], shard s holds the samples first[s] … first[s + 1] - 1; ``window``: shards."""
        self._first, self._seed, self._window = first, seed, window
        self.samples = int(first[-1])
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._inside: tuple[tuple[int, int], np.ndarray] | None = None

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at a position of the stream."""
        epoch, offset = divmod(position, self.samples)
        window, start = self._window_of(epoch, offset)
        if self._inside is None or self._inside[0] != (epoch, window):
            shards = self._shards(epoch, window)
            samples = np.concatenate([np.arange(self._first[s], self._first[s + 1]) for s in shards])
            shuffled = generator(self._seed, epoch, f"window:{window}", 0).permutation(samples)
            self._inside = ((epoch, window), shuffled)
        return epoch, int(self._inside[1][offset - start])

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window) of a position: what changes when other shards come into use."""
        epoch, offset = divmod(position, self.samples)
        return epoch, self._window_of(epoch, offset)[0]

    def shards_of(self, epoch: int, window: int) -> list[int]:
        """Shards of a window; of the first window of the next epoch, where ``window`` is past the last."""
        starts = self._opened(epoch)[1]
        if window >= len(starts) - 1:
            epoch, window = epoch + 1, 0
        return [int(shard) for shard in self._shards(epoch, window)]

    def _shards(self, epoch: int, window: int) -> np.ndarray:
        return self._opened(epoch)[0][window * self._window : (window + 1) * self._window]

    def _window_of(self, epoch: int, offset: int) -> tuple[int, int]:
        starts = self._opened(epoch)[1]
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return window, int(starts[window])

    def _opened(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the offset at which each window starts, and the last one ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = generator(self._seed, epoch, "shards", 0).permutation(len(self._first) - 1)
            ends = np.cumsum(np.diff(self._first)[shards])
            last = np.append(np.arange(self._window, len(shards), self._window), len(shards)) - 1
            self._epoch = (epoch, shards, np.append(0, ends[last]))
        return self._epoch[1], self._epoch[2]


@dataclass(frozen=True)
class Phase:
    """Steps ``first_step`` and later, until the next phase: patch side in pixels, samples in a global batch."""

    first_step: int
    patch: int
    samples: int


class BatchPlan:
    """Which stream positions each optimizer step reads, where patch and batch grow or shrink over the steps.

    The global batch of a step is the same set of positions for any number of ranks and of accumulated parts.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        """``phases``: by ``first_step``, the first at step 0."""
        self._phases = list(phases)
        steps = [later.first_step - phase.first_step for phase, later in pairwise(self._phases)]
        counts = [count * phase.samples for count, phase in zip(steps, self._phases)]
        self._consumed = list(accumulate(counts, initial=0))

    def phase_of(self, step: int) -> Phase:
        """The phase that ``step`` belongs to."""
        return self._phases[self._number(step)]

    def samples_before(self, step: int) -> int:
        """Samples that all steps before ``step`` read, over all ranks."""
        number = self._number(step)
        return self._consumed[number] + (step - self._phases[number].first_step) * self._phases[number].samples

    def step_after(self, samples: int) -> int:
        """The step that begins at stream position ``samples``.

        Raises:
            ValueError: no step begins there.
        """
        number = bisect_right(self._consumed, samples) - 1
        steps, inside = divmod(samples - self._consumed[number], self._phases[number].samples)
        if inside:
            raise ValueError(f"no step begins after {samples} samples")
        return self._phases[number].first_step + steps

    def positions(self, step: int, part: int, parts: int) -> range:
        """Stream positions of one of ``parts`` equal shares of the global batch of ``step``."""
        share = self.phase_of(step).samples // parts
        first = self.samples_before(step) + part * share
        return range(first, first + share)

    def _number(self, step: int) -> int:
        return bisect_right([phase.first_step for phase in self._phases], step) - 1
