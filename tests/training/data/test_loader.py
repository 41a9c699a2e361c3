"""Batches: the same for any number of ranks and workers, from wherever they are taken up, and none lost in silence."""

import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import ConfigError
from infra.storage import StorageError
from tests.support.s3 import S3Server
from tests.training.data.conftest import loader
from training.config import DataConfig
from training.corruption import shrink
from training.data.loader import batch_plan, make_loader
from training.data.plan import StreamState
from training.data.shards import DamagedSampleError, ShardReader

Batch = dict[str, Any]


def joined(shares: list[Batch]) -> Batch:
    return {
        **{name: torch.cat([share[name] for share in shares]) for name in ("clean", "degraded")},
        **{name: [one for share in shares for one in share[name]] for name in ("meta", "lost")},
    }


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(a[name], b[name]) for name in ("clean", "degraded"))
    return tensors and a["meta"] == b["meta"] and a["lost"] == b["lost"]


def test_batches_have_the_stated_form(small_dataset: Path) -> None:
    batch = next(iter(loader(small_dataset)))
    clean, degraded = batch["clean"], batch["degraded"]
    assert clean.shape == degraded.shape == (8, 3, 32, 32)
    assert clean.dtype == torch.uint8 and clean.is_contiguous(memory_format=torch.channels_last)
    assert degraded.dtype == torch.float32 and degraded.min() >= 0 and degraded.max() <= 1
    assert len(batch["meta"]) == 8 and all(meta["steps"] for meta in batch["meta"]) and batch["lost"] == []
    # Two crops of one sample are different patches with different degradations.
    first, second = batch["meta"][:2]
    assert first["key"] == second["key"] and first["steps"] != second["steps"]
    assert not torch.equal(clean[0], clean[1])


@pytest.fixture(scope="module")
def undisturbed(small_dataset: Path) -> list[Batch]:
    """The first ten global batches of four samples each, one process."""
    return list(loader(small_dataset, steps=10))


@given(
    chain=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 0, 2]), st.integers(1, 5)), min_size=1, max_size=4
    )
)
@settings(deadline=None, max_examples=12)
def test_kills_and_resizes_change_nothing(
    small_dataset: Path, undisturbed: list[Batch], chain: list[tuple[int, int, int]]
) -> None:
    """Runs of (ranks, workers, steps until killed), each from the state of the one before, read what one run reads."""
    step = 0
    for world_size, workers, steps in chain:
        end = min(step + steps, len(undisturbed))
        # A killed run was ahead of what counts: loaders read on, and what they read is lost with them.
        ahead = min(end + 1, len(undisturbed))
        ranks: list[Iterator[Batch]] = [
            iter(loader(small_dataset, consumed=step * 4, steps=ahead, rank=rank, world_size=world_size, workers=w))
            for rank, w in zip(range(world_size), [workers] + [0] * world_size)
        ]
        for expected in undisturbed[step:end]:
            assert same(joined([next(batches) for batches in ranks]), expected)
        step = end


