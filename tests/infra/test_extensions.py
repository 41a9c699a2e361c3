"""The compiled op is built once by whoever comes first, and no killed process can make later ones wait for ever."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.extensions import NAME, build_folder, extension_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed compiles the op on Linux only"),
]

PREPARE = """
from deepspeed.ops.op_builder.builder import OpBuilder
from infra.extensions import NAME, prepare_extensions
prepare_extensions(progress=lambda text: print(text, flush=True))
print("loaded", NAME in OpBuilder._loaded_ops, flush=True)
"""
HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
print(FileBaton(sys.argv[1]).try_acquire(), flush=True)
time.sleep(600)
"""


def start(extensions: Path, code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "DS_ACCELERATOR": "cpu", **more}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 0, output
    return output


def state_of(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    return {name: value for name, value in extension_state().items() if name in ("built", "lock", "builders", "stale")}


@pytest.fixture(scope="module")
def first_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """Two processes at once, where a killed one left its lock and a part of its work; the one compile of this file.

    Returns the cache folder, what the two said, and what was built. The part is one of the two objects, as this
    environment's own cache has it: `make venv` compiles both there, and half a minute of one is enough here.
    """
    extensions = tmp_path_factory.mktemp("extensions")
    folder, own = extensions / NAME, build_folder()
    folder.mkdir()
    for part in ("build.ninja", ".ninja_log", ".ninja_deps", "shm_interface.o"):
        if (own / part).exists():
            shutil.copy2(own / part, folder)
    (folder / "lock").touch()
    before = log_of_ninja(folder)
    processes = [start(extensions, PREPARE) for _ in range(2)]
    said = [finish(process) for process in processes]
    return extensions, said, [line.split("\t")[3] for line in log_of_ninja(folder) if line not in before]


def log_of_ninja(folder: Path) -> list[str]:
    """A line for each file that ninja has built there."""
    log = folder / ".ninja_log"
    return log.read_text().splitlines()[1:] if log.exists() else []


def test_two_processes_at_once_build_once(first_build: tuple[Path, list[str], list[str]]) -> None:
    _, outputs, built = first_build
    assert all("loaded True" in output for output in outputs)
    assert sum("compiling" in output for output in outputs) == 1
    assert sum("waiting for another process" in output for output in outputs) == 1
    assert {"deepspeed_shm_comm.so", "shm.o"} <= set(built) and len(set(built)) == len(built)


def test_a_planted_stale_lock_is_removed_and_named(first_build: tuple[Path, list[str], list[str]]) -> None:
    extensions, outputs, _ = first_build
    lock = extensions / "deepspeed_shm_comm" / "lock"
    assert not lock.exists()
    assert sum(f"removed {lock}" in output for output in outputs) == 1


def test_a_living_holder_is_waited_for_and_a_killed_one_is_not(
    first_build: tuple[Path, list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions, *_ = first_build
    holder = start(extensions, HOLD, str(extensions / "deepspeed_shm_comm" / "lock"))
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    state = state_of(extensions, monkeypatch)
    assert state["builders"] == [holder.pid] and not state["stale"]

    # Nor does it build again for another PATH, on which there may be another ninja or none.
    waiting = start(extensions, PREPARE, PATH=os.defpath)
    assert waiting.stdout is not None
    first_line = waiting.stdout.readline()
    assert f"waiting for pid {holder.pid}" in first_line
    time.sleep(2)
    assert waiting.poll() is None, "it went past a lock whose holder lives"

    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    output = finish(waiting)
    assert "removed" in output
    assert "compiling" not in output
    assert "loaded True" in output


def test_state_tells_a_stale_lock_from_none(
    first_build: tuple[Path, list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    extensions, *_ = first_build
    none = {"built": True, "lock": False, "builders": [], "stale": False}
    assert state_of(extensions, monkeypatch) == none
    lock = extensions / "deepspeed_shm_comm" / "lock"
    lock.touch()
    try:
        assert state_of(extensions, monkeypatch) == none | {"lock": True, "stale": True}
    finally:
        lock.unlink()
