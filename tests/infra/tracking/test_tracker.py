"""What a run calls: in a real MLflow database, with a server that is away, and on a disk that is full."""

import json
import os
from pathlib import Path

import pytest

from infra.config import ConfigError, load_config
from infra.launcher import free_port
from infra.tracking import Tracker, TrackingConfig, connect, experiment_id
from infra.tracking import tracker as tracker_module
from infra.tracking.spool import Sessions, Spool
from tests.infra.tracking.conftest import points


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/db.sqlite", experiment="test")
    connect(settings).search_experiments()  # makes the tables, which takes longer than anything below
    return settings


def test_params_points_tags_and_artifacts_arrive(
    settings: TrackingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(settings, "run", tmp_path, gpus=2)
    tracker.log_params({"model": {"dim": 12}, "steps": 3})
    for step in (1, 2):
        tracker.log_metrics({"loss": 1 / step, "overflow": float("inf"), "psnr/σ=25": 30.0}, step)
    (tmp_path / "note.txt").write_text("hello")
    tracker.log_artifact(tmp_path / "note.txt")
    tracker.log_artifact(tmp_path / "never there")
    tracker.set_tags({"ird.stage": "test"})
    assert tracker.finish()
    client = connect(settings)
    run = client.get_run(tracker.run_id)
    assert run.data.params == {"model.dim": "12", "steps": "3"}
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "loss")] == [(1, 1.0), (2, 0.5)]
    assert run.data.metrics["psnr/__25"] == 30.0 and str(run.data.metrics["overflow"]) == "nan"
    said = capsys.readouterr().out
    assert said.count("overflow is inf at step 1; infinities are recorded as NaN") == 1
    assert said.count("the server refuses what") == 1 and "never there" in Spool(tmp_path).refused.read_text()
    assert run.data.tags["ird.stage"] == "test" and run.info.status == "FINISHED"
    assert run.data.tags["ird.exit"] == "finished" and float(run.data.tags["ird.gpu_hours"]) > 0
    assert [a.path for a in client.list_artifacts(tracker.run_id)] == ["note.txt"]
    artifacts = client.get_experiment(experiment_id(client, settings)).artifact_location
    assert artifacts.startswith("file://") and "mlartifacts" in artifacts
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == tracker.run_id


def test_a_resumed_run_is_the_same_run_with_each_step_once(settings: TrackingConfig, tmp_path: Path) -> None:
    first = Tracker(settings, "run", tmp_path)
    first.log_params({"lr": 1})
    for step in (1, 2, 3):
        first.log_metrics({"loss": float(step)}, step)
    first.finish("KILLED")
    resumed = Tracker(settings, "run", tmp_path)
    assert resumed.run_id == first.run_id
    resumed.log_params({"lr": 2})
    for step in (2, 3, 4):
        resumed.log_metrics({"loss": 10.0 * step}, step)
    resumed.log_metrics({"psnr": 30.0}, 2)  # another metric, whose steps are its own
    assert resumed.finish()
    assert points(settings.uri, first.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert points(settings.uri, first.run_id, "psnr") == [(2, 30.0)]
    run = connect(settings).get_run(first.run_id)
    assert run.data.params == {"lr": "1"} and run.info.status == "FINISHED"


def test_children_name_their_parent(settings: TrackingConfig, tmp_path: Path) -> None:
    parent = Tracker(settings, "parent", tmp_path / "parent")
    assert parent.reference == parent.run_id != ""
    child = Tracker(settings.model_copy(update={"parent_run_id": parent.run_id}), "child", tmp_path / "child")
    assert connect(settings).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    child.finish()
    parent.finish()


def test_other_ranks_do_nothing(settings: TrackingConfig, tmp_path: Path) -> None:
    tracker = Tracker(settings, "run", tmp_path, is_main=False)
    tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.finish()
    assert tracker.run_id == "" and list(tmp_path.iterdir()) == []


def test_an_absent_server_stops_nothing_and_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    tracker = Tracker(away, "run", tmp_path)
    tracker.log_params({"a": 1})
    tracker.log_metrics({"loss": 1.0}, 1)
    assert not tracker.flush() and not tracker.finish()
    assert tracker.run_id == "" and tracker.reference.startswith("ird-")
    said = capsys.readouterr().out
    # A start, a param, a point and the end.
    assert said.count("the run goes on") == 1 and "4 events could not be delivered" in said
    assert f"`ird track sync {tmp_path}` sends them" in said


def test_half_a_line_of_a_killed_process_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "start_monitor", lambda *_: None)
    monkeypatch.setattr(tracker_module, "_SILENCE", 0.0)
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path}/unused.db")
    first = Tracker(settings, "run", tmp_path)
    first.log_metrics({"loss": 1.0}, 1)
    spool = Spool(tmp_path)
    whole = spool.path.read_bytes()
    for torn in (b'{"at":5,"metrics":{"lo', b'{"at":5', b"\x00\x00\x00", b'{"at":"x","metrics":{}}\n', b"7\n"):
        spool.path.write_bytes(whole + torn)
        again = Tracker(settings, "run", tmp_path)
        again.log_metrics({"loss": 2.0}, 1)  # there already
        again.log_metrics({"loss": 3.0}, 2)
        events = list(spool.read())
        assert [event.kind for event in events] == ["start", "metrics", "start", "metrics"]
        assert [event.step for event in events if event.kind == "metrics"] == [1, 2]
        assert [event.at for event in events] == sorted(event.at for event in events)
        assert events[-1].end == spool.size() and Sessions(spool).latest == events[2].body["session"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_stops_nothing_and_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "start_monitor", lambda *_: None)
    monkeypatch.setattr(tracker_module, "_SILENCE", 0.0)
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{tmp_path}/unused.db"), "run", tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, tracker._descriptor)
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.log_params({"a": 1})
    tracker.finish()
    assert capsys.readouterr().out.count("No space left on device") == 1
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    nowhere = Tracker(TrackingConfig(), "run", blocked)
    nowhere.log_metrics({"loss": 1.0}, 1)
    assert nowhere.finish() and "nothing is recorded" in capsys.readouterr().out


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        load_config(TrackingConfig, overrides=["uri=http://me:s3cret-word@host:5000"])
    assert "s3cret" not in str(refused.value)
    with pytest.raises(ValueError, match="holds a password") as direct:
        TrackingConfig(uri="postgresql://me:s3cret-word@host/db")
    assert "s3cret" not in str(direct.value)
    assert TrackingConfig(uri="postgresql://me@host/db").uri
