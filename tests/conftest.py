"""Fixtures that several floors share, and the account of skipped tests at the end of a run."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.dataset import small_dataset  # noqa: F401  (a fixture: pytest finds it here)
from tests.support.s3 import s3_server  # noqa: F401

# A word in the reason of a skip, and what makes that test run.
_REMEDIES = {
    "IRD_REAL_DATA": "IRD_REAL_DATA=/folder/of/benchmark/pictures make test",
    "chromium pdsh sshd ssh numactl iproute2": "sudo bash infra/install_test_tools.sh (Debian or Ubuntu)",
    "gpu cuda": "run on a machine with a GPU",
    "root": "sudo make test, best in a container",
}


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
