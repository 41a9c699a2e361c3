"""A queue in front of the one thing that costs: so many at work, so many waiting, and everybody else is told when."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


class FullError(RuntimeError):
    """There is no room; ``retry_after`` says in how many seconds there probably is."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Admission:
    """Runs work on ``workers`` threads and lets ``waiting`` more wait for one; further ones are refused at once.

    A thread cannot be stopped: who enters must bound what one piece of work may cost.
    """

    def __init__(self, workers: int, waiting: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="restore")
        self._lock = threading.Lock()
        self._workers, self._room = workers, workers + waiting
        self._inside = 0
        self._seconds = 1.0  # that a piece of work takes, smoothed

    def check(self) -> None:
        """Raises FullError when there is no room, before anything is spent on a request."""
        with self._lock:
            if self._inside >= self._room:
                raise FullError(self._retry_after())

    def enter(self, work: Callable[[], tuple[ResultT, float]]) -> "Future[tuple[ResultT, float]]":
        """Queue ``work``, which returns a result and the seconds that it took. Cancel the future to give up waiting.

        Raises:
            FullError: there is no room.
        """
        with self._lock:
            if self._inside >= self._room:
                raise FullError(self._retry_after())
            self._inside += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._leave)
        return future

    @property
    def inside(self) -> int:
        """How many are at work or waiting."""
        return self._inside

    def retry_after(self) -> int:
        """Seconds until there is probably room."""
        with self._lock:
            return self._retry_after()

    def close(self) -> None:
        """Give up what waits, and let what is at work end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, future: "Future[tuple[ResultT, float]]") -> None:
        with self._lock:
            self._inside -= 1
            if not future.cancelled() and future.exception() is None:
                self._seconds += 0.2 * (future.result()[1] - self._seconds)

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._inside * self._seconds / self._workers))
