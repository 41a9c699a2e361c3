"""Run a training stage under the ``deepspeed`` launcher and believe only evidence.

The launcher alone cannot be trusted: killed, it leaves its ranks running, and when its own child is
killed it returns 0. So the stage runs in a session of its own that is torn down as a whole, and it
counts as done only when its finished marker says so.
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.errors import Refusal

MARKER = "finished.json"
PREEMPTED = 75  # exit code of a stage that was told to stop and has saved: run it again (EX_TEMPFAIL)
LOST = 69  # exit code of ranks that lost another one, or its host: run it again (EX_UNAVAILABLE)
PROGRESS = "ird| "  # ranks begin a line with it when a person should see the line
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class StageFailed(Refusal, RuntimeError):
    """A stage ended without its finished marker. The message holds the end of its log.

    ``code`` is what a scheduler should see: ``PREEMPTED`` or ``LOST`` (run it again), 2 (refused), 1 for all else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class StageReport:
    """What a stage cost: wall seconds, and the peak resident memory of all its processes in bytes."""

    seconds: float
    peak_memory: int


def run_deepspeed(
    module: str,
    config: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    ranks: int | None = None,
    hostfile: Path | None = None,
    show: Callable[[str], None] = print,
) -> StageReport:
    """Launch ``deepspeed --module MODULE --config CONFIG OVERRIDES`` and wait for it.

    Args:
        module: a training entry point, ``training.pretrain`` for one.
        out: the stage's folder. Its log goes to ``out``/log.txt, its marker is ``out``/finished.json.
        ranks: processes on this host; with ``hostfile`` the slots of the hosts decide.
        show: called with each progress line (those that ranks begin with ``PROGRESS``).

    To the hosts of a ``hostfile`` the ssh connections get a keepalive: without one, ``deepspeed`` waits for ever for a
    host that was cut off, after all ranks elsewhere have ended. PDSH_SSH_ARGS_APPEND replaces it.

    Raises:
        StageFailed: the launcher failed, or returned 0 without a finished marker.
    """
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    command += ["--hostfile", str(hostfile)] if hostfile else []
    command += ["--num_accelerators", str(ranks)] if ranks else []
    command += [
        "--master_port",
        str(free_port()),
        "--module",
        module,
        "--config",
        str(config),
        f"out={out}",
        *overrides,
    ]
    more = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"} if hostfile else {}
    return run_supervised(command, out, show=show, marker=out / MARKER, defaults={"OMP_NUM_THREADS": "1", **more})


def run_supervised(
    command: Sequence[str],
    out: Path,
    *,
    show: Callable[[str], None] = print,
    pick: Callable[[str], str | None] | None = None,
    marker: Path | None = None,
    defaults: Mapping[str, str] | None = None,
) -> StageReport:
    """Run ``command`` in a session of its own, log to ``out``/log.txt, and end the whole session with it.

    Args:
        show: called with each progress line.
        pick: what of a log line is shown, or None; default: what stands behind ``PROGRESS``.
        marker: file that must be there afterwards, whatever the exit code says.
        defaults: variables for the command, where the environment does not set them.

    Raises:
        StageFailed: a non-zero exit code, or no marker. The message ends with the last lines of the log.
    """
    out.mkdir(parents=True, exist_ok=True)
    log_path = out / "log.txt"
    started = time.monotonic()
    with open(log_path, "a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        code, peak_memory = _supervise(command, log_path, log.fileno(), show, pick or progress_of, defaults or {})
    if code != 0 or (marker is not None and not marker.exists()):
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-40:])
        reason = f"exit code {code}" if code else f"exit code 0 but no {marker}"
        # 255 is ssh's word, and so pdsh's: a host could not be reached, or no longer.
        seen = LOST if code == 255 else code if code in (2, LOST, PREEMPTED) else 1
        raise StageFailed(f"{shlex.join(command)}\nfailed ({reason}). Full log: {log_path}\n{tail}", seen)
    return StageReport(time.monotonic() - started, peak_memory)


def progress_of(line: str) -> str | None:
    """The message of a progress line; None for any other line."""
    _, found, message = line.partition(PROGRESS)
    return message if found else None


def read_marker(out: Path) -> dict[str, object] | None:
    """The finished marker of a stage folder, or None when the stage has not finished."""
    try:
        marker: dict[str, object] = json.loads((out / MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return marker


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _supervise(
    command: Sequence[str],
    log_path: Path,
    log: int,
    show: Callable[[str], None],
    pick: Callable[[str], str | None],
    defaults: Mapping[str, str],
) -> tuple[int, int]:
    position = log_path.stat().st_size
    environment = {**defaults, **os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(log_path, position, done, show, pick), daemon=True)
    follower.start()
    peak_memory = 0
    in_main_thread = threading.current_thread() is threading.main_thread()
    # Left to itself, SIGTERM would end this process and leave the whole session behind.
    before = signal.signal(signal.SIGTERM, _exit_terminated) if in_main_thread else None
    try:
        while (code := process.poll()) is None:
            peak_memory = max(peak_memory, sum(_resident(p) for p in session_processes(process.pid)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        return code, peak_memory
    finally:
        end_session(process.pid)
        process.wait()
        done.set()
        follower.join()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies (Linux; elsewhere nothing)."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit_terminated(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def session_processes(session: int) -> Iterator[psutil.Process]:
    """Processes whose session id is ``session``: the launcher, its child and the ranks, orphans included."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == session:
                yield process


def end_session(session: int, patience: float = 10.0) -> None:
    """End every process of a session, and what they started in others: SIGTERM, ``patience`` seconds later SIGKILL."""
    outside: set[psutil.Process] = set()  # pdsh gives each ssh a session of its own
    for sign in (signal.SIGTERM, signal.SIGKILL):
        members = set(session_processes(session))
        for member in members:
            with contextlib.suppress(psutil.Error):
                outside |= set(member.children(recursive=True))
        living = [process for process in members | outside if _lives(process)]
        for process in living:
            with contextlib.suppress(OSError, psutil.Error):
                process.send_signal(sign)
        psutil.wait_procs(living, timeout=patience)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _follow(
    path: Path,
    position: int,
    done: threading.Event,
    show: Callable[[str], None],
    pick: Callable[[str], str | None],
) -> None:
    with open(path, errors="replace") as log:
        log.seek(position)
        part = ""
        while True:
            last = done.is_set()
            part += log.read()
            *lines, part = part.split("\n")
            for line in lines:
                message = pick(line)
                if message is not None:
                    show(message)
            if last:
                return
            done.wait(0.3)
