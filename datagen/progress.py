"""Progress: a bar on a terminal, and in the log of a job plain lines."""

import atexit
import contextvars
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

_BETWEEN = 5.0  # Seconds from one line of a log to the next.
_PER_SECOND = 4  # How often a bar is drawn anew.


class Standing(NamedTuple):
    """How far a step is. ``rate``: units a second, without those found done; ``figures``: what else it tells."""

    step: str
    done: int
    total: int
    unit: str
    rate: float
    figures: dict[str, float]


Watcher = Callable[[Standing], None]
_watcher: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)
_drawn: list[Bar] = []


@contextmanager
def followed(watcher: Watcher | None = None) -> Iterator[None]:
    """Within it ``watcher`` is told how far every step is; leaving it in any way leaves no bar behind.

    The watcher is called by the thread that advances, so it must be quick and must not raise.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)
        _stop_drawing()


class Progress:
    """Counts what a step has done and shows it on stderr: a bar, or line by line where that is no terminal.

    Args:
        step: name of the step.
        total: how many units there are to do.
        unit: what is counted, in the plural.
    """

    def __init__(self, step: str, total: int, unit: str) -> None:
        self._step, self._total, self._unit = step, total, unit
        self._start = time.monotonic()
        self._counting = self._start
        self._next_line = self._start
        self._done = self._new = 0
        self._notes = ""
        self._figures: dict[str, float] = {}
        self._watcher = _watcher.get()
        self._bar = _start_bar(step, total)
        if not self._bar:
            self._print_line()

    def advance(
        self, count: int, *, fresh: bool = True, notes: str = "", figures: dict[str, float] | None = None
    ) -> None:
        """Count ``count`` units as done; those found done already (not ``fresh``) have no part in the rate.

        The time until the first is counted has none either, where somebody told (a count of 0) what it was spent on.

        Args:
            notes: what else people should see.
            figures: what else a watcher should know, by name.
        """
        if not count and not self._done:
            self._counting = time.monotonic()
        self._done += count
        self._new += count if fresh else 0
        self._notes = notes or self._notes
        self._figures |= figures or {}
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, told=self._told())
        elif time.monotonic() >= self._next_line:
            self._print_line()
        self._tell()

    def finish(self) -> float:
        """Show the last state; returns the wall seconds since the start."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, told=self._told())
            _stop_drawing()
        else:
            self._print_line()
        self._tell()
        return time.monotonic() - self._start

    def _rate(self) -> float:
        elapsed = time.monotonic() - self._counting
        return self._new / elapsed if elapsed > 0 else 0.0

    def _told(self) -> str:
        rate, left = self._rate(), self._total - self._done
        told = [f"{rate:,.1f} {self._unit}/s"] if self._done else []
        told += [self._notes] if self._notes else []
        if rate and left > 0:
            told.append(f"{spoken(left / rate)} left")
        return ", ".join(told)

    def _print_line(self) -> None:
        self._next_line = time.monotonic() + _BETWEEN
        told = self._told()
        so_far = f"[{self._step}] {self._done}/{self._total} {self._unit}"
        print(", ".join([so_far, told] if told else [so_far]), file=sys.stderr, flush=True)

    def _tell(self) -> None:
        if self._watcher:
            self._watcher(Standing(self._step, self._done, self._total, self._unit, self._rate(), self._figures))


def spoken(seconds: float) -> str:
    """A time to wait, as a person would say it: ``10 s``, ``2 min 05 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def _start_bar(step: str, total: int) -> Bar | None:
    """A bar on stderr, drawn by a thread of its own; None where stderr cannot be drawn upon."""
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        return None
    bar = Bar(
        TextColumn("{task.description:<7}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=10)),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        refresh_per_second=_PER_SECOND,
        expand=True,
    )
    bar.add_task(step, total=total, told="")
    _stop_drawing()
    bar.start()
    _drawn.append(bar)
    return bar


def _stop_drawing() -> None:
    """Leave the bars as they stand and give the cursor back."""
    while _drawn:
        _drawn.pop().stop()


atexit.register(_stop_drawing)
