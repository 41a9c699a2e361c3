"""`ird track sync`: what is left of runs whose own processes are gone."""

import os
from pathlib import Path

import psutil
import pytest

from infra.launcher import free_port
from infra.tracking import TrackingConfig, connect
from infra.tracking.monitor import exclusive
from infra.tracking.spool import Spool, line_of
from infra.tracking.sync import SyncError, sync
from tests.infra.tracking.conftest import only_run, points


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/db.sqlite"
    connect(TrackingConfig(uri=uri)).search_experiments()
    return uri


def left_behind(folder: Path, uri: str, *, host: str = "", pid: int = 0, born: float = 0.0) -> Spool:
    """A run of one point whose process wrote no end."""
    spool = Spool(folder)
    spool.folder.mkdir(parents=True)
    body = {"session": "one", "key": f"ird-{folder.name}", "name": "run", "experiment": folder.name, "parent": ""}
    body |= {"uri": uri, "host": host or os.uname().nodename, "pid": pid, "born": born, "gpus": 0}
    spool.path.write_bytes(line_of(1_000, "start", body) + line_of(1_001, "metrics", {"loss": 1.0}, 1))
    return spool


def test_all_runs_below_a_folder_are_sent_and_the_dead_marked(uri: str, tmp_path: Path) -> None:
    me = psutil.Process()
    left_behind(tmp_path / "runs" / "dead", uri, pid=me.pid, born=1.0)  # the number belongs to another process now
    left_behind(tmp_path / "runs" / "alive", uri, pid=me.pid, born=me.create_time())
    left_behind(tmp_path / "runs" / "elsewhere", uri, host="another-host")
    first = {row.spool.parent.parent.name: row for row in sync([tmp_path])}
    assert {name: (row.sent, row.left, row.problem) for name, row in first.items()} == {
        "alive": (2, 0, ""),
        "dead": (3, 0, ""),  # its end as well
        "elsewhere": (2, 0, ""),
    }
    assert [only_run(uri, name).info.status for name in ("alive", "dead", "elsewhere")] == [
        "RUNNING",
        "FAILED",
        "RUNNING",
    ]
    dead = only_run(uri, "dead")
    assert dead.data.tags["ird.exit"].startswith("crashed") and dead.info.end_time == 1_001  # not the time of the sync
    again = {row.spool.parent.parent.name: row.sent for row in sync([tmp_path], close=True)}
    assert again == {"alive": 0, "dead": 0, "elsewhere": 1}
    assert only_run(uri, "elsewhere").info.status == "FAILED" and only_run(uri, "alive").info.status == "RUNNING"
    for name in again:
        assert points(uri, only_run(uri, name).info.run_id, "loss") == [(1, 1.0)]


def test_a_run_goes_to_another_server_when_asked(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr("infra.tracking.sync.backoff", lambda _: 0.0)
    left_behind(tmp_path / "moved", away)
    (row,) = sync([tmp_path])
    assert (row.sent, row.left) == (0, 3) and away in row.problem.replace(
        "host='127.0.0.1', port=", "http://127.0.0.1:"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (row,) = sync([tmp_path], here=True)
    assert (row.sent, row.left, row.problem) == (3, 0, "") and row.run_id == only_run(uri, "moved").info.run_id


def test_a_run_whose_monitor_is_at_work_is_left_to_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.tracking.sync._OTHERS", 0.1)
    spool = left_behind(tmp_path / "busy", uri)
    with exclusive(spool) as alone:
        assert alone
        (row,) = sync([tmp_path])
    assert (row.sent, row.left, row.problem) == (0, 2, "the run's own monitor is sending")


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match="no run was recorded here"):
        list(sync([tmp_path]))
    with pytest.raises(SyncError, match="no such folder"):
        list(sync([tmp_path / "none"]))
