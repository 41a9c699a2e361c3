"""One MLflow server for all tests of a worker, and what they ask of it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import TrackingConfig, connect
from infra.tracking.spool import spools_below
from infra.tracking.sync import sync
from tests.support.mlflow_server import MlflowServer


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on SQLite. A test may kill or freeze it, and leaves it running."""
    server = MlflowServer(tmp_path_factory.mktemp("server")).start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a courier in this process sets for its own requests is put back after each test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric in order of its time, however often a step is there."""
    history = _patient_client(uri).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in sorted(history, key=lambda point: point.timestamp)]


def only_run(uri: str, experiment: str) -> Any:
    """The one run of an experiment; there must not be two."""
    client = _patient_client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def _patient_client(uri: str) -> Any:
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
    return connect(TrackingConfig(uri=uri))


def everything_below(folder: Path) -> bytes:
    """All that was written there."""
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def settle(folder: Path) -> None:
    """Come back when everything in the spools of a run has been delivered, however busy this machine is.

    A run that ends does not wait for ever; what it leaves is sent by its monitor, and after that by ``ird track sync``.
    """
    deadline = time.monotonic() + 300
    while any(spool.left() for spool in spools_below(folder)):
        assert time.monotonic() < deadline, [spool.delivery() for spool in spools_below(folder)]
        list(sync([folder]))
