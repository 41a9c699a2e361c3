"""Where runs are recorded, and a client that gives up soon."""

import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, field_validator

from infra.config import Config
from infra.errors import without_password

_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_SHORTEST_SECRET = 6  # a shorter one stands in too many innocent words


class TrackingConfig(Config):
    """Where runs are recorded. Credentials come from MLflow's own environment variables, never from here."""

    model_config = ConfigDict(hide_input_in_errors=True)

    enabled: bool = True
    # Empty: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db. MLflow refuses plain folders since 3.13.
    uri: str = ""
    experiment: str = "ird"
    parent_run_id: str = ""  # or `Tracker.reference` of a parent whose run is not made yet

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str) -> str:
        # A configuration is dumped, logged and stands on command lines.
        if re.search(r"://[^/@\s]*:[^/@\s]*@|[?&]password=", uri):
            raise ValueError(
                "holds a password, and configurations are written down; put the whole address into "
                "MLFLOW_TRACKING_URI, or the password into MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials"
            )
        return uri


def tracking_uri(settings: TrackingConfig) -> str:
    """The MLflow tracking URI that ``settings`` and the environment name."""
    default = f"sqlite:///{Path('runs/mlflow.db').absolute()}"
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default


def connect(settings: TrackingConfig) -> Any:
    """An ``mlflow.MlflowClient`` on the configured server or database, with short timeouts.

    Also makes the URI the process default, so that ``mlflow.pyfunc`` and the registry agree with it.
    """
    return connect_to(tracking_uri(settings))


def connect_to(uri: str) -> Any:
    """As ``connect``, for an address."""
    # MLflow's defaults block a caller for four minutes when the server is away.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return mlflow.MlflowClient(uri)


def experiment_id(client: Any, settings: TrackingConfig) -> str:
    """Find or create the experiment. For SQLite its artifacts lie beside the database, not in the working directory."""
    return experiment_id_at(client, settings.experiment, tracking_uri(settings))


def experiment_id_at(client: Any, name: str, uri: str) -> str:
    """As ``experiment_id``, for an address."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)  # another process created it between the two calls


def masked(text: str) -> str:
    """``text`` without the passwords of URLs, and without the credentials that stand in this process's environment."""
    text = without_password(text)
    address = urllib.parse.urlsplit(os.environ.get("MLFLOW_TRACKING_URI", ""))
    known = [os.environ.get(name, "") for name in _SECRETS] + [address.password or ""]
    for secret in (*known, *map(urllib.parse.unquote, known)):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text
