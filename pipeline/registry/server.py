"""Asking an MLflow server or database about models, with answers that a person can act on."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import Refusal, without_password
from infra.tracking import TrackingConfig, connect, tracking_uri

_SQLITE = "sqlite:///"


class RegistryError(Refusal, RuntimeError):
    """The registry has no such thing, refused it, or does not answer. The message says what is there and what to do."""


class RegistryAwayError(RegistryError):
    """The registry cannot be reached at present."""


def connect_to_registry(settings: TrackingConfig) -> Any:
    """An ``mlflow.MlflowClient``, for asking: unlike ``connect`` it makes no new SQLite database.

    Raises:
        RegistryAwayError: the database file is not there.
    """
    uri = tracking_uri(settings)
    if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
        raise RegistryAwayError(f"no registry at {uri}: no such file; MLFLOW_TRACKING_URI chooses another one")
    return connect(settings)


@contextmanager
def explained(settings: TrackingConfig) -> Iterator[None]:
    """Turn MLflow's exceptions into one that names the server and fits on a line or two."""
    from mlflow.exceptions import MlflowException

    # Its bars count small files; a caller that pulls shows its own progress.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    except MlflowException as error:
        where, message = where_is(settings), without_password(str(error))
        if "failed with exception" in message or re.search(r"failed with error code 5\d\d", message):
            raise RegistryAwayError(
                f"MLflow at {where} does not answer; start the server, or set MLFLOW_TRACKING_URI: {message[:200]}"
            ) from None
        raise RegistryError(f"MLflow at {where} refused: {message[:500]}") from None


def where_is(settings: TrackingConfig) -> str:
    """The tracking URI without the password that it may hold."""
    return without_password(tracking_uri(settings))


def parse_model_uri(model_uri: str) -> tuple[str, int | None, str | None]:
    """Name, version and alias of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; one of the latter two is None.

    Raises:
        RegistryError: it is neither.
    """
    match = re.fullmatch(r"models:/([^/@:]+)(?:/(\d+)|@([^/@]+))", model_uri)
    if match is None:
        raise RegistryError(f"{model_uri!r}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, version, alias = match.groups()
    return name, int(version) if version else None, alias


def find_version(client: Any, name: str, version: int | None, alias: str | None, settings: TrackingConfig) -> int:
    """The version that is meant, once it is known to exist.

    Raises:
        RegistryError: no such model, version or alias; the message lists those that there are.
    """
    model = get_model(client, name, settings)
    if alias is not None:
        if alias not in model.aliases:
            there = ", ".join(f"{a} (version {v})" for a, v in sorted(model.aliases.items())) or "none"
            raise RegistryError(f"model {name} has no alias {alias!r} at {where_is(settings)}; its aliases: {there}")
        return int(model.aliases[alias])
    versions = sorted(int(found.version) for found in client.search_model_versions(f"name='{name}'"))
    if version is None or version not in versions:
        there = ", ".join(map(str, versions)) or "none"
        raise RegistryError(f"model {name} has no version {version} at {where_is(settings)}; its versions: {there}")
    return version


def get_model(client: Any, name: str, settings: TrackingConfig) -> Any:
    """MLflow's registered model of that name.

    Raises:
        RegistryError: there is none; the message lists those that there are.
    """
    model = if_there(lambda: client.get_registered_model(name))
    if model is None:
        there = ", ".join(sorted(model.name for model in all_models(client))) or "none"
        raise RegistryError(
            f"no model {name!r} at {where_is(settings)}; models there: {there}. "
            "MLFLOW_TRACKING_URI chooses another server or database"
        )
    return model


def if_there(ask: Callable[[], Any]) -> Any | None:
    """What MLflow answers, or None when it says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def all_models(client: Any) -> list[Any]:
    """Every registered model, page by page."""
    page = client.search_registered_models()
    models = list(page)
    while page.token:
        page = client.search_registered_models(page_token=page.token)
        models += page
    return models
