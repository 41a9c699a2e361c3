"""No rank waits for ever for one that is gone: heartbeats through rank 0's store, and a limit on a step.

A collective whose other end has vanished without a word (a host cut off, a machine without power) waits as long as the
timeout of the process group, and then says nothing that helps. So every rank leaves a pulse in the store, from a thread
that no step, compilation or checkpoint delays. Rank 0 reads them all. Where one stays away for IRD_HOST_TIMEOUT seconds
(120) it leaves a verdict that names the host, which all ranks find at their next pulse and end with. A rank that does
not hear from the store itself for that long has lost the host of rank 0. Where all pulses go on but no step ends for
IRD_STEP_TIMEOUT seconds (600; 0: no limit), the verdict says where the ranks stand.
"""

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator

from infra.errors import Refusal
from infra.launcher import LOST
from training.rendezvous import Meeting, say, seconds_of

_AGAIN = (
    "Run the same command to go on from the last checkpoint; `ird doctor --hostfile HOSTFILE` says which hosts answer"
)
# On the stack of a thread that compiles, and not on that of one that runs what was compiled.
_COMPILERS = ("_dynamo/convert_frame.py", "_inductor/compile_fx.py")
_CONNECTION = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe|DistNetwork|DistBackend", re.IGNORECASE
)


