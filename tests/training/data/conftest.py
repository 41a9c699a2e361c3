"""A loader over a small dataset, and a dataset with a damaged sample."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datagen.degradations import load_recipe
from tests.support.dataset import REPOSITORY
from training.config import DataConfig
from training.corruption import degrade_by_recipe
from training.data.loader import make_loader
from training.data.plan import SampleOrder, StreamState
from training.data.shards import ShardReader

SEED, WINDOW = 5, 2


@pytest.fixture(scope="session")
def small_dataset(small_dataset: Path, once_per_run: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Shards of the photographs of IRD_REAL_DATA where that is set, else those of the default corpus."""
    if "IRD_REAL_DATA" not in os.environ:
        return small_dataset
    photographs = Path(os.environ["IRD_REAL_DATA"]) / "bsd400"

    def build(out: Path) -> None:
        command = [sys.executable, "-m", "datagen", "build", "--config", str(REPOSITORY / "configs/datagen/demo.yaml")]
        command += [f"source={photographs}", f"out={out}", "leak_guard=[]", "pack.samples_per_shard=64"]
        subprocess.run(command, check=True, capture_output=True, timeout=500)

    return once_per_run("photographs", build)


def loader(
    dataset: Path | str, *, consumed: int = 0, steps: int = 6, rank: int = 0, world_size: int = 1, **settings: Any
) -> Any:
    settings = {"patch": 32, "batch": 8, "crops_per_sample": 2, "window": WINDOW} | settings
    data = DataConfig(dataset=str(dataset), **settings)
    reader = ShardReader(data.dataset, data.cache, data.cache_gib, data.fetch, on_damage=data.on_damage)
    state = StreamState(reader.dataset_id, SEED, consumed)
    corrupt = partial(degrade_by_recipe, load_recipe("dynet_pretrain"))
    return make_loader(reader, data, state=state, steps=steps, corrupt=corrupt, rank=rank, world_size=world_size)


@pytest.fixture
def damaged(small_dataset: Path, tmp_path: Path) -> tuple[Path, str, str]:
    """(copy of the dataset with one bit flipped in the sixth sample of ``loader``'s stream, its key, its shard)."""
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    index = ShardReader(str(copy)).index
    _, sample = SampleOrder(index.first, SEED, WINDOW).at(5)
    shard, offset, size = index.shards[index.shard_of(sample)].key, int(index.offset[sample]), int(index.size[sample])
    data = bytearray((copy / shard).read_bytes())
    data[offset + size // 2] ^= 1
    (copy / shard).write_bytes(data)
    return copy, index.key(sample), shard
