"""Pairs of ranks that lose each other in one way each: ``python -m tests.training.watched_ranks FOLDER``.

Every scenario runs in two processes forked from this one, all scenarios at once. FOLDER gets ``<scenario>-<rank>.log``
with what a rank said, and ``codes.json`` with the exit codes.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infra.errors import Refusal
from infra.launcher import free_port
from training import distributed
from training.rendezvous import Meeting
from training.watchdog import Watchdog

HOST_TIMEOUT, STEP_TIMEOUT = 12.0, 8.0  # wide enough for a machine that does much else


def stopped(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    forever()


def first_killed(rank: int, watchdog: Watchdog) -> None:
    if rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    forever()


def stuck(rank: int, watchdog: Watchdog) -> None:
    for _ in range(2 - rank):
        watchdog.beat()
    forever()


def paused(rank: int, watchdog: Watchdog) -> None:
    """Rank 0 writes a checkpoint for longer than a step may take; rank 1 waits in the next collective."""
    watchdog.beat()
    with watchdog.paused() if rank == 0 else contextlib.nullcontext():
        time.sleep(3 * STEP_TIMEOUT)
    watchdog.beat()


def compiling(rank: int, watchdog: Watchdog) -> None:
    def slow(graph: Any, inputs: Any) -> Any:
        time.sleep(3 * STEP_TIMEOUT)
        return graph

    watchdog.beat()
    if rank == 0:
        torch.compile(lambda x: x + 1, backend=slow)(torch.ones(1))
    else:
        time.sleep(3 * STEP_TIMEOUT)
    watchdog.beat()


def ended_earlier(rank: int, watchdog: Watchdog) -> None:
    watchdog.beat()
    if rank == 0:
        with watchdog.paused():
            time.sleep(2 * HOST_TIMEOUT)


def failed(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        raise ValueError("the reason")
    forever()


def refused(rank: int, watchdog: Watchdog) -> None:
    raise Refusal("not like this")


def broken_connection(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer [127.0.0.1]:1")
    forever()


def forever() -> None:
    threading.Event().wait()


SCENARIOS: list[Callable[[int, Watchdog], None]] = [
    stopped,
    first_killed,
    stuck,
    paused,
    compiling,
    ended_earlier,
    failed,
    refused,
    broken_connection,
]


def be(rank: int, port: int, scenario: Callable[[int, Watchdog], None], log: Path) -> None:
    """This process as one rank of a scenario."""
    with open(log, "wb") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), IRD_HOST_TIMEOUT=str(HOST_TIMEOUT), IRD_STEP_TIMEOUT=str(STEP_TIMEOUT))
    meeting = Meeting("gloo")
    meeting.gather()
    distributed._watchdog = watchdog = Watchdog(meeting)
    with distributed.end_well_or_blame():
        scenario(rank, watchdog)
    os._exit(0)


def main(folder: Path) -> None:
    children = {}
    for scenario in SCENARIOS:
        port = free_port()
        for rank in range(2):
            name = f"{scenario.__name__}-{rank}"
            if (pid := os.fork()) == 0:
                be(rank, port, scenario, folder / f"{name}.log")
            children[pid] = name
    codes = {}
    asleep = next(pid for pid, name in children.items() if name == "stopped-1")
    while len(codes) < len(children):
        pid, status = os.wait()
        codes[children[pid]] = os.waitstatus_to_exitcode(status)
        if children[pid] == "stopped-0":
            os.kill(asleep, signal.SIGCONT)  # wakes up in a world without rank 0
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