class Watchdog:
    """Watches over the ranks of a run; with one rank, or without a meeting, over nothing.

    The loop calls ``beat`` once before its first step and at the end of each, and puts what may take long between two
    steps into ``paused``. Neither costs a microsecond, nor waits for anything.
    """

    def __init__(self, meeting: Meeting | None) -> None:
        self._closed = threading.Event()
        self._beaten = 0.0  # 0: no step has begun, so none can be late
        self._steps = self._pauses = 0
        self._meeting = meeting
        if meeting is None:
            return
        self._step_timeout = seconds_of("IRD_STEP_TIMEOUT", 600)
        self._host_timeout = max(1.0, seconds_of("IRD_HOST_TIMEOUT", 120))
        self._interval = min(5.0, self._host_timeout / 5)
        self._answered = time.monotonic()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._pulse = threading.Thread(target=self._keep_pulse, name="pulse", daemon=True)
        self._pulse.start()
        threading.Thread(target=self._watch_store, name="watch-store", daemon=True).start()
        atexit.register(self.close)

    @property
    def watches(self) -> bool:
        """Whether there are other ranks."""
        return self._meeting is not None

    def beat(self) -> None:
        """A step has ended."""
        self._beaten = time.monotonic()
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take longer than a step: validation, a checkpoint. No step is late meanwhile, on any rank."""
        self._pauses += 1
        try:
            yield
        finally:
            if self._beaten:
                self._beaten = time.monotonic()
            self._pauses -= 1

    def close(self) -> None:
        """This rank has ended well, and will not be missed."""
        if self._meeting is None or self._closed.is_set():
            return
        self._closed.set()
        self._pulse.join(timeout=self._interval)  # what it writes now would take the place of the last word
        with contextlib.suppress(RuntimeError):
            self._meeting.store.set(f"ird/pulse/{self._meeting.rank}", "ended")

    def blame(self, error: BaseException) -> int:
        """Tell all ranks why this one fails, unless they know already; returns the exit code that they all take.

        An error of a connection is only the news that another rank has gone: the verdict is then about that one.
        """
        refused = isinstance(error, Refusal)
        if self._meeting is None:
            return 2 if refused else 1
        lost = not refused and bool(_CONNECTION.search(f"{type(error).__name__} {error}"))
        code = 2 if refused else LOST if lost else 1
        text = str(error) if refused else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        me = f"rank {self._meeting.rank} on {socket.gethostname()}"
        if lost:
            text = f"{me} lost its connection to {self._peer_in(text)}, which was killed or cut off. {_AGAIN}"
        else:
            text = f"{me} failed, and so all ranks end: {text}"
        code, verdict = self._pass_verdict(code, text)
        if verdict == text or _speaks():
            say(verdict)
        return code

    def _keep_pulse(self) -> None:
        assert self._meeting is not None
        store, rank = self._meeting.store, self._meeting.rank
        count, woken = 0, time.monotonic()
        while not self._closed.wait(self._interval):
            if time.monotonic() - woken > 3 * self._interval:
                self._heard.clear()  # it was this process that stood still: others get their time anew
            woken = time.monotonic()
            count += 1
            busy = self._pauses > 0 or _compiles()
            try:
                store.set(f"ird/pulse/{rank}", f"{count} {int(busy)} {self._steps}")
                judged = store.check(["ird/verdict"])
                self._answered = time.monotonic()
                if judged:
                    store.add("ird/told", 1)
                    self._end(*json.loads(store.get("ird/verdict")))
                if rank == 0:
                    self._look_for_lost_ranks()
                self._look_at_own_step(busy)
            except RuntimeError:
                continue  # the store is away: `_watch_store` knows for how long

    def _watch_store(self) -> None:
        """In a thread of its own, since the other may wait for the store."""
        assert self._meeting is not None
        woken = time.monotonic()
        while not self._closed.wait(self._interval / 2):
            now = time.monotonic()
            if now - woken > 3 * self._interval:
                self._answered = now
            woken = now
            if now - self._answered > self._host_timeout:
                where = self._meeting.where
                text = f"rank 0 at {where} has not answered for {self._host_timeout:.0f} s: its host is down or cut off"
                self._end(LOST, f"{text} from {socket.gethostname()}, or it was killed. {_AGAIN}")

    def _look_for_lost_ranks(self) -> None:
        now = time.monotonic()
        for rank, pulse in self._pulses().items():
            if rank not in self._heard or self._heard[rank][0] != pulse or pulse == b"ended":
                self._heard[rank] = (pulse, now)
        lost = [rank for rank, (_, heard) in self._heard.items() if now - heard > self._host_timeout]
        if lost:
            text = f"{self._named(lost)} has not been heard of for {self._host_timeout:.0f} s (IRD_HOST_TIMEOUT): "
            text += "the host is down or cut off, or the rank was killed or stopped"
            self._end(*self._pass_verdict(LOST, f"{text}. {_AGAIN}"))

    def _look_at_own_step(self, busy: bool) -> None:
        if not self._beaten or not self._step_timeout:
            return
        if busy:
            self._beaten = time.monotonic()
        if time.monotonic() - self._beaten <= self._step_timeout:
            return
        pulses = {rank: pulse.split() for rank, pulse in self._pulses().items() if pulse != b"ended"}
        if any(pulse[1] == b"1" for pulse in pulses.values()):
            self._beaten = time.monotonic()  # another rank takes its time, and has said so
            return
        steps = {rank: int(pulse[2]) for rank, pulse in pulses.items()}
        behind = [rank for rank, step in steps.items() if step == min(steps.values())]
        text = f"no step ended for {self._step_timeout:.0f} s (IRD_STEP_TIMEOUT), though all ranks are alive"
        if len(behind) < len(steps):
            text += f"; {self._named(behind)} is behind the others"
        text += f". Rank {self._meeting.rank if self._meeting else 0} on {socket.gethostname()} stands at {_place()}"
        self._end(*self._pass_verdict(LOST, f"{text}. {_AGAIN}"))

    def _pulses(self) -> dict[int, bytes]:
        assert self._meeting is not None
        ranks = range(self._meeting.world_size)
        return dict(zip(ranks, self._meeting.store.multi_get([f"ird/pulse/{rank}" for rank in ranks])))

    def _pass_verdict(self, code: int, text: str) -> tuple[int, str]:
        """Leave a verdict for all ranks; the first one stands, and is returned."""
        assert self._meeting is not None
        store, deadline = self._meeting.store, time.monotonic() + 2 * self._interval
        try:
            code, text = json.loads(store.compare_set("ird/verdict", "", json.dumps([code, text])))
            told = store.add("ird/told", 1)
            # The store ends with rank 0, and the others come to read it.
            while self._meeting.rank == 0 and told < self._meeting.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                told = store.add("ird/told", 0)
        except RuntimeError:
            pass  # then this rank ends with what it knows
        return code, text

    def _named(self, ranks: list[int]) -> str:
        """Hosts first: that is what a person looks for."""
        assert self._meeting is not None
        hosts: dict[str, list[str]] = {}
        for rank in ranks:
            host = json.loads(self._meeting.store.get(f"ird/member/{rank}"))["host"]
            hosts.setdefault(host, []).append(str(rank))
        return ", ".join(f"{host} (rank {', '.join(numbers)})" for host, numbers in hosts.items())

    def _peer_in(self, text: str) -> str:
        """The host whose address stands in an error of gloo."""
        assert self._meeting is not None
        with contextlib.suppress(RuntimeError):
            for member in self._meeting.members():
                if f"[{member['address']}]" in text:
                    return f"{member['host']} ({member['address']})"
        return "another rank"

    def _end(self, code: int, text: str) -> None:
        """End at once: the main thread may wait for ever in a collective, and interpreter and threads with it."""
        if self._closed.is_set():
            return
        if _speaks():
            say(text)
        os._exit(code)


def _speaks() -> bool:
    """One rank of each host is enough."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _compiles() -> bool:
    """Whether the main thread is compiling: that may take longer than any step, and nobody announces it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COMPILERS):
            return True
        frame = frame.f_back
    return False


def _place() -> str:
    """Where the main thread stands: file, line and function, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None and len(places) < 4:
        file = "/".join(frame.f_code.co_filename.split("/")[-2:])
        places.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places)
