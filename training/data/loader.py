"""Batches of (degraded, clean) patches, each a pure function of (seed, stream position)."""

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datagen.degradations.random import generator
from infra.config import ConfigError
from training.config import DataConfig
from training.corruption import Corruption
from training.data.patches import cut_patches, detail_map
from training.data.plan import BatchPlan, Phase, SampleOrder, StreamState
from training.data.shards import DamagedSampleError, LostSample, Sample, ShardReader

_STAND_INS = 16


class PatchStream(Dataset[dict[str, Any]]):
    """The patches at given positions of the training stream."""

    def __init__(self, reader: ShardReader, data: DataConfig, seed: int, corrupt: Corruption | None) -> None:
        """Without ``corrupt`` the patches stay clean: nothing degrades them, or the device does."""
        self._reader, self._data, self._seed, self._corrupt = reader, data, seed, corrupt
        self._order = SampleOrder(reader.index.first, seed, data.window)
        self._window: tuple[int, int] | None = None

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """A batch, as ``make_loader`` describes it, of (stream position, side of the patches) for each sample.

        The torch loader hands over those of a batch at once.
        """
        positions, patch = [position for position, _ in places], places[0][1]
        self._look_ahead(positions[-1])
        drawn = [self._order.at(position) for position in positions]
        samples, lost = self._read([sample for _, sample in drawn], positions)
        crops: list[np.ndarray] = []
        depths: list[np.ndarray | None] = []
        keys: list[str] = []
        epochs: list[int] = []
        for (epoch, _), sample in zip(drawn, samples, strict=True):
            count = self._data.crops_per_sample
            rng = generator(self._seed, epoch, f"crops:{sample.key}", 0)
            detail = detail_map(sample.json) if self._data.crop == "detail" else None
            try:
                patches, far = cut_patches(sample.image, sample.depth, patch, count, rng, detail)
            except ValueError as error:
                raise DamagedSampleError(f"{self._reader.store.uri}: sample {sample.key}: {error}") from error
            crops += patches
            depths += [*far] if far is not None else [None] * count
            keys += [sample.key] * count
            epochs += [epoch] * count
        batch: dict[str, Any] = {
            # Channels last in memory, as pictures are decoded.
            "clean": torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2),
            "key": keys,
            "epoch": epochs,
            "draw": list(range(self._data.crops_per_sample)) * len(samples),
            "depth": [None if far is None else torch.from_numpy(far.copy())[None] for far in depths],
            "lost": lost,
        }
        return batch if self._corrupt is None else degraded_batch(batch, self._corrupt, self._seed)

    def _read(self, numbers: Sequence[int], positions: Sequence[int]) -> tuple[list[Sample], list[dict[str, Any]]]:
        """The samples, others of the same windows in place of lost ones, and what was lost."""
        wanted = {"json": self._data.crop == "detail", "depth": self._data.depth}
        samples: list[Sample] = []
        lost: list[dict[str, Any]] = []
        for position, found in zip(positions, self._reader.read_many(numbers, **wanted), strict=True):
            if isinstance(found, LostSample):
                if self._data.on_damage == "stop":
                    raise DamagedSampleError(found.reason)
                lost.append({"position": position, "key": found.key, "shard": found.shard, "reason": found.reason})
                found = self._stand_in(position, found, wanted)
            samples.append(found)
        return samples, lost

    def _stand_in(self, position: int, lost: LostSample, wanted: dict[str, bool]) -> Sample:
        first = self._reader.index.first
        shards = self._order.shards_of(*self._order.window_at(position))
        rng = generator(self._seed, 0, "stand-in", position)
        for _ in range(_STAND_INS):
            shard = shards[int(rng.integers(len(shards)))]
            (found,) = self._reader.read_many([int(rng.integers(first[shard], first[shard + 1]))], **wanted)
            if isinstance(found, Sample):
                return found
        raise DamagedSampleError(f"{_STAND_INS} samples in place of a lost one are lost too. {lost.reason}")

    def _look_ahead(self, position: int) -> None:
        window = self._order.window_at(position)
        if window != self._window:
            self._window = window
            self._reader.prefetch(self._order.shards_of(*window))
            self._reader.prefetch(self._order.shards_of(window[0], window[1] + 1))


