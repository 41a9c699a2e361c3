"""Checks of this machine: versions, compiler, cores, memory, disk, shared memory, GPU."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from infra.doctor.check import GIB, Check, output_of


def check_python() -> Iterator[Check]:
    wanted = importlib.metadata.metadata("ird")["Requires-Python"]
    version = platform.python_version()
    if version in SpecifierSet(wanted):
        yield Check("python", "ok", f"{version} ({sys.executable})")
    else:
        fix = f"Use a Python in the range {wanted}: make clean, then make demo PYTHON=/path/to/it"
        yield Check("python", "fail", f"{version}, supported is {wanted}", fix)


def check_packages() -> Iterator[Check]:
    """Every dependency of the installed ird, against the range that its pyproject.toml declares."""
    wrong = []
    requirements = [Requirement(text) for text in importlib.metadata.requires("ird") or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        # A local version such as 2.13.0+cpu satisfies ==2.13.0.
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield Check("packages", "fail", "; ".join(wrong), "pip install -r requirements.lock, into this environment")
    else:
        yield Check("packages", "ok", f"{len(needed)} dependencies within their ranges")


def check_compiler() -> Iterator[Check]:
    """torch compiles DeepSpeed's ops with g++ (or $CXX) and ninja."""
    for name, commands, fix in (
        ("compiler", [os.environ.get("CXX", ""), "c++", "g++"], "Debian or Ubuntu: apt-get install g++"),
        ("ninja", ["ninja"], f"pip install ninja; call ird with {Path(sys.executable).parent} on PATH"),
    ):
        found = next((path for command in commands if command and (path := shutil.which(command))), None)
        if found is None:
            yield Check(name, "fail", "not on PATH; DeepSpeed cannot compile its collectives", fix)
        else:
            first_line = (output_of([found, "--version"]) or "does not say its version").splitlines()[0]
            yield Check(name, "ok", f"{found}: {first_line}")


def check_cores() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{cores} usable of {os.cpu_count()}, load {psutil.getloadavg()[0]:.1f}"
    if cores < 2:
        yield Check("cores", "warn", detail, "The demo runs two DeepSpeed ranks; on one core it takes twice as long.")
    else:
        yield Check("cores", "ok", detail)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None:
        yield Check("OMP_NUM_THREADS", "ok", "not set; the launchers set it for their workers")
    elif not threads.isdigit() or not 1 <= int(threads) <= cores:
        fix = f"unset OMP_NUM_THREADS, or a number from 1 to {cores}: more threads than cores fight over them"
        yield Check("OMP_NUM_THREADS", "warn", threads, fix)
    else:
        yield Check("OMP_NUM_THREADS", "ok", threads)


def check_memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f} GiB"
    if memory.available < 4 * GIB:
        yield Check("memory", "warn", detail, "The demo needs about 4 GiB: stop what else runs, or add swap.")
    else:
        yield Check("memory", "ok", detail)


def check_disk() -> Iterator[Check]:
    """Space where runs are written, and where compiled ops and models are cached."""
    for name, folder in (("disk", Path.cwd()), ("disk (cache)", _cache_folder())):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        detail = f"{free / GIB:.1f} GiB free at {folder}"
        if not os.access(existing, os.W_OK):
            yield Check(name, "fail", f"{existing} is not writable", f"chown it to {os.getuid()}, or work elsewhere")
        elif free < 2 * GIB:
            yield Check(name, "fail" if free < GIB // 4 else "warn", detail, "Free at least 2 GiB there.")
        else:
            yield Check(name, "ok", detail)


def check_shared_memory() -> Iterator[Check]:
    """Ray's object store, the loader's workers and DeepSpeed's collectives on CPU all live in /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        if sys.platform == "linux":
            yield Check("shared memory", "fail", "no /dev/shm", "mount -t tmpfs tmpfs /dev/shm")
        return
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} GiB at /dev/shm"
    if usage.free < GIB // 2:
        fix = (
            "docker run --shm-size=8g, a Kubernetes emptyDir with medium: Memory, or mount -o remount,size=8g /dev/shm"
        )
        yield Check("shared memory", "fail" if usage.free < GIB // 16 else "warn", detail, fix)
    else:
        yield Check("shared memory", "ok", detail)


def check_gpu() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(f"gpu {index}", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    elif shutil.which("nvidia-smi") and "GPU" in (output_of(["nvidia-smi", "-L"]) or ""):
        fix = f"torch {torch.__version__} has no working CUDA: pip install torch==2.13.0 from an index with CUDA wheels"
        yield Check("gpu", "warn", "nvidia-smi lists one, torch sees none", fix)
    else:
        yield Check("gpu", "ok", "none; training runs on CPU")


def _cache_folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
