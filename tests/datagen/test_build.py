"""The promises of the whole: same bytes on any number of workers, wherever the pictures lie, whatever was killed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datagen.build import build
from datagen.config import DatagenConfig
from datagen.dataset import SELECTION, read_dataset_json, read_table
from datagen.source.embedded import materialise
from infra.storage import open_store
from tests.datagen.conftest import DEMO, run_datagen, shard_bytes
from tests.support.s3 import S3Server


def test_one_worker_and_another_folder_give_the_same_bytes_and_id(built: Path, tmp_path: Path) -> None:
    pictures = materialise(tmp_path / "elsewhere")
    out = tmp_path / "out"
    done = run_datagen(
        *("build", "--config", str(DEMO), f"source={pictures / 'pictures'}", f"out={out}"),
        *(f"leak_guard=[{pictures / 'held_out'}]", "num_cpus=1", "scan.pictures_per_piece=5"),
    )
    assert done.returncode == 0, done.stderr
    assert shard_bytes(out) == shard_bytes(built)
    assert read_dataset_json(open_store(out))["id"] == read_dataset_json(open_store(built))["id"]
    assert str(out) in done.stdout and "inputs = " in done.stdout


def test_pictures_and_dataset_in_a_bucket_give_the_same_bytes(
    built: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(materialise(tmp_path / "corpus"))
    out = f"s3://{s3_server.new_bucket()}/set"
    settings = [f"source=s3://{bucket}/pictures", f"leak_guard=s3://{bucket}/held_out", f"out={out}", "num_cpus=2"]
    done = run_datagen("build", "--config", str(DEMO), *settings, environment=s3_server.environment)
    assert done.returncode == 0, done.stderr
    store = open_store(out)
    assert {entry.key: store.read(entry.key) for entry in store.list("shards/")} == shard_bytes(built)
    assert read_dataset_json(store)["id"] == read_dataset_json(open_store(built))["id"]


def test_the_summary_tells_what_the_report_needs(built: Path) -> None:
    summary = json.loads((built / "curation" / "summary.json").read_text())
    assert set(summary) == {"scan", "select", "pack", "verify"}
    assert all(summary[step]["seconds"] > 0 for step in summary)
    assert summary["scan"]["work"]["images_per_second"] > 0
    assert summary["scan"]["cluster"]["CPU"] == 2.0
    counts = summary["select"]
    assert counts["inputs"] == counts["kept"] + sum(counts["rejected"].values()) + sum(counts["failed"].values())


@pytest.mark.slow
def test_the_leak_between_set5_and_bsd400_is_found(
    ray_cluster: None, real_data: Path, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    guards = [real_data / "benchmarks" / name for name in ("set5", "cbsd68")]
    config = make_config(
        tmp_path,
        [f"source={real_data / 'bsd400'}", f"leak_guard=[{guards[0]}, {guards[1]}]", "scan.pictures_per_piece=32"],
    )
    store = build(config)
    rows = read_table(store, SELECTION).to_pylist()
    leaks = {row["source"]: row["partner"] for row in rows if row["reason"] == "leak"}
    assert leaks == {"source-0/302003.jpg": "guard-0/img_005.png"}
    assert sum(row["verdict"] == "kept" for row in rows) > 390
