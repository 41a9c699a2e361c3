"""Runs in a real MLflow database, and a run whose server is away."""

from pathlib import Path

import pytest

from infra.launcher import free_port
from infra.tracking import Tracker, TrackingConfig, connect, experiment_id


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/db.sqlite", experiment="test")


def test_params_points_tags_and_artifacts_arrive(settings: TrackingConfig, tmp_path: Path) -> None:
    tracker = Tracker(settings, "run", tmp_path)
    tracker.log_params({"model": {"dim": 12}, "steps": 3})
    for step in (1, 2):
        tracker.log_metrics({"loss": 1 / step, "overflow": float("inf")}, step)
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt")
    tracker.set_tags({"ird.stage": "test"})
    tracker.finish()
    client = connect(settings)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {"model.dim": "12", "steps": "3"}
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "loss")] == [(1, 1.0), (2, 0.5)]
    assert run.data.tags["ird.stage"] == "test" and run.info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(tracker.run_id)] == ["note.txt"]
    artifacts = client.get_experiment(experiment_id(client, settings)).artifact_location
    assert artifacts.startswith("file://") and "mlartifacts" in artifacts


def test_a_resumed_run_is_the_same_run_with_each_step_once(settings: TrackingConfig, tmp_path: Path) -> None:
    first = Tracker(settings, "run", tmp_path)
    first.log_params({"lr": 1})
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step)
    first.flush()
    resumed = Tracker(settings, "run", tmp_path)
    resumed.log_params({"lr": 2})
    for step in (2, 3, 4):
        resumed.log_metrics({"loss": float(step)}, step)
    resumed.finish()
    assert resumed.run_id == first.run_id
    history = connect(settings).get_metric_history(first.run_id, "loss")
    assert [m.step for m in history] == [1, 2, 3, 4]


def test_children_name_their_parent(settings: TrackingConfig, tmp_path: Path) -> None:
    parent = Tracker(settings, "parent", tmp_path / "parent")
    child = Tracker(settings.model_copy(update={"parent_run_id": parent.run_id}), "child", tmp_path / "child")
    assert connect(settings).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_other_ranks_do_nothing(settings: TrackingConfig, tmp_path: Path) -> None:
    tracker = Tracker(settings, "run", tmp_path, is_main=False)
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id == "" and list(tmp_path.iterdir()) == []


def test_an_absent_server_stops_nothing_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    tracker = Tracker(away, "run", tmp_path)
    tracker.log_params({"a": 1})
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("the run goes on") == 1 and "1 points could not be delivered" in said
