"""Processes that a test starts, and that do not outlive it."""

import subprocess
from typing import Any


def ended_within(seconds: float, process: "subprocess.Popen[Any]") -> int:
    """The exit code of a process that ends by itself within that time; else it is killed.

    Raises:
        AssertionError: it had to be killed.
    """
    try:
        return process.wait(seconds)
    except BaseException as error:  # The limit of the test included.
        process.kill()
        process.wait(30)
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"still running after {seconds:.0f} s: {process.args}") from None
        raise
