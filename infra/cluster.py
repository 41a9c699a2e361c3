"""Joining or starting a Ray cluster, and running many small tasks on it."""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray

from infra.errors import Refusal

# Every task is one core's work: libraries that spread over all cores would make N tasks fight over them.
_THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
# Tasks here exchange file names and counts; Ray's default would reserve 30 % of the machine's memory.
_LOCAL_OBJECT_STORE_BYTES = 256 * 1024**2

# One for the life of the process: Ray reads it once.
_TOKEN = secrets.token_hex(32)

Item = TypeVar("Item")
Result = TypeVar("Result")


class ClusterError(Refusal, RuntimeError):
    """The cluster cannot be reached, or cannot run the tasks."""


@contextlib.contextmanager
def connect(num_cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Join the cluster that RAY_ADDRESS names (a Ray job finds its own there), else start a local one.

    Yields the cluster's total resources. Only what was started here is shut down; a connection that the process
    already has is used as it is. ``num_cpus`` sizes a local cluster and says nothing to one that is joined.

    Raises:
        ClusterError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        # A variable that the job sets itself must not be set again: Ray refuses to merge the two.
        variables = {name: "1" for name in _THREAD_COUNTS if name not in os.environ}
        options |= {"address": address, "runtime_env": {"env_vars": variables}}
        surroundings: dict[str, str] = {}
    else:
        options |= {"address": "local", "num_cpus": num_cpus, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
        options |= {"include_dashboard": False}
        # Local workers inherit the environment, which starts them seconds sooner than a runtime_env does.
        surroundings = dict.fromkeys(_THREAD_COUNTS, "1") | _own_token()
    with _environment(surroundings):
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(f"RAY_ADDRESS={address or 'local'}: no Ray cluster to work on ({error})") from error
        try:
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


def _own_token() -> dict[str, str]:
    """A token for a private cluster that only this process and its workers know.

    Left to itself Ray would write one to ``~/.ray``, from when on every ``ray start`` of the user demands a token that
    ``ray job submit`` does not send by itself.
    """
    chosen = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return {} if chosen else {"RAY_AUTH_TOKEN": _TOKEN}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while. RAY_AUTH_MODE, which Ray sets itself, is put back too."""
    before = {name: os.environ.get(name) for name in (*variables, "RAY_AUTH_MODE")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def map_tasks(
    function: Callable[[Item], Result], items: Iterable[Item], *, in_flight_per_cpu: int = 2, retries: int = 3
) -> Iterator[Result]:
    """Run ``function(item)`` as one single-core Ray task an item; results come in the order of completion.

    A task whose worker dies is run again, up to ``retries`` times; an exception of ``function`` itself is raised here
    at once. Only a few tasks a core are in flight, so that millions of items cost no memory.
    """
    remote = ray.remote(function).options(num_cpus=1, max_retries=retries)
    pending: set[ray.ObjectRef] = set()
    waiting = iter(items)
    exhausted = False
    try:
        while True:
            limit = max(1, int(ray.cluster_resources().get("CPU", 1))) * in_flight_per_cpu
            while not exhausted and len(pending) < limit:
                try:
                    pending.add(remote.remote(next(waiting)))
                except StopIteration:
                    exhausted = True
            if not pending:
                return
            done, rest = ray.wait(list(pending), num_returns=1)
            pending = set(rest)
            try:
                results = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.WorkerCrashedError as error:
                raise ClusterError(f"a worker died {retries + 1} times at the same task: {error}") from None
            yield from results
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def launch_directory() -> Path:
    """The directory from which relative paths of a configuration are taken.

    That is the current one, except in a Ray job with a working directory: it runs in a copy that is deleted later,
    so paths are taken from where ``ray start`` was run on the driver's node.
    """
    here = Path.cwd()
    if "runtime_resources" not in here.parts:
        return here
    for parent in psutil.Process().parents():
        if parent.name() == "raylet":
            return Path(parent.cwd())
    raise ClusterError(f"{here}: a Ray job's own copy, and no raylet among the parent processes; give absolute paths")
