"""Batches of (degraded, clean) patches, each a pure function of (seed, stream position)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datagen.degradations.random import generator
from infra.config import ConfigError
from training.config import DataConfig
from training.data.plan import StreamState, epoch_order, positions_of_batch
from training.data.shards import ShardReader

# Makes the network's input from clean patches float32 [N,3,H,W] in [0, 1], given seed, epoch and one
# key a patch: (degraded, one meta a patch). It must be picklable and depend on nothing else.
Corruption = Callable[[torch.Tensor, int, int, Sequence[str]], tuple[torch.Tensor, list[dict[str, Any]]]]


def keep_clean(
    clean: torch.Tensor, seed: int, epoch: int, keys: Sequence[str]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """A corruption that changes nothing: for stages that degrade inside their own step."""
    return clean, [{"key": key} for key in keys]


def decode(data: bytes) -> np.ndarray:
    """Decode an encoded picture to RGB uint8 [H,W,3]."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise ValueError("not a picture that OpenCV reads")
    return picture


def crop_and_turn(picture: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """A random ``patch`` x ``patch`` crop in one of the eight orientations; small pictures are reflected outwards."""
    height, width = picture.shape[:2]
    if height < patch or width < patch:
        bottom, right = max(patch - height, 0), max(patch - width, 0)
        picture = np.pad(picture, ((0, bottom), (0, right), (0, 0)), mode="symmetric")
        height, width = picture.shape[:2]
    top, left = rng.integers(height - patch + 1), rng.integers(width - patch + 1)
    crop = np.rot90(picture[top : top + patch, left : left + patch], int(rng.integers(4)))
    return crop[:, ::-1] if rng.integers(2) else crop


class PatchStream(Dataset[dict[str, Any]]):
    """Item ``position`` of the training stream: the crops of one sample, clean and corrupted."""

    def __init__(self, reader: ShardReader, data: DataConfig, seed: int, corrupt: Corruption) -> None:
        self._reader, self._data, self._seed, self._corrupt = reader, data, seed, corrupt
        names = reader.samples["shard"].to_numpy(zero_copy_only=False)
        self._shard_of_sample = np.unique(names, return_inverse=True)[1]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``{"clean": [K,3,P,P], "degraded": [K,3,p,p], "meta": K dicts}`` of the sample at ``position``."""
        epoch, index = divmod(position, len(self._shard_of_sample))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._shard_of_sample, self._seed, epoch, self._data.window))
        key, data = self._reader.read(int(self._order[1][index]))
        picture = decode(data)
        keys = [f"{key}#{k}" for k in range(self._data.crops_per_sample)]
        crops = [crop_and_turn(picture, self._data.patch, generator(self._seed, epoch, f"crop:{k}", 0)) for k in keys]
        clean = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255).contiguous()
        degraded, meta = self._corrupt(clean, self._seed, epoch, keys)
        return {"clean": clean, "degraded": degraded, "meta": meta}


class _BatchPositions(Sampler[list[int]]):
    def __init__(self, first_step: int, steps: int, samples_per_batch: int, rank: int, world_size: int) -> None:
        self._range = range(first_step, steps)
        self._share = (samples_per_batch, rank, world_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(positions_of_batch(step, *self._share)) for step in self._range)

    def __len__(self) -> int:
        return len(self._range)


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: torch.cat([item[name] for item in items]) for name in ("clean", "degraded")}
    batch["meta"] = [meta for item in items for meta in item["meta"]]
    return batch


def samples_per_batch(data: DataConfig, world_size: int) -> int:
    """Samples that one global batch reads.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    unit = data.crops_per_sample * world_size
    if data.batch % unit:
        raise ConfigError(
            f"data.batch={data.batch} must be a multiple of "
            f"data.crops_per_sample x ranks = {data.crops_per_sample} x {world_size}"
        )
    return data.batch // data.crops_per_sample


def make_loader(
    reader: ShardReader,
    data: DataConfig,
    *,
    state: StreamState,
    steps: int,
    corrupt: Corruption,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[dict[str, Any]]:
    """Loader of this rank's batches from ``state`` up to optimizer step ``steps``.

    Batches are ``{"clean": float32 [B,3,P,P], "degraded": float32 [B,3,p,p], "meta": B dicts}`` with B the
    rank's share of the global batch. Any world size and worker count can take up any state: nothing
    that was consumed is read again.

    Raises:
        ConfigError: ``state`` belongs to another dataset, or the batch cannot be shared out evenly.
    """
    if state.dataset_id != reader.dataset_id:
        raise ConfigError(
            f"the run was started on dataset {state.dataset_id}, but {reader.store.uri} is {reader.dataset_id}"
        )
    share = samples_per_batch(data, world_size)
    sampler = _BatchPositions(state.samples_consumed // share, steps, share, rank, world_size)
    return DataLoader(
        PatchStream(reader, data, state.seed, corrupt),
        batch_sampler=sampler,
        num_workers=data.workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if data.workers else None,
        worker_init_fn=_single_threaded,
    )


def _single_threaded(worker: int) -> None:
    # Workers share the cores with the rank; OpenCV and torch would each take all of them.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
