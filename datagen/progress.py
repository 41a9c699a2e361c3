"""Progress that reads well on a terminal and, line by line, in the log of a job."""

import sys
import time


class Progress:
    """Counts pictures and megapixels, and prints a line every few seconds and at the end."""

    def __init__(self, step: str, total: int, unit: str) -> None:
        self._step, self._total, self._unit = step, total, unit
        self._start = self._printed = time.monotonic()
        self._done = self._new = 0
        self._notes = ""
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int, *, fresh: bool = True, notes: str = "") -> None:
        """Count ``count`` units as done; those found done already (not ``fresh``) have no part in the rate."""
        self._done += count
        self._new += count if fresh else 0
        self._notes = notes or self._notes
        if time.monotonic() - self._printed > (0.5 if self._terminal else 5.0):
            self._print(end="\r" if self._terminal else "\n")

    def finish(self) -> float:
        """Print the last line; returns the wall seconds since the start."""
        self._print(end="\n")
        return time.monotonic() - self._start

    def _print(self, end: str) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._start
        rate = self._new / elapsed if elapsed > 0 else 0.0
        left = self._total - self._done
        eta = f", {left / rate:.0f} s left" if rate and left else ""
        notes = f", {self._notes}" if self._notes else ""
        share = f"{self._done}/{self._total} {self._unit}"
        line = f"[{self._step}] {share}, {rate:.1f} {self._unit}/s{notes}{eta}"
        print(f"{line:<100}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
