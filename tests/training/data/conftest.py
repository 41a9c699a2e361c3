"""A loader over a small dataset, and a dataset with a damaged sample."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datagen.degradations import load_recipe
from training.config import DataConfig
from training.corruption import degrade_by_recipe
from training.data.loader import make_loader
from training.data.plan import StreamState
from training.data.shards import ShardReader


def loader(
    dataset: Path | str, *, consumed: int = 0, steps: int = 6, rank: int = 0, world_size: int = 1, **settings: Any
) -> Any:
    settings = {"patch": 32, "batch": 8, "crops_per_sample": 2, "window": 2} | settings
    reader = ShardReader(str(dataset), settings.get("cache", ""), on_damage=settings.get("on_damage", "stop"))
    data = DataConfig(dataset=str(dataset), **settings)
    state = StreamState(reader.dataset_id, 5, consumed)
    corrupt = partial(degrade_by_recipe, load_recipe("dynet_pretrain"))
    return make_loader(reader, data, state=state, steps=steps, corrupt=corrupt, rank=rank, world_size=world_size)


@pytest.fixture
def damaged(small_dataset: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """(copy of the dataset with one bit of one sample flipped, its key, its shard)."""
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    index = ShardReader(str(copy)).index
    shard, offset, size = index.shards[0].key, int(index.offset[1]), int(index.size[1])
    data = bytearray((copy / shard).read_bytes())
    data[offset + size // 2] ^= 1
    (copy / shard).write_bytes(data)
    return copy, index.key(1), shard
