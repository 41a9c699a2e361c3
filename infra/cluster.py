"""Joining or starting a Ray cluster, and running many small tasks on it."""

import collections
import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import ray

from infra.errors import Refusal

# Every task is one core's work: libraries that spread over all cores would make N tasks fight over them.
_THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
# Tasks here exchange file names and counts; Ray's default would reserve 30 % of the machine's memory.
_LOCAL_OBJECT_STORE_BYTES = 256 * 1024**2
# Deaths that say more of the node than of the task: a lost node, no memory left on it. A task may be the one to blame
# for either, so they are not forgiven for ever.
FORGIVEN = 5
_LOST = (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)
# Only while a task waits for its next try.
_POLL_SECONDS = 0.2
# Ray holds back what a signal handler raises until its wait is over: SIGTERM, or the limit of a test.
_HEED_SECONDS = 1.0

# By how much Ray lowers the priority of its workers.
_NICENESS = "RAY_worker_niceness"

# One for the life of the process: Ray reads it once.
_TOKEN = secrets.token_hex(32)

# A machine that is busy with something else misses Ray's limit of 30 s once in a while.
_STARTS = 3

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
        surroundings = dict.fromkeys(_THREAD_COUNTS, "1") | _own_token() | _own_priority()
    with _environment(surroundings):
        _join_or_start(options, address)
        try:
            yield ray.cluster_resources()
        finally:
            ray.shutdown()


def _join_or_start(options: dict[str, Any], address: str | None) -> None:
    for attempt in range(1 if address else _STARTS):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray has no type of its own for a node that does not come up within 30 s.
            ray.shutdown()
            if attempt == (0 if address else _STARTS - 1):
                where = f"RAY_ADDRESS={address}" if address else "this machine"
                raise ClusterError(f"{where}: no Ray cluster to work on ({error})") from error


def _own_token() -> dict[str, str]:
    """A token for a private cluster that only this process and its workers know.

    Left to itself Ray would write one to ``~/.ray``, from when on every ``ray start`` of the user demands a token that
    ``ray job submit`` does not send by itself.
    """
    chosen = any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return {} if chosen else {"RAY_AUTH_TOKEN": _TOKEN}


def _own_priority() -> dict[str, str]:
    """That the workers of a private cluster run at the priority of the command that waits for them.

    Left to itself Ray makes them 15 nicer, for a desktop's sake. Beside one other busy process a core that leaves them
    a thirtieth of it: on a machine at work, scans were seen to get 2 s of CPU time in 165 s.
    """
    return {_NICENESS: os.environ.get(_NICENESS, "0")}


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


@dataclasses.dataclass
class _Task(Generic[Item]):
    """An item, how often its worker died, how often that was forgiven, and when it may start (time.monotonic)."""

    item: Item
    deaths: int = 0
    forgiven: int = 0
    start: float = 0.0


def map_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    in_flight_per_cpu: int = 2,
    retries: int = 3,
    on_death: Callable[[Item, str], Iterable[Item]] | None = None,
) -> Iterator[Result]:
    """Run ``function(item)`` as one single-core Ray task an item; results come in the order of completion.

    A task whose worker dies (killed, crashed) is run again, up to ``retries`` times. After that, what
    ``on_death(item, why)`` returns is run instead, and may be nothing; without it the run ends. A lost node, or one
    without memory on which Ray ends whichever task is the youngest, says little about the task: up to ``FORGIVEN``
    such deaths cost none of its tries. An exception of ``function`` itself is raised here at once. Only a few tasks a
    core are in flight, so that millions of items cost no memory.

    Raises:
        ClusterError: the worker of one item died ``retries + 1`` times and ``on_death`` is not given, or Ray gave up.
    """
    # Ray's own retries are off: those after running out of memory have no end.
    remote = ray.remote(function).options(num_cpus=1, max_retries=0)
    fresh = (_Task(item) for item in items)
    again: collections.deque[_Task[Item]] = collections.deque()
    pending: dict[ray.ObjectRef, _Task[Item]] = {}
    try:
        while True:
            limit = max(1, int(ray.cluster_resources().get("CPU", 1))) * in_flight_per_cpu
            while len(pending) < limit and (task := _next_task(again, fresh)) is not None:
                pending[remote.remote(task.item)] = task
            if not pending and not again:
                return
            if not pending:
                time.sleep(_POLL_SECONDS)
                continue
            for reference in _wait(list(pending), _POLL_SECONDS if again else _HEED_SECONDS):
                task = pending.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    again.extend(_after_death(task, error, retries, on_death))
                else:
                    yield result
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _wait(references: list[ray.ObjectRef], seconds: float) -> list[ray.ObjectRef]:
    """The first that is done, if one is within that time."""
    try:
        return ray.wait(references, num_returns=1, timeout=seconds)[0]
    except SystemError as error:  # How C code reports what a signal handler raised meanwhile.
        raise (error.__cause__ or error) from None


def _next_task(again: collections.deque[_Task[Item]], fresh: Iterator[_Task[Item]]) -> _Task[Item] | None:
    """What is due of the tasks to run again, else the next new one."""
    for task in again:
        if task.start <= time.monotonic():
            again.remove(task)
            return task
    return next(fresh, None)


def _after_death(
    task: _Task[Item],
    error: ray.exceptions.RayError,
    retries: int,
    on_death: Callable[[Item, str], Iterable[Item]] | None,
) -> list[_Task[Item]]:
    """What is to be run after a task ended without a result or an exception of its own."""
    starved = isinstance(error, ray.exceptions.OutOfMemoryError)
    if not isinstance(error, (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, *_LOST)):
        raise ClusterError(f"Ray could not run a task ({error}); the same command goes on from here") from None
    # Where memory ran out the other tasks, or another program, must end first.
    start = time.monotonic() + (2.0 ** (task.forgiven + 1) if starved else 0.0)
    if task.forgiven < FORGIVEN and (starved or isinstance(error, _LOST)):
        return [dataclasses.replace(task, forgiven=task.forgiven + 1, start=start)]
    deaths = task.deaths + 1
    if deaths <= retries:
        return [dataclasses.replace(task, deaths=deaths, start=start)]
    why = f"out of memory: {error}" if starved else str(error)
    why = why.splitlines()[0]
    if on_death is None:
        raise ClusterError(f"a worker died {deaths} times at the same task: {why}") from None
    return [_Task(item) for item in on_death(task.item, why)]


def node_memory() -> int:
    """Bytes of memory that Ray offers to the tasks of this process' node; it heeds the limits of a container.

    Outside a cluster: of the machine.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here and "memory" in node["Resources"]:
                return int(node["Resources"]["memory"])
    return psutil.virtual_memory().total


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
