"""MLflow behind a small interface that the training loops call.

Points are collected in memory and sent in batches, because one ``log_metric`` call costs from
milliseconds (SQLite) to a quarter of a second (HTTP). Tracking never stops a run: what cannot be
delivered is kept and tried again at the next flush, and said once. Each delivered point is also
noted in a local file, so that a run that resumes from an older checkpoint does not log a step twice
(MLflow would append a second point).
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.config import Config
from infra.files import write_atomically

MAX_BATCH = 1000  # MLflow refuses more metrics in one call


class TrackingConfig(Config):
    """Where runs are recorded. Credentials come from MLflow's own environment variables, never from here."""

    enabled: bool = True
    # Empty: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db. MLflow refuses plain folders since 3.13.
    uri: str = ""
    experiment: str = "ird"
    parent_run_id: str = ""


def tracking_uri(settings: TrackingConfig) -> str:
    """The MLflow tracking URI that ``settings`` and the environment name."""
    default = f"sqlite:///{Path('runs/mlflow.db').absolute()}"
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default


def connect(settings: TrackingConfig) -> Any:
    """An ``mlflow.MlflowClient`` on the configured server or database, with short timeouts.

    Also makes the URI the process default, so that ``mlflow.pyfunc`` and the registry agree with it.
    """
    # MLflow's defaults block a caller for four minutes when the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    uri = tracking_uri(settings)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def experiment_id(client: Any, settings: TrackingConfig) -> str:
    """Find or create the experiment. For SQLite its artifacts lie beside the database, not in the working directory."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(settings.experiment)
    if found is not None:
        return str(found.experiment_id)
    uri = tracking_uri(settings)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(settings.experiment, artifact_location=location))
    except MlflowException:
        # Another process created it between the two calls.
        return str(client.get_experiment_by_name(settings.experiment).experiment_id)


class Tracker:
    """One MLflow run. Every method returns without raising, whatever the server does."""

    def __init__(self, settings: TrackingConfig, run_name: str, folder: Path, *, is_main: bool = True) -> None:
        """Open the run whose id lies in ``folder``/mlflow.json, or start one.

        Args:
            settings: where to record.
            run_name: name of a new run.
            folder: the run's own folder; the run id and the delivered points are kept there.
            is_main: false on every rank but 0: all methods then do nothing.
        """
        self.run_id = ""
        self._settings = settings
        self._run_name = run_name
        self._folder = folder
        self._client: Any = None
        self._pending: list[tuple[str, float, int, int]] = []
        self._delivered_until = -1
        self._warned = False
        self._active = is_main and settings.enabled
        if self._active:
            self._guard(self._open)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested mappings as dotted keys. On a resume the values first logged stand."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(params)]

        def send() -> None:
            known = self._client.get_run(self.run_id).data.params
            self._client.log_batch(self.run_id, params=[p for p in flat if p.key not in known])

        self._guard(send)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, replacing former values."""
        for key, value in tags.items():
            self._guard(lambda key=key, value=value: self._client.set_tag(self.run_id, key, str(value)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue points. They are sent by ``flush`` (or when a full batch has gathered)."""
        if not self._active or step <= self._delivered_until:
            return
        now = int(time.time() * 1000)
        # SQLite turns infinities into 1.8e308, which ruins every plot.
        self._pending += [(k, v if math.isfinite(v) else math.nan, now, step) for k, v in metrics.items()]
        if len(self._pending) >= MAX_BATCH:
            self.flush()

    def flush(self) -> None:
        """Send what is queued. What cannot be delivered stays queued."""
        from mlflow.entities import Metric

        while self._active and self._pending:
            batch = self._pending[:MAX_BATCH]
            if not self._guard(lambda batch=batch: self._client.log_batch(self.run_id, [Metric(*m) for m in batch])):
                return
            self._pending = self._pending[MAX_BATCH:]
            write_atomically(self._folder / "delivered.txt", str(max(step for *_, step in batch)).encode())

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file, or a folder with all it holds."""
        upload = "log_artifacts" if Path(path).is_dir() else "log_artifact"
        self._guard(lambda: getattr(self._client, upload)(self.run_id, str(path), folder or None))

    def finish(self, status: str = "FINISHED") -> None:
        """Flush and close the run with an MLflow status: FINISHED, FAILED or KILLED."""
        self.flush()
        if self._pending:
            print(f"tracking: {len(self._pending)} points could not be delivered to {tracking_uri(self._settings)}")
        self._guard(lambda: self._client.set_terminated(self.run_id, status))

    def _open(self) -> None:
        from mlflow.exceptions import MlflowException

        self._client = connect(self._settings)
        experiment = experiment_id(self._client, self._settings)
        note = self._folder / "mlflow.json"
        if note.exists():
            self.run_id = json.loads(note.read_text())["run_id"]
            try:
                self._client.update_run(self.run_id, status="RUNNING")
            except MlflowException:
                print(f"tracking: run {self.run_id} of {note} is not on this server; starting a new run")
            else:
                delivered = self._folder / "delivered.txt"
                if delivered.exists():
                    self._delivered_until = int(delivered.read_text())
                return
        tags = {"mlflow.parentRunId": self._settings.parent_run_id} if self._settings.parent_run_id else {}
        self.run_id = self._client.create_run(experiment, tags=tags, run_name=self._run_name).info.run_id
        (self._folder / "delivered.txt").unlink(missing_ok=True)
        write_atomically(note, json.dumps({"run_id": self.run_id}).encode())  # no URI: it may hold a password

    def _guard(self, call: Any) -> bool:
        """Run ``call``; on any failure say so once and carry on. True when it went through."""
        if not self._active:
            return False
        try:
            call()
        except Exception as error:  # a tracking fault of any kind must not stop training
            if not self._warned:
                print(
                    f"tracking: {type(error).__name__}: {str(error)[:300]} (the run goes on; see MLFLOW_TRACKING_URI)"
                )
                self._warned = True
            return False
        return True


def _flatten(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in params.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat
