"""Sends what is left in spools, after the runs that wrote them."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.errors import Refusal, without_password
from infra.tracking.client import TrackingConfig, masked, tracking_uri
from infra.tracking.courier import Courier, backoff
from infra.tracking.monitor import end_as_crashed, exclusive
from infra.tracking.spool import MAIN, Event, Sessions, Spool, spools_below

_TRIES = 4  # in a row that fail, then a spool is left for another time
_OTHERS = 10.0  # seconds that another courier of the same spool is waited for


class SyncError(Refusal, ValueError):
    """There is nothing to send, or no address to send it to."""


@dataclass(frozen=True)
class Sent:
    """What became of one spool: events sent now, left, set aside for good, and why some are left."""

    spool: Path
    run_id: str
    sent: int
    left: int
    refused: int
    problem: str


def sync(folders: Sequence[Path], *, here: bool = False, close: bool = False) -> Iterator[Sent]:
    """Send what is left in every spool in and below the folders; one row a spool, as it is done.

    A run whose process died on this host without an end is marked FAILED.

    Args:
        here: send to the server that MLFLOW_TRACKING_URI names, wherever the runs were recorded.
        close: mark runs of other hosts FAILED as well, if they have no end; it cannot be known here whether they live.

    Raises:
        SyncError: no such folder, or no spool in any of them.
    """
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise SyncError(f"{', '.join(missing)}: no such folder")
    spools = [spool for folder in folders for spool in spools_below(folder)]
    if not spools:
        raise SyncError(f"{', '.join(map(str, folders))}: no run was recorded here (no tracking/*.jsonl in any folder)")
    for spool in spools:
        yield _sync(spool, here, close)


def _sync(spool: Spool, here: bool, close: bool) -> Sent:
    before = spool.left()
    problem = ""
    with exclusive(spool, _OTHERS) as alone:
        if not alone:
            problem = "the run's own monitor is sending" if spool.left() else ""
        else:
            _close_if_dead(spool, close)
            before = spool.left()
            if before:
                problem = _deliver(spool, here)
    left = spool.left()
    refused = len(spool.refused.read_text().splitlines()) if spool.refused.exists() else 0
    return Sent(spool.path, spool.delivery().run_id, before - left, left, refused, masked(problem))


def _deliver(spool: Spool, here: bool) -> str:
    """Why not everything was sent; empty when it was."""
    try:
        courier = Courier(spool, tracking_uri(TrackingConfig()) if here else _address(spool))
    except SyncError as error:
        return str(error)
    while not courier.is_done:
        if not courier.deliver() and courier.failed:
            if courier.failed >= _TRIES:
                return courier.delivery.error
            time.sleep(backoff(courier.failed))
    return ""


def _address(spool: Spool) -> str:
    """Where the run was recorded. A password is never in the spool, so the environment has to have that."""
    recorded = str(_last_start(spool).body["uri"])
    if "***" not in recorded:
        return recorded
    current = tracking_uri(TrackingConfig())
    if without_password(current) != recorded:
        raise SyncError(f"recorded at {recorded}: set MLFLOW_TRACKING_URI to it, with its password (or give --here)")
    return current


def _close_if_dead(spool: Spool, close: bool) -> None:
    sessions = Sessions(spool)
    if spool.name != MAIN or not sessions.latest or sessions.latest in sessions.ended:
        return
    start = _last_start(spool).body
    if start["host"] != os.uname().nodename:
        dead = close
    else:
        try:
            process = psutil.Process(start["pid"])
            dead = abs(process.create_time() - start["born"]) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            dead = True
    if dead:
        end_as_crashed(spool, sessions.latest, sessions.last_at)


def _last_start(spool: Spool) -> Event:
    starts = [event for event in spool.read() if event.kind == "start"]
    if not starts:
        raise SyncError(f"{spool.path}: no start of a run in it; it was damaged")
    return starts[-1]
