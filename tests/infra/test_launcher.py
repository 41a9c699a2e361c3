"""Supervision of other programs: evidence over exit codes, and no process left behind."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from infra.launcher import LOST, PREEMPTED, StageFailed, run_deepspeed, run_supervised, session_processes
from tests.support.dataset import REPOSITORY

CHILD = (
    "import subprocess, sys;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']);"
    "print('child', p.pid, flush=True)"
)


SUPERVISOR = (
    "import sys; from pathlib import Path; from infra.launcher import run_supervised\n"
    "run_supervised([sys.executable, '-c', sys.argv[1]], Path(sys.argv[2]))"
)


def wait_for_child(folder: Path) -> None:
    # The command line, first in the log, says "child" too.
    deadline = time.monotonic() + 60
    while not (folder / "log.txt").exists() or "\nchild" not in (folder / "log.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended may stand in the table until init has looked."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def child_of(log: Path) -> int:
    return int(next(line for line in log.read_text().splitlines() if line.startswith("child")).split()[1])


def test_progress_lines_are_shown_and_everything_is_logged(tmp_path: Path) -> None:
    shown: list[str] = []
    report = run_supervised(
        python("print('ird| step 1'); print('noise'); print('ird| step 2')"), tmp_path, show=shown.append
    )
    assert shown == ["step 1", "step 2"]
    assert "noise" in (tmp_path / "log.txt").read_text() and report.seconds > 0


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="exit code 3") as failure:
        run_supervised(python("print('the reason'); raise SystemExit(3)"), tmp_path)
    assert "the reason" in str(failure.value) and str(tmp_path / "log.txt") in str(failure.value)


def test_exit_code_zero_without_the_marker_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="exit code 0 but no"):
        run_supervised(python("pass"), tmp_path, marker=tmp_path / "finished.json")


def test_children_left_behind_are_ended(tmp_path: Path) -> None:
    run_supervised(python(CHILD), tmp_path)
    assert not psutil.pid_exists(child_of(tmp_path / "log.txt"))


def test_children_in_a_session_of_their_own_are_ended_on_an_interrupt(tmp_path: Path) -> None:
    """pdsh starts each ssh in one, and a host at the other end of an ssh that lives would train on unseen."""
    apart = CHILD.replace("time.sleep(300)'])", "time.sleep(300)'], start_new_session=True)")
    assert apart != CHILD
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, apart + "; p.wait()", str(tmp_path)], start_new_session=True
    )
    wait_for_child(tmp_path)
    child = psutil.Process(child_of(tmp_path / "log.txt"))
    supervisor.terminate()
    supervisor.wait(60)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_an_interrupt_ends_the_whole_session(tmp_path: Path) -> None:
    over = threading.Event()

    def interrupt_main_thread() -> None:
        while "\nchild" not in (tmp_path / "log.txt").read_text():  # the command line in the log says "child" too
            if over.wait(0.05):
                return
        import _thread

        _thread.interrupt_main()

    (tmp_path / "log.txt").touch()
    threading.Thread(target=interrupt_main_thread, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_supervised(python(CHILD + "; p.wait()"), tmp_path)
    finally:
        over.set()
    pid = child_of(tmp_path / "log.txt")
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path, sign: signal.Signals) -> None:
    """SIGTERM ends the session; SIGKILL cannot, but the kernel tells the child."""
    work = "import os, time; print('child', os.getpid(), flush=True); time.sleep(300)"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, work, str(tmp_path)])
    wait_for_child(tmp_path)
    child = psutil.Process(child_of(tmp_path / "log.txt"))
    supervisor.send_signal(sign)
    supervisor.wait(30)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_memory_of_the_whole_session_is_measured(tmp_path: Path) -> None:
    code = "import time; block = bytearray(200 * 2**20); time.sleep(2)"
    assert run_supervised(python(code), tmp_path).peak_memory > 200 * 2**20


def test_session_processes_of_an_absent_session_are_none() -> None:
    assert list(session_processes(2**22 + 1)) == []


@pytest.mark.parametrize(("code", "seen"), [(PREEMPTED, 75), (LOST, 69), (2, 2), (255, LOST), (3, 1), (247, 1)])
def test_a_failure_carries_the_code_for_a_scheduler(tmp_path: Path, code: int, seen: int) -> None:
    with pytest.raises(StageFailed) as failure:
        run_supervised(python(f"raise SystemExit({code})"), tmp_path)
    assert failure.value.code == seen


def test_defaults_do_not_replace_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRD_TEST_SET", "mine")
    show = "import os; print('ird|', os.environ['IRD_TEST_SET'], os.environ['IRD_TEST_UNSET'])"
    shown: list[str] = []
    run_supervised(python(show), tmp_path, show=shown.append, defaults={"IRD_TEST_SET": "no", "IRD_TEST_UNSET": "yes"})
    assert shown == ["mine yes"]


STAGE = """
import os, pathlib, signal, sys, time
out = pathlib.Path(next(a for a in sys.argv if a.startswith("out=")).removeprefix("out="))
rank = os.environ["RANK"]
(out / f"rank-{rank}").write_text(str(os.getpid()))
while len(list(out.glob("rank-*"))) < 2:
    time.sleep(0.05)
if rank == "1":
    os.kill(os.getppid() if "launch" in sys.argv else os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["launch", "rank"])
def test_a_process_killed_inside_deepspeed_is_a_failure_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    """`deepspeed` returns 0 when its own child is killed, as the kernel does when memory runs out."""
    (tmp_path / "killed_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "out"
    with pytest.raises(StageFailed, match="exit code 0 but no" if killed == "launch" else "exit code 247") as failure:
        run_deepspeed("killed_stage", tmp_path / "none.yaml", [killed], out, ranks=2, show=lambda line: None)
    assert failure.value.code == 1
    assert not any(lives(int((out / f"rank-{rank}").read_text())) for rank in range(2))