def test_workers_start_where_opencv_has_used_threads(small_dataset: Path, undisturbed: list[Batch]) -> None:
    """A forked worker that told OpenCV to stop its parent's threads would wait for them for ever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    cv2.resize(np.zeros((4000, 4000), np.float32), (1000, 1000), interpolation=cv2.INTER_AREA)
    try:
        assert same(next(iter(loader(small_dataset, workers=1))), undisturbed[0])
    finally:
        cv2.setNumThreads(before)


def test_every_sample_of_an_epoch_once(small_dataset: Path) -> None:
    samples = len(ShardReader(str(small_dataset)).index)
    batches = loader(small_dataset, patch=16, batch=1, crops_per_sample=1, steps=2 * samples, degrade_on="device")
    keys = [batch["key"][0] for batch in batches]
    assert set(Counter(keys[:samples]).values()) == {1} and set(Counter(keys).values()) == {2}
    assert keys[:samples] != keys[samples:]


def test_a_map_of_detail_draws_patches_with_more_of_it(small_dataset: Path) -> None:
    def read(crop: str) -> tuple[list[str], torch.Tensor]:
        batches = list(loader(small_dataset, steps=60, crop=crop, degrade_on="device"))
        return [key for batch in batches for key in batch["key"]], torch.cat([batch["clean"] for batch in batches])

    (keys, uniform), (same_keys, steered) = read("uniform"), read("detail")
    assert keys == same_keys and not torch.equal(uniform, steered)
    assert steered.float().std(dim=(2, 3)).mean() > uniform.float().std(dim=(2, 3)).mean()


def test_a_damaged_sample_stops_the_run_by_name(damaged: tuple[Path, str, str]) -> None:
    copy, key, shard = damaged
    with pytest.raises(DamagedSampleError, match=f"{shard}.*{key}.*datagen verify out="):
        list(loader(copy, steps=20))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_can_be_stood_in_for_and_is_counted(damaged: tuple[Path, str, str], workers: int) -> None:
    copy, key, shard = damaged
    samples = len(ShardReader(str(copy)).index)
    steps = 2 * samples
    batches = list(loader(copy, batch=1, crops_per_sample=1, steps=steps, workers=workers, on_damage="skip"))
    lost = [(at, one) for at, batch in enumerate(batches) for one in batch["lost"]]
    # Once in each epoch, at its position, and its place is taken by a sample that is whole.
    assert [one["key"] for _, one in lost] == [key, key] and {one["shard"] for _, one in lost} == {shard}
    assert all(at == one["position"] and batches[at]["meta"][0]["key"] != key for at, one in lost)
    assert [at // samples for at, _ in lost] == [0, 1]


def test_a_shard_that_vanishes_is_named_or_stood_in_for(small_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    index = ShardReader(str(copy)).index
    (copy / index.shards[0].key).unlink()
    with pytest.raises(DamagedSampleError, match=index.shards[0].key):
        list(loader(copy, steps=20))
    batches = list(loader(copy, batch=1, crops_per_sample=1, steps=len(index), on_damage="skip"))
    assert len(batches) == len(index)
    assert sum(len(batch["lost"]) for batch in batches) == int(index.first[1])


def test_state_of_another_dataset_and_uneven_batches_are_refused(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    data = DataConfig(dataset=str(small_dataset), patch=32, batch=8)
    with pytest.raises(ConfigError, match="was started on dataset"):
        make_loader(reader, data, state=StreamState("other", 0, 0), steps=1, corrupt=None)
    with pytest.raises(ConfigError, match="multiple of"):
        batch_plan(data, 3)


@pytest.mark.parametrize("fetch", ["shard", "sample"])
def test_a_bucket_gives_the_same_batches(
    small_dataset: Path,
    undisturbed: list[Batch],
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fetch: str,
) -> None:
    s3_server.take_over(monkeypatch)
    shutil.copytree(small_dataset, tmp_path / "copy")
    bucket = f"s3://{s3_server.bucket_from(tmp_path / 'copy')}"
    shares = [
        loader(bucket, steps=4, rank=rank, world_size=2, workers=1, cache=str(tmp_path / "cache"), fetch=fetch)
        for rank in range(2)
    ]
    for *ranks, expected in zip(*shares, undisturbed):
        assert same(joined(ranks), expected)


def test_lr_patches_are_bytes_and_of_the_right_size(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    data = DataConfig(dataset=str(small_dataset), patch=36, batch=2)
    state = StreamState(reader.dataset_id, 0, 0)
    batch = next(iter(make_loader(reader, data, state=state, steps=1, corrupt=partial(shrink, 3))))
    assert batch["degraded"].shape == (2, 3, 12, 12) and batch["degraded"].dtype == torch.uint8


def test_a_dataset_that_goes_away_is_no_damage(small_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    # Long enough to need shards that are not open yet.
    batches = iter(loader(copy, steps=len(ShardReader(str(copy)).index), on_damage="skip"))
    next(batches)
    shutil.rmtree(copy)
    with pytest.raises(StorageError, match="nothing is there any more"):
        list(batches)
