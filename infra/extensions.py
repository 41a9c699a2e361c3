"""DeepSpeed's compiled shared-memory collectives on CPU: built once, and never waited on for ever.

The first ``deepspeed.init_distributed`` on a CPU compiles ``deepspeed_shm_comm`` with g++, for minutes and
without a word. torch guards that build with a file named ``lock`` that only its holder removes: when the
holder is killed, every later run waits on it for ever (``torch.utils.file_baton``). Here an advisory lock,
which the kernel releases on any death, goes around that one, so that under it a ``lock`` without a living
holder can be told apart and taken away.
"""

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.errors import Refusal

NAME = "deepspeed_shm_comm"

# What ninja and g++ run as. A person's shell that happens to stand in the build folder is not among them.
_BUILD_TOOLS = {"ninja", "c++", "g++", "gcc", "clang++", "clang", "cc1plus", "collect2", "as", "ld"}

Progress = Callable[[str], Any]


class ExtensionError(Refusal, RuntimeError):
    """The compiled op could not be built or loaded. The message says what to do."""


def prepare_extensions(progress: Progress = print) -> None:
    """Build and load the op in this process; returns at once where DeepSpeed does not use it.

    Call it on every rank before ``deepspeed.init_distributed``: the first caller on a machine builds, the
    others wait for it and load what it built. DeepSpeed then finds the op loaded and touches no lock.

    With a cache folder shared between machines over NFS the advisory lock still holds between callers of this
    function, but a foreign DeepSpeed program that builds on another machine cannot be seen.

    Raises:
        ExtensionError: the compiler is missing or fails.
    """
    builder = _builder()
    if builder is None:
        return
    folder = build_folder()
    with _exclusive(folder, progress):
        _remove_stale_lock(folder, progress)
        message = f"compiling {NAME} (DeepSpeed's collectives for CPU) once, takes minutes: {folder}"
        # A library that is there already is rebuilt when torch or its flags changed; only time tells.
        announcement = threading.Timer(5.0 if _is_built(folder) else 0.0, progress, [message])
        announcement.start()
        try:
            with _own_programs_first():
                builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            raise ExtensionError(
                f"{NAME} could not be built in {folder}: {error}\n"
                "Install a C++ compiler (Debian: apt-get install g++), delete that folder and run again."
            ) from error
        finally:
            announcement.cancel()


def extension_state() -> dict[str, Any]:
    """What stands in the build folder, for people and for the doctor; builds nothing.

    Returns:
        ``used`` (whether DeepSpeed uses the op on this machine), ``folder``, ``built``, ``lock`` (torch's lock
        file is there), ``builders`` (pids of living processes that build or hold the lock) and ``stale`` (a lock
        that no living process holds: a run that does not call ``prepare_extensions`` would hang).
    """
    folder = build_folder()
    lock = _lock_file(folder).exists()
    builders = [process.pid for process in _builders(folder)]
    return {
        "used": _builder() is not None,
        "folder": str(folder),
        "built": _is_built(folder),
        "lock": lock,
        "builders": builders,
        "stale": lock and not builders,
    }


def build_folder() -> Path:
    """The folder in which torch builds the op; chosen for this process by TORCH_EXTENSIONS_DIR.

    Where that is not set, a virtual environment keeps its own. torch's default, one folder for all environments
    of a user, is rebuilt at every change from one to another, since the path of torch is a compiler flag.
    """
    from torch.utils.cpp_extension import _get_build_directory

    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    return Path(_get_build_directory(NAME, verbose=False))


def _builder() -> Any:
    """DeepSpeed's builder of the op, or None where it would not use it (GPU, not Linux, no compiler)."""
    if sys.platform != "linux":
        return None
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return None
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return builder if builder is not None and builder.is_compatible(verbose=False) else None


@contextlib.contextmanager
def _own_programs_first() -> Iterator[None]:
    """Let torch find the ninja of this environment, whatever PATH says.

    Another ninja does not take over this one's log: a call with the environment's bin folder on PATH and one without it
    would each compile anew what the other has just built.
    """
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


@contextlib.contextmanager
def _exclusive(folder: Path, progress: Progress) -> Iterator[None]:
    with open(folder.with_name(f"{folder.name}.flock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _is_built(folder):
                progress(f"waiting for another process that prepares {NAME} in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_stale_lock(folder: Path, progress: Progress) -> None:
    """Wait while a living process builds there, then take away the lock that nobody is left to release."""
    lock = _lock_file(folder)
    told = False
    while lock.exists() and (builders := _builders(folder)):
        if not told:
            progress(f"waiting for pid {builders[0].pid}, which builds {NAME} in {folder}")
            told = True
        time.sleep(0.5)
    if lock.exists():
        lock.unlink(missing_ok=True)
        progress(f"removed {lock}: the process that built there was killed")


def _builders(folder: Path) -> list[psutil.Process]:
    """Living processes that hold torch's lock open, or that compile in the folder (a killed build's orphans)."""
    return [process for process in psutil.process_iter() if _builds_in(process, folder)]


def _builds_in(process: psutil.Process, folder: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.name() in _BUILD_TOOLS and Path(process.cwd()) == folder.resolve():
            return True
        lock = str(_lock_file(folder).resolve())
        return any(file.path == lock for file in process.open_files())
    except (psutil.Error, OSError):
        return False


def _is_built(folder: Path) -> bool:
    return (folder / f"{NAME}.so").exists()


def _lock_file(folder: Path) -> Path:
    return folder / "lock"


def main() -> None:
    """``python -m infra.extensions``: build now, so that no later run has to wait."""
    began = time.monotonic()
    prepare_extensions(progress=lambda text: print(text, flush=True))
    if extension_state()["used"]:
        print(f"{NAME} is ready after {time.monotonic() - began:.0f} s", flush=True)
    else:
        print(f"{NAME} is not used on this machine", flush=True)


if __name__ == "__main__":
    main()
