"""A server as a team has it: users, runs in PostgreSQL, artifacts straight to S3, which the server never touches."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from infra.tracking import TrackingConfig, connect
from tests.infra.tracking.conftest import everything_below, only_run, points, settle
from tests.support.dataset import REPOSITORY
from tests.support.mlflow_server import MlflowServer
from tests.support.postgres import PostgresServer, postgres  # noqa: F401  (a fixture)
from tests.support.s3 import S3Server

PROGRAM = """
import sys
from pathlib import Path
from infra.tracking import Tracker, TrackingConfig

folder = Path(sys.argv[1])
for first in (1, 40):  # the second time as a run that resumes from a checkpoint some steps back
    tracker = Tracker(TrackingConfig(experiment="team"), "run", folder)
    tracker.log_params({"lr": first})
    for step in range(first, 61):
        tracker.log_metrics({"loss": 1 / step, "odd": float("nan") if step % 2 else 0.1 * step}, step)
    if first == 1:
        tracker.finish("KILLED")
(folder / "weights.bin").write_bytes(b"w" * 3_000_000)
tracker.log_artifact(folder / "weights.bin", "export")
(folder / "tracking" / "events.sent.json").write_text("{")  # the note of what was sent is damaged
tracker.finish()
"""


@pytest.mark.slow
def test_runs_in_postgresql_with_artifacts_straight_to_s3(
    postgres: PostgresServer,  # noqa: F811
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.take_over(monkeypatch)
    bucket = s3_server.new_bucket()
    options = ["--default-artifact-root", f"s3://{bucket}/mlflow", "--no-serve-artifacts", "--app-name", "basic-auth"]
    (tmp_path / "server").mkdir()
    password = secrets.token_hex(12)
    users = {
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }
    ours = (REPOSITORY / "infra/deploy/mlflow/auth.ini").read_text()
    (tmp_path / "auth.ini").write_text(ours.replace("/var/lib/mlflow/", f"{tmp_path}/server/"))
    server = MlflowServer(tmp_path / "server", postgres.uri, *options, environment=users)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    try:
        server.start()
        with pytest.raises(MlflowException, match="not authenticated"):
            connect(TrackingConfig(uri=server.uri)).search_experiments()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
            cwd=REPOSITORY,
            env={**os.environ, "MLFLOW_TRACKING_URI": server.uri},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        settle(tmp_path / "run")
        run = only_run(server.uri, "team")
        assert points(server.uri, run.info.run_id, "loss") == [(step, 1 / step) for step in range(1, 61)]
        assert [step for step, _ in points(server.uri, run.info.run_id, "odd")] == list(range(1, 61))
        assert run.data.params == {"lr": "1"} and run.info.status == "FINISHED"
        client = connect(TrackingConfig(uri=server.uri))
        assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "export")] == [
            "export/weights.bin"
        ]
        assert run.info.artifact_uri.startswith(f"s3://{bucket}/mlflow/")
    finally:
        server.kill()
    (stored,) = (s3_server.root / bucket).rglob("weights.bin")
    assert stored.stat().st_size == 3_000_000
    written = everything_below(tmp_path)
    for secret in (postgres.password, s3_server.secret, *users.values()):
        assert secret == str(tmp_path / "auth.ini") or secret.encode() not in written
