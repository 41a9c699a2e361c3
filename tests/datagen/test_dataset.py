from pathlib import Path

import pytest

from datagen.dataset import (
    SAMPLES_SCHEMA,
    SHARDS_SCHEMA,
    DatasetError,
    canonical_json,
    dataset_id,
    read_dataset_json,
    read_samples,
    read_shards,
    sha256_of_object,
)
from infra.files import sha256_of_file
from infra.storage import open_store


def test_the_tables_have_the_published_schema(built: Path) -> None:
    store = open_store(built)
    samples, shards = read_samples(store), read_shards(store)
    assert samples.schema == SAMPLES_SCHEMA and shards.schema == SHARDS_SCHEMA
    assert sum(shards.column("samples").to_pylist()) == samples.num_rows >= 16
    totals = read_dataset_json(store)["totals"]
    assert (totals["samples"], totals["shards"]) == (samples.num_rows, shards.num_rows)


def test_the_id_depends_on_every_value(built: Path) -> None:
    store = open_store(built)
    samples, shards = read_samples(store), read_shards(store)
    identity = dataset_id(shards, samples)
    assert identity == read_dataset_json(store)["id"]
    assert dataset_id(shards, samples.slice(1)) != identity
    assert dataset_id(shards.slice(1), samples) != identity


def test_sha256_of_an_object_is_that_of_the_file(built: Path) -> None:
    assert sha256_of_object(open_store(built), "samples.parquet") == sha256_of_file(built / "samples.parquet")


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == canonical_json({"a": "ü", "b": 1}) == '{"a":"ü","b":1}'.encode()


def test_missing_dataset_and_foreign_table_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no finished dataset"):
        read_dataset_json(open_store(tmp_path / "nothing"))
    (copied / "samples.parquet").write_bytes((copied / "shards.parquet").read_bytes())
    with pytest.raises(DatasetError, match="not the table"):
        read_samples(open_store(copied))
