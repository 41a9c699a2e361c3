from collections.abc import Callable
from pathlib import Path

import pytest

from datagen.config import DatagenConfig
from datagen.dataset import DatasetError, read_samples
from datagen.pack.plan import plan_identity, plan_shards
from infra.storage import open_store

MakeConfig = Callable[..., DatagenConfig]


def test_shards_are_even_shuffled_and_keep_a_pictures_tiles_together(built: Path, make_config: MakeConfig) -> None:
    store = open_store(built)
    plans = list(plan_shards(make_config(built), store).shards())
    sizes = [len(plan.samples) for plan in plans]
    assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1
    sources = [[sample.source for sample in plan.samples] for plan in plans]
    assert sorted(sources[0]) != sources[0]
    split = [source for source in set().union(*sources) if sum(source in shard for shard in sources) > 1]
    assert len(split) <= len(plans) - 1
    other = list(plan_shards(make_config(built, ["seed=1"]), store).shards())
    assert {s.key for p in plans for s in p.samples} == {s.key for p in other for s in p.samples}
    assert [s.key for p in plans for s in p.samples] != [s.key for p in other for s in p.samples]


def test_the_plan_is_what_was_packed_and_each_shard_knows_its_files(built: Path, make_config: MakeConfig) -> None:
    store = open_store(built)
    plan = plan_shards(make_config(built), store)
    packed = read_samples(store).to_pylist()
    assert [(p.name, s.key) for p in plan.shards() for s in p.samples] == [(r["shard"], r["key"]) for r in packed]
    assert plan.count == len(packed)
    (one,) = plan.shards(["ird-000001.tar"])
    assert one.pictures.keys() == {sample.source for sample in one.samples}


def test_a_target_in_bytes_evens_out_bytes_instead_of_samples(built: Path, make_config: MakeConfig) -> None:
    store = open_store(built)
    total = sum(read_samples(store).column("size").to_pylist())
    plan = plan_shards(make_config(built, [f"pack.bytes_per_shard={total // 4}"]), store)
    sizes = {row["key"]: row["size"] for row in read_samples(store).to_pylist()}
    held = [sum(sizes[sample.key] for sample in shard.samples) for shard in plan.shards()]
    assert 3 <= len(held) <= 8  # An estimate, not a promise.
    assert max(held) < 0.7 * total
    assert sum(held) == total


def test_the_identity_follows_everything_that_moves_a_byte(built: Path, make_config: MakeConfig) -> None:
    store = open_store(built)
    same = plan_identity(make_config(built), store)
    assert plan_identity(make_config(built, ["num_cpus=1", "scan.pictures_per_piece=3"]), store) == same
    for override in ("seed=1", "pack.samples_per_shard=3", "pack.crop=png"):
        assert plan_identity(make_config(built, [override]), store) != same


def test_nothing_kept_and_nothing_selected_are_said(copied: Path, make_config: MakeConfig) -> None:
    store = open_store(copied)
    store.delete("curation/selection.parquet")
    with pytest.raises(DatasetError, match="datagen select"):
        plan_shards(make_config(copied), store)
