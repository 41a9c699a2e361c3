"""The first door, typed as the README has it, on a real Ray cluster. The demo goes through the other two."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from datagen.verify import verify
from infra.launcher import free_port
from infra.storage import open_store
from tests.end_to_end.readme import readme_command
from tests.support.dataset import REPOSITORY

BIN = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    # Where Ray's variables of an outer cluster are set, the head of this test must not join it.
    mine = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**mine, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A real cluster of one node with a dashboard; its environment must be used to talk to it.

    It is ended by its own processes: ``ray stop`` would end every Ray of this machine, that of other tests too.
    """
    dashboard, agent = free_port(), free_port()
    # Ray's workers are nice, and other tests would take the cores from them.
    mine = environment(RAY_AUTH_MODE="disabled", RAY_worker_niceness="0")
    session = f"/tmp/ird-ray-{os.getpid()}"
    command = ["ray", "start", "--head", "--block", f"--port={free_port()}", "--num-cpus=2", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={session}"]
    # Jobs start through the node's agent, whose port another cluster of this machine may hold.
    command += [f"--dashboard-agent-listen-port={agent}"]
    folder = tmp_path_factory.mktemp("cluster")
    with open(folder / "ray.log", "wb") as log:
        head = subprocess.Popen(command, cwd=folder, env=mine, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 180
        while not (
            _answers(f"{address}/api/version") and _answers(f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
        ):
            assert head.poll() is None and time.monotonic() < deadline, (folder / "ray.log").read_text()
            time.sleep(0.1)
        yield address, mine
    finally:
        members = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        _, alive = psutil.wait_procs([head, *members], timeout=20)
        for process in alive:
            process.kill()
        shutil.rmtree(session, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=2).status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_the_first_door(ray_address: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, mine = ray_address
    command = readme_command("ray job submit")
    command[command.index("--address") + 1] = address
    result = subprocess.run(
        [*command, f"out={tmp_path / 'dataset'}"], cwd=REPOSITORY, env=mine, capture_output=True, text=True, timeout=500
    )
    said = result.stdout + result.stderr
    assert result.returncode == 0, said[-4000:]
    assert (tmp_path / "dataset" / "dataset.json").exists()
    assert not any(check.faults for check in verify(open_store(tmp_path / "dataset")))


def test_the_packaged_working_directory_is_small() -> None:
    """What ``ray job submit`` uploads: everything below the repository that .gitignore and .rayignore leave."""
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

    del get_uri_for_directory
    target = Path(os.environ.get("TMPDIR", "/tmp")) / f"ird-package-{os.getpid()}.zip"
    try:
        create_package(
            str(REPOSITORY), target, include_gitignore=True, excludes=[".git", ".venv", "venv", "__pycache__"]
        )
        assert target.stat().st_size < 10 * 2**20
    finally:
        target.unlink(missing_ok=True)
