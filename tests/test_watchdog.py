"""Runs of pytest that would never end without tests/support/watchdog.py."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil

from tests.support.dataset import REPOSITORY

CONFTEST = """
from tests.support.watchdog import Watchdog

def pytest_configure(config):
    config.pluginmanager.register(Watchdog(config, grace=3, run_grace=1))
"""
# As C code does that waits without looking at signals.
DEAF = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(1000)"


def run(folder: Path, tests: str, *options: str) -> "subprocess.CompletedProcess[str]":
    process = start(folder, tests, *options)
    try:
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, error)


def start(folder: Path, tests: str, *options: str) -> "subprocess.Popen[str]":
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text("import signal, subprocess, threading, time, pytest\n" + textwrap.dedent(tests))
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "IRD_TESTS_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={folder}", *options, str(folder)]
    environment = {**mine, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def gone(file: Path) -> bool:
    """Whether the process ends: one that was killed stays for a moment where there is much to do."""
    process_id = int(file.read_text())
    for _ in range(300):
        try:
            if psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:  # nobody has asked for it yet
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_a_test_that_heeds_no_limit_ends_with_its_children_and_the_next_one_runs(tmp_path: Path) -> None:
    tests = f"""
    def test_deaf():
        child = subprocess.Popen(["sleep", "1000"])
        with open("child", "w") as file:
            file.write(str(child.pid))
        {DEAF}

    def test_next():
        pass
    """
    done = run(tmp_path, tests, "--timeout=1", "-n1")
    assert "is ended at test_it.py::test_deaf" in done.stderr and "in test_deaf" in done.stderr, done.stderr
    assert "1 failed, 1 passed" in done.stdout and "crashed while running 'test_it.py::test_deaf'" in done.stdout
    assert done.returncode == 1
    assert gone(tmp_path / "child")


def test_a_teardown_that_hangs_after_the_limit_was_heeded(tmp_path: Path) -> None:
    tests = """
    @pytest.fixture(scope="session")
    def server():
        yield
        time.sleep(1000)

    def test_slow(server):
        time.sleep(1000)
    """
    done = run(tmp_path, tests, "--timeout=1")
    assert "is ended at test_it.py::test_slow" in done.stderr and "in server" in done.stderr, done.stderr
    assert done.returncode == 1


def test_a_process_that_does_not_exit(tmp_path: Path) -> None:
    tests = """
    def forever():
        time.sleep(1000)

    def test_leaves_a_thread():
        threading.Thread(target=forever).start()
    """
    done = run(tmp_path, tests, "--timeout=20")
    assert "1 passed" in done.stdout
    assert "is ended at the exit of the process" in done.stderr and "in forever" in done.stderr, done.stderr
    assert done.returncode == 1


def test_what_a_test_leaves_behind_is_named_and_killed(tmp_path: Path) -> None:
    tests = """
    def test_leaves_a_daemon():
        subprocess.run(["bash", "-c", "setsid sleep 1234 & echo $! > child"], check=True)
    """
    done = run(tmp_path, tests, "--timeout=20")
    assert done.returncode == 0 and "sleep 1234" in done.stderr, done.stdout + done.stderr
    assert gone(tmp_path / "child")


def test_a_run_that_is_told_to_end_takes_all_along(tmp_path: Path) -> None:
    tests = """
    def test_long():
        subprocess.run(["bash", "-c", "setsid sleep 1234 & echo $! > child.tmp; mv child.tmp child; sleep 1000"])
    """
    process = start(tmp_path, tests, "-n1")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "child").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        output, error = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode in (1, 2) and "sleep 1234" in error, output + error  # 1: it was slow, and was ended
    assert gone(tmp_path / "child")


def test_a_run_that_is_over_its_time(tmp_path: Path) -> None:
    tests = f"""
    @pytest.mark.timeout(0)
    def test_deaf():
        {DEAF}
    """
    done = run(tmp_path, tests, "--session-timeout=4", "-n2")
    assert "the run, which is over its time, at test_it.py::test_deaf" in done.stderr, done.stderr
    assert done.returncode == 1
