"""Fixtures that several floors share, and the account of skipped tests at the end of a run."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.dataset import REPOSITORY
from tests.support.s3 import s3_server  # noqa: F401  (a fixture: pytest finds it here)
from tests.support.watchdog import Watchdog

# A word in the reason of a skip, and what makes that test run.
_REMEDIES = {
    "IRD_REAL_DATA": "IRD_REAL_DATA=/folder/of/benchmark/pictures make test",
    "chromium pdsh sshd ssh numactl iproute2 postgresql": "sudo bash infra/install_test_tools.sh (Debian or Ubuntu)",
    "gpu cuda": "run on a machine with a GPU",
    "root": "sudo make test, best in a container",
}


# The longest files, by measured CPU time, the longest first.
_LONGEST = (
    "end_to_end/test_demo.py",
    "end_to_end/test_two_hosts.py",
    "training/test_loop.py",
    "infra/tracking/test_training.py",
    "infra/tracking/test_outage.py",
    "pipeline/registry/test_packaging.py",
    "datagen/scan/test_faults.py",
    "datagen/test_kills.py",
    "infra/test_extensions.py",
    "end_to_end/test_doors.py",
    "datagen/test_two_nodes.py",
    "infra/test_deploy.py",
    "datagen/test_build.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Nothing that hangs keeps a run from its end."""
    config.pluginmanager.register(Watchdog(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then what is slow: begun last, a long file would be alone at the end of a run."""
    here = Path(__file__).parent
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    place = {here / name: number for number, name in enumerate(_LONGEST, start=-len(_LONGEST))}
    items.sort(key=lambda item: place.get(item.path, item.path not in slow))


@pytest.fixture(scope="session")
def once_per_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once_per_run(name, make)``: a folder that ``make(folder)`` filled, shared by all worker processes of this run.

    What lies in it is for reading only: a test that changes it works on a copy.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own below the run's

    def find_or_make(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = root / f"shared-{name}", root / f"shared-{name}.made"
        with open(root / f"shared-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return find_or_make


@pytest.fixture(scope="session")
def small_dataset(once_per_run: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The default corpus in three or more shards, built by ``python -m datagen build`` on two workers. For reading."""
    config = str(REPOSITORY / "configs/datagen/demo.yaml")

    def build(out: Path) -> None:
        command = [sys.executable, "-m", "datagen", "build", "--config", config, f"out={out}", "num_cpus=2"]
        subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=REPOSITORY)

    return once_per_run("dataset", build)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium that runs headless."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium on PATH")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real benchmark pictures, which are too large to ship."""
    folder = os.environ.get("IRD_REAL_DATA")
    if not folder:
        pytest.skip("IRD_REAL_DATA is not set")
    if not Path(folder).is_dir():
        pytest.fail(f"IRD_REAL_DATA={folder} is no folder")
    return Path(folder)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests skipped, why, and how to get them."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.section(f"{len(skipped)} tests skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4d}  {reason}{_remedy(reason)}")


def _remedy(reason: str) -> str:
    words = set(re.findall(r"[a-z_0-9]+", reason.lower()))
    return "".join(
        f"\n      to run: {remedy}" for names, remedy in _REMEDIES.items() if words & set(names.lower().split())
    )
