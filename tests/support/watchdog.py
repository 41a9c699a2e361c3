"""The last net below the tests: a process that pytest-timeout cannot end says where it hangs, and is ended.

pytest-timeout raises an exception in the main thread, once. C code that waits may hold it back (``ray.wait`` without a
time does), and a fixture whose teardown hangs after it is under no limit any more; nor is a process that does not exit
after its last test, nor the run as a whole. Here a thread looks on, in each process of the run. What is over its time
writes the stacks of all threads to the real stderr, kills its child processes, and exits. Under xdist the run names the
test at which the process ended, and goes on in a new one.

What tests leave behind, in whatever session and below whatever parent, is known by a variable of its environment. It is
named and killed as the run ends: it would hold the pipes of CI open, and CI would wait for them.
"""

import contextlib
import faulthandler
import os
import secrets
import signal
import threading
import time
from collections.abc import Generator

import psutil
import pytest
import pytest_timeout

# What pytest-timeout and the teardown of a test have beyond its limit.
GRACE = 120.0
# What a run has beyond --session-timeout, at which no new test begins.
RUN_GRACE = 1200.0
# time.monotonic() at which the run must be over; for the processes of xdist, which may start late.
_RUN_ENDS = "IRD_TESTS_END_AT"
# In the environment of all that a run starts.
_RUN = "IRD_TESTS_RUN"


class Watchdog:
    """A plugin of pytest, and the thread that looks on."""

    def __init__(self, config: pytest.Config, grace: float = GRACE, run_grace: float = RUN_GRACE) -> None:
        self._config, self._grace = config, grace
        self._stderr = os.dup(2)  # Before pytest puts a file in its place.
        self._leads = "PYTEST_XDIST_WORKER" not in os.environ
        if self._leads:
            os.environ[_RUN] = secrets.token_hex(8)
            signal.signal(signal.SIGTERM, self._told_to_end)
        session = config.getoption("session_timeout")
        if session and _RUN_ENDS not in os.environ:
            os.environ[_RUN_ENDS] = str(time.monotonic() + session + run_grace)
        # The one that tells the result has the last word.
        self._run_ends = float(os.environ.get(_RUN_ENDS, "inf")) + (grace / 2 if self._leads else 0)
        self._what, self._ends = "", float("inf")
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)
        self._thread.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Setup, call and teardown of a test, with the fixtures that begin or end with it."""
        limit = _limit(item)
        self._watch(item.nodeid, limit + self._grace if limit else float("inf"))
        try:
            return (yield)
        finally:
            self._watch("", float("inf"))

    def pytest_unconfigure(self) -> None:
        """From now on the process has to exit; nothing is left behind."""
        if self._leads:
            self._kill(_started_by_this_run(), "left behind by the tests:")
        self._watch("the exit of the process: a thread or child that is waited for does not end", self._grace)

    def _told_to_end(self, *_: object) -> None:
        """As Ctrl-C does: fixtures are torn down, and nothing is left behind. By default SIGTERM would leave it all."""
        self._run_ends = min(self._run_ends, time.monotonic() + self._grace)
        raise KeyboardInterrupt

    def _watch(self, what: str, seconds: float) -> None:
        self._what, self._ends = what, time.monotonic() + seconds

    def _look_on(self) -> None:
        while True:
            time.sleep(1)
            now = time.monotonic()
            if now > self._run_ends:
                self._end(f"the run, which is over its time, at {self._what or 'no test'}")
            elif now > self._ends and not self._debugged():
                self._end(self._what)

    def _debugged(self) -> bool:
        return bool(self._config.getoption("usepdb") or pytest_timeout.is_debugging())

    def _end(self, what: str) -> None:
        os.write(self._stderr, f"\n\nwatchdog: process {os.getpid()} is ended at {what}; its threads:\n".encode())
        faulthandler.dump_traceback(file=self._stderr, all_threads=True)
        self._kill(psutil.Process().children(recursive=True), "its child")
        os._exit(1)

    def _kill(self, processes: list[psutil.Process], what: str) -> None:
        for process in processes:
            line = f"watchdog: killing {what} {process.pid}: {_command(process)}\n"
            os.write(self._stderr, line.encode(errors="replace"))
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _limit(item: pytest.Item) -> float:
    """Seconds that pytest-timeout gives a test; 0 for no limit."""
    marker = item.get_closest_marker("timeout")
    if marker:
        return float(marker.args[0] if marker.args else marker.kwargs.get("timeout") or 0)
    return float(item.config.getoption("timeout") or 0)


def _started_by_this_run() -> list[psutil.Process]:
    me = psutil.Process()
    spared = {me.pid, *(parent.pid for parent in me.parents())}
    return [p for p in psutil.process_iter() if p.pid not in spared and _environment(p).get(_RUN) == os.environ[_RUN]]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in _command(process)
        return process.environ() if alive else {}
    except (psutil.Error, OSError):
        return {}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return "gone"
