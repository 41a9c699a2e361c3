"""Measuring pictures in a process of their own, for the pieces at which a worker died.

Whatever a picture does to its decoder then ends that process and not the task, which sees how it ended, goes on with
the next picture, and writes the row of the guilty one. Starting the process costs a second and passing the bytes a
copy, so it is for suspects only.
"""

import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

import cv2
import psutil

from datagen.config import ScanConfig
from datagen.scan.row import identify, measure_picture, require_measures
from infra.cluster import ClusterError
from infra.launcher import end_with_parent

# An innocent process may be killed from outside; the same picture is not hit so often by chance.
TRIES = 2
_POLL_SECONDS = 0.02
_START_SECONDS = 300.0


class IsolatedMeasure:
    """``measure_picture`` in another process; a context manager, which ends that process.

    Args:
        limits: ``seconds_per_picture`` is how long one picture may take, from the moment its bytes have arrived.
        memory: bytes of resident memory that the process may take.

    Attributes:
        died, survived: pictures that ended every process they were given to, and the others.
    """

    def __init__(self, limits: ScanConfig, memory: int) -> None:
        self.died = self.survived = 0
        self._limits, self._memory = limits, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: multiprocessing.connection.Connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def __call__(self, data: bytes, limits: ScanConfig) -> dict[str, Any]:
        """As ``measure_picture``; ``failed`` with reason ``worker_died`` when the process died every time.

        Raises:
            ClusterError: the process cannot be started.
        """
        cause = ""
        for _ in range(TRIES):
            if self._process is None:
                self._start()
            try:
                self._connection.send((data, limits))
                cause = self._await(self._limits.seconds_per_picture)
                if not cause:
                    row: dict[str, Any] = self._connection.recv()
                    self.survived += 1
                    return row
            except (EOFError, OSError):
                cause = self._how_it_ended()
            self._end()
        self.died += 1
        died = {"verdict": "failed", "stage": "decode", "reason": "worker_died"}
        return {**identify(data), **died, "error": f"{cause}, {TRIES} times out of {TRIES}"}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "datagen.scan.isolated", str(theirs.fileno())],
                # What this process can import (a Ray worker knows more than its environment says) that one can too.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
                pass_fds=[theirs.fileno()],
                preexec_fn=end_with_parent,
            )
        self._connection = multiprocessing.connection.Connection(ours.detach())
        try:
            self._connection.send(self._limits)
            if cause := self._await(_START_SECONDS):
                raise EOFError(cause)
            refusal = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ClusterError(
                f"{socket.gethostname()}: cannot start a process to measure pictures in "
                f"({error or self._how_it_ended()})"
            ) from None
        if refusal is not None:
            raise refusal

    def _await(self, seconds: float) -> str:
        """Wait for an answer or the end of the process; not empty when it had to be given up, and why."""
        assert self._process is not None
        watched = psutil.Process(self._process.pid)
        deadline = time.monotonic() + seconds
        while not self._connection.poll(_POLL_SECONDS):
            if time.monotonic() > deadline:
                return f"hung: no result within {seconds:g} s"
            if _resident(watched) > self._memory:
                return f"out of memory: took more than {self._memory / 1e9:.1f} GB"
        return ""

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        if code >= 0:
            return f"ended its process with exit code {code}"
        hint = " (as the kernel does when memory runs out)" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # It has just ended, which the connection will tell.
        return 0


def _serve(connection: multiprocessing.connection.Connection) -> None:
    """Answer with rows for as long as the other side asks."""
    cv2.setNumThreads(1)
    try:
        require_measures(connection.recv())
    except Exception as error:  # To be raised where it is read.
        connection.send(error)
        return
    connection.send(None)
    while True:
        try:
            data, limits = connection.recv()
        except EOFError:
            return
        connection.send(measure_picture(data, limits))


if __name__ == "__main__":
    _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
