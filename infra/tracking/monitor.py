"""The process beside a run: it couriers the run's spool, and marks the run FAILED if its process dies without a word.

It is a process and not a thread, because it has to outlive the run, and because a thread that talks HTTP or SQL would
take the interpreter from the training step now and then, and be caught in the middle of something by every fork of a
loader worker. It has a session of its own and no living parent, so that neither a launcher which ends the processes
below it nor Ctrl-C takes it along; it ends a minute after the run at the latest, unless something is still arriving.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from infra.tracking.client import masked
from infra.tracking.courier import Courier, backoff
from infra.tracking.spool import MAIN, Sessions, Spool, line_of

LINGER = 60.0  # seconds that tries go on after the run has ended, since the last one that went through

_HANGING = 600.0  # seconds after the end of the run, when even a call that never returns is given up
_POLL = 0.5  # seconds
_LONGEST_LOG = 1024**2  # bytes
_ROOT = Path(__file__).parents[2]
# The fork stands before every import, so that no launcher finds the process among the children of a rank.
_PROGRAM = "import os; os.fork() and os._exit(0); from infra.tracking.monitor import main; main()"


def start_monitor(spool: Spool, uri: str, interval: float = 0.0) -> None:
    """Start the process for a spool of this process; it ends by itself.

    Args:
        uri: where the run is recorded. It goes through the environment, for it may hold a password.
        interval: seconds between two samples of this host, for a spool of its metrics.
    """
    me = psutil.Process()
    # -P: the working directory is nobody's place for modules.
    command = [sys.executable, "-P", "-c", _PROGRAM, str(spool.folder.parent), spool.name]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri}
    process = subprocess.Popen(
        [*command, str(me.pid), repr(me.create_time()), str(interval)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):  # a machine that is too busy even for that
        process.wait(30)  # its first act is to fork and leave


def main() -> None:
    """``FOLDER SPOOL PID BORN INTERVAL``, as ``start_monitor`` gives them."""
    folder, name, pid, born, interval = sys.argv[1:]
    spool = Spool(Path(folder), name)
    lives = partial(_lives, int(pid), float(born))
    try:
        if float(interval):
            from infra.tracking.host import sample_host

            threading.Thread(target=sample_host, args=(spool, float(interval)), daemon=True).start()
        watch(spool, os.environ["MLFLOW_TRACKING_URI"], lives)
    except BaseException:
        _write_log(spool, traceback.format_exc())
        raise


def watch(spool: Spool, uri: str, lives: Callable[[], bool]) -> None:
    """Deliver the spool until its process has ended and everything is delivered, or nothing has been for a minute.

    Args:
        lives: whether the process that writes the spool is alive.
    """
    sessions = Sessions(spool)
    mine = sessions.latest
    threading.Thread(target=_leave_at_last, args=(lives,), daemon=True).start()
    with exclusive(spool):
        courier = Courier(spool, uri)
        over_since = next_try = 0.0  # time.monotonic
        while spool.path.exists():
            if sessions.look().latest != mine:
                return  # the run was started again; its own monitor goes on from the note
            now = time.monotonic()
            if not over_since and (mine in sessions.ended or not lives()):
                over_since, next_try = now, 0.0
                if spool.name == MAIN and mine not in sessions.look().ended:
                    end_as_crashed(spool, mine, max(sessions.last_at, time.time_ns() // 1_000_000))
            worked = False
            if now >= next_try:
                failures = courier.delivery.failures
                worked = courier.deliver()
                if courier.delivery.failures > failures:
                    wait = backoff(courier.failed)
                    next_try = time.monotonic() + (min(wait, 2.0) if over_since else wait)
                elif worked and over_since:
                    over_since = time.monotonic()
            if over_since and (courier.is_done or time.monotonic() - over_since > LINGER):
                return
            if not worked:
                time.sleep(0.05 if over_since else _POLL)


def end_as_crashed(spool: Spool, session: str, at: int) -> None:
    """Write the end (ms since 1970) of a session whose process did not come to write it."""
    body = {"session": session, "status": "FAILED", "exit": "crashed: its process ended without a word"}
    descriptor = spool.open()
    try:
        os.write(descriptor, line_of(at, "end", body))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beats(spool: Spool) -> bool:
    """Whether a courier of this spool is at work, in any process of this host."""
    try:
        with open(spool.lock, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return True
    return False


@contextlib.contextmanager
def exclusive(spool: Spool, patience: float = float("inf")) -> Iterator[bool]:
    """Be the only courier of a spool; yields False after ``patience`` seconds in which another one was."""
    spool.folder.mkdir(parents=True, exist_ok=True)
    with open(spool.lock, "a") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.1)
            except OSError:  # a file system without locks: two couriers do no harm, they only do the work twice
                break
        yield True


def _lives(pid: int, born: float) -> bool:
    """Whether the process is alive; a number that is used again, or a zombie, is not."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _leave_at_last(lives: Callable[[], bool]) -> None:
    while lives():
        time.sleep(5.0)
    time.sleep(_HANGING)
    os._exit(1)


def _write_log(spool: Spool, text: str) -> None:
    with contextlib.suppress(OSError):
        mode = "a" if not spool.log.exists() or spool.log.stat().st_size < _LONGEST_LOG else "w"
        with open(spool.log, mode) as log:
            log.write(masked(text) + "\n")
