"""A real server that is frozen, killed and started again while a real process logs: every point once, in order."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra.tracking import Tracker, TrackingConfig
from infra.tracking.spool import Spool
from tests.infra.tracking.conftest import only_run, points, settle
from tests.support.dataset import REPOSITORY
from tests.support.mlflow_server import MlflowServer

pytestmark = pytest.mark.slow


def start_logger(folder: Path, uri: str, steps: int, pause: float) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "started").unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.infra.tracking.logger", str(folder), str(steps), str(pause)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_all_there(uri: str, experiment: str, steps: int) -> None:
    run = only_run(uri, experiment)
    expected = [(step, 1 / step) for step in range(1, steps + 1)]
    assert points(uri, run.info.run_id, "loss") == expected
    assert [step for step, _ in points(uri, run.info.run_id, "lr")] == list(range(1, steps + 1))
    assert run.info.status == "FINISHED" and run.data.tags["ird.exit"] == "finished"
    assert run.data.params == {"steps": str(steps), "optimizer.lr": "0.0001"}


def test_frozen_then_killed_then_back(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    folder, steps = tmp_path / "outage", 1500
    process = start_logger(folder, mlflow_server.uri, steps, 0.02)
    try:
        wait_until((folder / "started").exists)
        time.sleep(1.0)
        mlflow_server.freeze()
        time.sleep(8.0)  # longer than a request may take: what it holds is answered to nobody
        mlflow_server.thaw()
        time.sleep(2.0)
        mlflow_server.kill()
        time.sleep(3.0)
        assert process.poll() is None  # it logs on
        mlflow_server.start()
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, said
    settle(folder)
    assert_all_there(mlflow_server.uri, "outage", steps)


def test_away_from_the_start_to_the_end_and_sent_later(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    folder = tmp_path / "away"
    mlflow_server.kill()
    try:
        process = start_logger(folder, mlflow_server.uri, 30, 0.0)
        said, _ = process.communicate(timeout=240)
    finally:
        mlflow_server.start()
    assert process.returncode == 0
    assert said.count("the run goes on") == 1
    assert f"`ird track sync {folder}` sends them" in said
    settle(folder)  # by its monitor, which goes on for a minute, or by sync
    ird = str(Path(sys.executable).with_name("ird"))
    sync = subprocess.run([ird, "track", "sync", str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert sync.returncode == 0, sync.stdout + sync.stderr
    assert str(Spool(folder).path) in sync.stdout
    assert_all_there(mlflow_server.uri, "away", 30)


def test_killed_at_any_moment_and_resumed_from_the_last_checkpoint(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    folder, steps = tmp_path / "kills", 200
    for number in range(4):
        process = start_logger(folder, mlflow_server.uri, steps, 0.02)
        try:
            wait_until((folder / "started").exists)
            time.sleep(0.3 + 0.37 * number)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    process = start_logger(folder, mlflow_server.uri, steps, 0.0)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    settle(folder)
    assert_all_there(mlflow_server.uri, "kills", steps)
    run = only_run(mlflow_server.uri, "kills")
    assert run.data.tags["ird.starts"] == "5"


def test_a_process_that_dies_is_marked_failed_and_nothing_stays_behind(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    folder = tmp_path / "dies"
    process = start_logger(folder, mlflow_server.uri, 10**6, 0.02)
    wait_until((folder / "started").exists)
    monitors = [p for p in psutil.process_iter() if str(folder) in " ".join(_command(p)) and p.pid != process.pid]
    assert len(monitors) == 1
    assert monitors[0] not in psutil.Process(process.pid).children(recursive=True)  # no launcher takes it along
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(monitors, timeout=120)
    assert not alive
    run = only_run(mlflow_server.uri, "dies")
    assert run.info.status == "FAILED" and run.data.tags["ird.exit"].startswith("crashed")
    assert run.info.end_time is not None


def test_a_monitor_that_was_killed_is_replaced(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    folder = tmp_path / "monitor"
    settings = TrackingConfig(uri=mlflow_server.uri, experiment="monitor")
    tracker = Tracker(settings, "run", folder)
    (monitor,) = [p for p in psutil.process_iter() if str(folder) in " ".join(_command(p))]
    monitor.kill()
    tracker.log_metrics({"loss": 1.0}, 1)
    wait_until(lambda: tracker.flush(1.0))
    tracker.finish()
    settle(folder)
    assert points(mlflow_server.uri, tracker.run_id, "loss") == [(1, 1.0)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
