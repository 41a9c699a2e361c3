"""Curations in a real MLflow database, and one whose server is away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datagen.config import DatagenConfig
from datagen.dataset import SUMMARY, read_dataset_json, read_json
from datagen.progress import Progress
from datagen.report import write_report
from datagen.watch import RUN, record_result, watched
from infra.launcher import free_port
from infra.storage import open_store
from infra.tracking import TrackingConfig, connect
from tests.support.s3 import S3Server


@pytest.fixture
def tracked(copied: Path, tmp_path: Path, make_config: Callable[..., DatagenConfig]) -> DatagenConfig:
    """The configuration of a copy of the demo dataset, with MLflow on SQLite."""
    return make_config(copied, [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "tracking.experiment=curations"])


def run_of(config: DatagenConfig) -> tuple[Any, Any]:
    """The client and the run on record."""
    assert config.tracking
    client = connect(config.tracking)
    return client, client.get_run(read_json(open_store(config.out), RUN)["run_id"])


def work(pictures: int) -> None:
    progress = Progress("scan", pictures, "images")
    progress.advance(pictures, figures={"megapixels_per_second": 3.5, "measured_share": 0.75})
    progress.finish()


def test_the_run_of_a_dataset_holds_its_settings_counts_and_report(tracked: DatagenConfig) -> None:
    store = open_store(tracked.out)
    with watched(tracked, store):
        work(23)
    write_report(store)
    record_result(tracked, store)
    client, run = run_of(tracked)
    dataset, counts = read_dataset_json(store), read_json(store, SUMMARY)["select"]
    metrics, params = run.data.metrics, run.data.params
    assert params["select.min_side"] == "256" and params["tiles.size"] == "256"
    assert not [name for name in params if name.startswith("tracking")]  # Its address may hold a password.
    assert metrics["scan.done"] == 23 and metrics["scan.measured_share"] == 0.75
    assert metrics["scan.megapixels_per_second"] == 3.5 and metrics["scan.images_per_second"] > 0
    assert metrics["kept"] == counts["kept"] and metrics["pictures"] == counts["inputs"]
    for verdict in ("rejected", "failed"):
        assert {name: metrics[f"{verdict}.{name}"] for name in counts[verdict]} == counts[verdict]
    assert {name: metrics[f"dataset.{name}"] for name in ("bytes", "samples", "shards")} == {
        name: dataset["totals"][name] for name in ("bytes", "samples", "shards")
    }
    assert metrics["verify.faults"] == 0
    assert run.data.tags["dataset_id"] == dataset["id"] and run.data.tags["stage"] == "datagen"
    assert run.data.tags["code_version"] and run.info.status == "FINISHED"
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_restarts_go_on_in_the_same_run_wherever_it_failed(tracked: DatagenConfig) -> None:
    store = open_store(tracked.out)
    with pytest.raises(RuntimeError, match="no disk"), watched(tracked, store):
        work(5)
        raise RuntimeError("no disk")
    first = run_of(tracked)[1]
    assert first.info.status == "FAILED" and first.data.metrics["scan.done"] == 5
    with pytest.raises(KeyboardInterrupt), watched(tracked, store):
        raise KeyboardInterrupt
    assert run_of(tracked)[1].info.status == "KILLED"
    with watched(tracked, store):
        work(23)
    last = run_of(tracked)[1]
    assert last.info.run_id == first.info.run_id
    assert last.info.status == "FINISHED" and last.data.metrics["scan.done"] == 23


def test_the_run_of_a_dataset_in_a_bucket_is_found_again(
    copied: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch,
    make_config: Callable[..., DatagenConfig],
) -> None:  # fmt: skip
    s3_server.take_over(monkeypatch)
    out = f"s3://{s3_server.bucket_from(copied)}"
    config = make_config(Path("unused"), [f"out={out}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"])
    store = open_store(out)
    for _ in range(2):
        with watched(config, store):
            work(1)
    assert config.tracking
    client = connect(config.tracking)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert len(client.search_runs([experiment.experiment_id])) == 1
    record_result(config, store)
    assert "dataset_id" in run_of(config)[1].data.tags


def test_a_server_that_is_away_changes_nothing(
    copied: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # Only for time: each try waits longer.
    tracking = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    config = DatagenConfig(out=str(copied), tracking=tracking)
    store = open_store(copied)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    with watched(config, store):
        work(3)
    record_result(config, store)
    assert {entry.key: store.read(entry.key) for entry in store.list()} == before
    assert "tracking: " in capfd.readouterr().out


def test_a_record_that_is_damaged_does_not_stop_the_curation(
    tracked: DatagenConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tracked.out)
    store.write(RUN, b"{")
    with watched(tracked, store):
        work(3)
    assert "JSONDecodeError" in capfd.readouterr().err


def test_without_tracking_nothing_is_recorded(copied: Path) -> None:
    config, store = DatagenConfig(out=str(copied)), open_store(copied)
    with watched(config, store):
        work(3)
    record_result(config, store)
    assert not store.exists(RUN)
