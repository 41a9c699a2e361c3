"""The shard reader: exactly once, the same for any world size and worker count, and checked."""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datagen.degradations import load_recipe
from infra.config import ConfigError
from infra.storage import open_store
from tests.support.s3 import S3Server
from training.config import DataConfig
from training.corruption import degrade_by_recipe, shrink
from training.data.loader import crop_and_turn, keep_clean, make_loader, samples_per_batch
from training.data.plan import StreamState, epoch_order, positions_of_batch
from training.data.shards import DamagedSampleError, ShardReader


@given(
    shards=st.lists(st.integers(1, 7), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
    window=st.integers(1, 5),
)
@settings(deadline=None)
def test_an_epoch_is_a_permutation_and_opens_few_shards(shards: list[int], seed: int, epoch: int, window: int) -> None:
    shard_of_sample = np.repeat(np.arange(len(shards)), shards)
    order = epoch_order(shard_of_sample, seed, epoch, window)
    assert sorted(order) == list(range(len(shard_of_sample)))
    assert (order == epoch_order(shard_of_sample, seed, epoch, window)).all()
    read = shard_of_sample[order]
    # A window's shards are done with before the next window begins.
    seen = list(dict.fromkeys(read))
    first = {shard: int(np.argmax(read == shard)) for shard in seen}
    last = {shard: len(read) - 1 - int(np.argmax(read[::-1] == shard)) for shard in seen}
    open_at_once = [sum(first[s] <= i <= last[s] for s in seen) for i in range(len(read))]
    assert max(open_at_once) <= window


def test_epochs_and_seeds_differ() -> None:
    shard_of_sample = np.repeat(np.arange(4), 25)
    orders = {tuple(epoch_order(shard_of_sample, seed, epoch, 2)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


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


def loader(
    dataset: Path, *, consumed: int = 0, steps: int = 6, rank: int = 0, world_size: int = 1, workers: int = 0
) -> Any:
    reader = ShardReader(str(dataset))
    data = DataConfig(dataset=str(dataset), patch=32, batch=8, crops_per_sample=2, workers=workers)
    state = StreamState(reader.dataset_id, 5, consumed)
    corrupt = partial(degrade_by_recipe, load_recipe("dynet_pretrain"))
    return make_loader(reader, data, state=state, steps=steps, corrupt=corrupt, rank=rank, world_size=world_size)


def test_batches_have_the_stated_form(small_dataset: Path) -> None:
    batch = next(iter(loader(small_dataset)))
    for name in ("clean", "degraded"):
        assert batch[name].shape == (8, 3, 32, 32) and batch[name].dtype == torch.float32
        assert batch[name].min() >= 0 and batch[name].max() <= 1
    assert len(batch["meta"]) == 8 and all(meta["steps"] for meta in batch["meta"])
    assert not torch.equal(batch["clean"], batch["degraded"])


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (1, 2), (4, 1)])
def test_ranks_and_workers_change_nothing(small_dataset: Path, world_size: int, workers: int) -> None:
    whole = list(loader(small_dataset))
    shares = [list(loader(small_dataset, rank=r, world_size=world_size, workers=workers)) for r in range(world_size)]
    for step, batch in enumerate(whole):
        for name in ("clean", "degraded"):
            assert torch.equal(batch[name], torch.cat([share[step][name] for share in shares]))
        assert batch["meta"] == [meta for share in shares for meta in share[step]["meta"]]


def test_a_resume_goes_on_exactly(small_dataset: Path) -> None:
    whole = list(loader(small_dataset))
    rest = list(loader(small_dataset, consumed=3 * 4))
    assert len(rest) == 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a["degraded"], b["degraded"]) and a["meta"] == b["meta"]


def test_every_sample_of_an_epoch_once(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    samples = reader.samples.num_rows
    data = DataConfig(dataset=str(small_dataset), patch=16, batch=1)
    state = StreamState(reader.dataset_id, 0, 0)
    keys = [b["meta"][0]["key"] for b in make_loader(reader, data, state=state, steps=2 * samples, corrupt=keep_clean)]
    assert set(Counter(keys[:samples]).values()) == {1} and set(Counter(keys).values()) == {2}
    assert keys[:samples] != keys[samples:]


def test_a_damaged_shard_is_named(small_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    reader = ShardReader(str(copy))
    row = reader.samples.slice(0, 1).to_pylist()[0]
    shard = copy / "shards" / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedSampleError, match=row["shard"]):
        reader.read(0)


def test_state_of_another_dataset_and_uneven_batches_are_refused(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    data = DataConfig(dataset=str(small_dataset), patch=32, batch=8)
    with pytest.raises(ConfigError, match="was started on dataset"):
        make_loader(reader, data, state=StreamState("other", 0, 0), steps=1, corrupt=keep_clean)
    with pytest.raises(ConfigError, match="multiple of"):
        samples_per_batch(data, 3)


def test_remote_shards_come_through_a_bounded_cache(
    small_dataset: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.new_bucket()}/dataset")
    for entry in (local := open_store(small_dataset)).list():
        store.write(entry.key, local.read(entry.key))
    names = ShardReader(str(small_dataset)).samples["shard"].to_pylist()
    largest = max(e.size for e in local.list("shards/"))
    remote = ShardReader(store.uri, str(tmp_path), cache_gib=largest * 1.5 / 2**30)
    near = ShardReader(str(small_dataset))
    for sample in range(0, len(names), 2):
        assert remote.read(sample) == near.read(sample)
    assert len(list(tmp_path.rglob("*.tar"))) < len(set(names))


def test_lr_patches_are_eight_bit_and_of_the_right_size(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    data = DataConfig(dataset=str(small_dataset), patch=36, batch=2)
    state = StreamState(reader.dataset_id, 0, 0)
    batch = next(iter(make_loader(reader, data, state=state, steps=1, corrupt=partial(shrink, 3))))
    assert batch["degraded"].shape == (2, 3, 12, 12)
    levels = batch["degraded"] * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)


def test_crops_cover_all_orientations_and_small_pictures_are_padded() -> None:
    picture = np.arange(3 * 3 * 3, dtype=np.uint8).reshape(3, 3, 3)
    crops = {crop_and_turn(picture, 3, np.random.default_rng(i)).tobytes() for i in range(200)}
    assert len(crops) == 8
    assert crop_and_turn(picture, 5, np.random.default_rng(0)).shape == (5, 5, 3)
