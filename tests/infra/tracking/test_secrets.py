"""No password or key is in anything that a run writes, says, or shows to `ps`."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from infra.tracking.client import masked
from tests.infra.tracking.conftest import everything_below, only_run, settle
from tests.support.dataset import REPOSITORY
from tests.support.mlflow_server import MlflowServer

PASSWORD, KEY, TOKEN = "s3cret-Passw0rd", "Aws+Secret/Key0123", "t0ken-of-the-server"
PROGRAM = """
import os
import sys
from pathlib import Path
from infra.tracking import HostMetrics, Tracker, TrackingConfig

folder = Path(sys.argv[1])
settings = TrackingConfig(experiment="secrets")
tracker = Tracker(settings, "run", folder)
host = HostMetrics(settings, folder, interval=0.2)
uri, key, token = (os.environ[n] for n in ("MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"))
tracker.log_params({"uri": uri, "store": {"url": f"s3://me:{key}@bucket"}})
tracker.set_tags({"note": f"key {key}", "argv": f"--token={token}"})
tracker.log_metrics({"loss": 1.0}, 1)
tracker.log_artifact(folder / "not there")
print("ready", flush=True)
sys.stdin.readline()
host.stop()
tracker.finish()
"""


def test_no_secret_anywhere(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": mlflow_server.uri.replace("://", f"://me:{PASSWORD}@"),
        "MLFLOW_TRACKING_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": KEY,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        shown = [" ".join(line) for p in psutil.process_iter() if str(folder) in " ".join(line := _command(p))]
        said, _ = process.communicate("\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and len(shown) == 3  # the program and its two monitors
    settle(folder)
    sync = [str(Path(sys.executable).with_name("ird")), "track", "sync", str(folder)]
    synced = subprocess.run(sync, env=environment, capture_output=True, text=True, timeout=120)
    assert synced.returncode == 0, synced.stdout + synced.stderr
    run = only_run(mlflow_server.uri, "secrets")
    assert run.data.params["uri"].startswith("http://***@127.0.0.1") and run.data.tags["note"] == "key ***"
    written = everything_below(folder) + everything_below(mlflow_server.log.parent)
    written += "\n".join([*shown, said, synced.stdout, synced.stderr]).encode()
    assert b"***@127.0.0.1" in written  # it is the place to look in
    for secret in (PASSWORD, KEY, TOKEN):
        assert secret.encode() not in written


def test_a_server_of_another_password_is_not_asked_by_sync(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://me:other@127.0.0.1:1"}
    (tmp_path / "tracking").mkdir()
    start = (
        '{"at":1,"start":{"session":"a","key":"ird-x","uri":"http://***@10.0.0.1:5000","host":"b","pid":1,"born":0}}\n'
    )
    (tmp_path / "tracking" / "events.jsonl").write_text(start)
    command = [str(Path(sys.executable).with_name("ird")), "track", "sync", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "set MLFLOW_TRACKING_URI to it, with its password" in done.stdout
    none = subprocess.run([*command[:-1], str(tmp_path / "none")], capture_output=True, text=True, timeout=120)
    assert none.returncode == 2 and "no such folder" in none.stderr and "Traceback" not in none.stderr


def test_short_words_are_not_taken_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "abc")
    assert masked("abc is abc") == "abc is abc"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p%40ssword")
    assert masked("p@ssword http://a:b@c") == "*** http://***@c"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