def degraded_batch(batch: dict[str, Any], corrupt: Corruption, seed: int) -> dict[str, Any]:
    """A clean batch with "degraded" and "meta" in place of what they are made from."""
    clean = batch["clean"]
    as_float = clean.float().div_(255).contiguous()
    depth = batch["depth"] if any(far is not None for far in batch["depth"]) else None
    degraded, meta = corrupt(
        as_float, seed=seed, epoch=batch["epoch"], keys=batch["key"], draw=batch["draw"], depth=depth
    )
    return {"clean": clean, "degraded": degraded, "meta": meta, "lost": batch["lost"]}


class _BatchPlaces(Sampler[list[tuple[int, int]]]):
    def __init__(self, plan: BatchPlan, steps: range, rank: int, world_size: int, accumulate: int) -> None:
        self._plan, self._steps = plan, steps
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            patch = self._plan.phase_of(step).patch
            for part in range(self._accumulate):
                number = part * self._world_size + self._rank
                positions = self._plan.positions(step, number, self._world_size * self._accumulate)
                yield [(position, patch) for position in positions]

    def __len__(self) -> int:
        return len(self._steps) * self._accumulate


def batch_plan(data: DataConfig, world_size: int, accumulate: int = 1) -> BatchPlan:
    """The plan of a run: what each step reads.

    Raises:
        ConfigError: a global batch cannot be shared out evenly.
    """
    unit = data.crops_per_sample * world_size * accumulate
    sizes = [("data", 0, data.patch, data.batch)]
    sizes += [(f"data.progressive[{n}]", p.from_step, p.patch, p.batch) for n, p in enumerate(data.progressive)]
    for key, _, _, batch in sizes:
        if batch % unit:
            raise ConfigError(
                f"{key}.batch={batch} must be a multiple of data.crops_per_sample x ranks x accumulate = "
                f"{data.crops_per_sample} x {world_size} x {accumulate}"
            )
    phases = [Phase(step, patch, batch // data.crops_per_sample) for _, step, patch, batch in sizes]
    return BatchPlan(phases)


def make_loader(
    reader: ShardReader,
    data: DataConfig,
    *,
    state: StreamState,
    steps: int,
    corrupt: Corruption | None,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> DataLoader[dict[str, Any]]:
    """Loader of this rank's batches from ``state`` up to optimizer step ``steps``, ``accumulate`` of them a step.

    A batch holds "clean" uint8 [B,3,P,P] (channels last in memory), B being the rank's share of the global batch,
    or of the part of it that is accumulated;
    "degraded" [B,3,p,p], uint8 where it has 8 bits, else float32 in [0, 1]; "meta", B dicts; and "lost", a dict for
    each sample that another one stands in for (``data.on_damage: skip``). With ``data.degrade_on: device``, and
    without ``corrupt``, it holds what ``degraded_batch`` needs instead of "degraded" and "meta".
    ``training.data.handover`` makes all of them into what a step takes. Any world size and worker count can take up
    any state: nothing that was consumed is read again.

    Raises:
        ConfigError: ``state`` belongs to another dataset, or the batch cannot be shared out evenly.
    """
    if state.dataset_id != reader.dataset_id:
        raise ConfigError(
            f"the run was started on dataset {state.dataset_id}, but {reader.store.uri} is {reader.dataset_id}"
        )
    plan = batch_plan(data, world_size, accumulate)
    if data.workers:
        _stop_opencv_threads()
    remaining = range(plan.step_after(state.samples_consumed), steps)
    sampler = _BatchPlaces(plan, remaining, rank, world_size, accumulate)
    return DataLoader(
        PatchStream(reader, data, state.seed, corrupt if data.degrade_on == "worker" else None),
        batch_sampler=sampler,
        num_workers=data.workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if data.workers else None,
        worker_init_fn=_single_threaded,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _single_threaded(worker: int) -> None:
    # Workers share the cores with the rank; OpenCV and torch would each take all of them.
    _stop_opencv_threads()
    torch.set_num_threads(1)


def _stop_opencv_threads() -> None:
    # Only where there may be some: a forked worker would wait for ever for those of its parent, which it has not got.
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
