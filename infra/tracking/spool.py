"""The append-only file of a run's events, one JSON object a line, and the note of how far it has been delivered.

An event is ``{"at": ms, KIND: body}`` with one of these kinds:

    start     {"session", "key", "name", "experiment", "parent", "uri", "host", "pid", "born", "gpus"}: a process began
    params    {name: text}
    tags      {name: text}
    metrics   {name: number, or null for NaN}, and "step" beside it
    artifact  {"path", "folder"}: a reference; the file itself is read when it is sent
    end       {"session", "status", "exit"}: the process is done with the run

A process that is killed while it writes leaves half a line. It is closed by the next writer, and passed over.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from infra.files import write_atomically

MAIN = "events"  # the spool of the run itself; those of hosts have names of their own
_PIECE = 4 * 1024**2


@dataclass(frozen=True)
class Event:
    """One line: what happened, when (ms since 1970), and where the line ends in the file."""

    kind: str
    body: Any
    at: int
    step: int
    end: int


@dataclass
class Delivery:
    """How far a spool has been delivered. Written by its courier alone; losing it costs time, not points."""

    run_id: str = ""
    offset: int = 0  # bytes
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # references before ``offset`` that are still to send
    session: str = ""  # the last one whose start was delivered, or tried
    failures: int = 0
    error: str = ""  # why the last try failed; empty when it went through


class Spool:
    """One spool: ``folder``/tracking/``name``.jsonl and its companions."""

    def __init__(self, folder: Path, name: str = MAIN) -> None:
        self.folder = folder / "tracking"
        self.name = name
        self.path = self.folder / f"{name}.jsonl"
        self.lock = self.folder / f"{name}.lock"
        self.log = self.folder / f"{name}.log"
        self.refused = self.folder / f"{name}.refused.jsonl"
        self._note = self.folder / f"{name}.sent.json"

    def open(self) -> int:
        """A descriptor to append with; half a line that a killed writer left is closed first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return descriptor

    def size(self) -> int:
        """Bytes of the file; 0 when there is none."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, offset: int = 0) -> Iterator[Event]:
        """The events after ``offset``, as far as whole lines are there."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(offset)
            rest = b""
            while piece := file.read(_PIECE):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    offset += len(line) + 1
                    if (event := _parse(line, offset)) is not None:
                        yield event

    def sync(self) -> None:
        """Wait until what is in the file is on the disk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def delivery(self) -> Delivery:
        """The note of what has been delivered; a fresh one where there is none, or a damaged one."""
        known = {one.name for one in fields(Delivery)}
        try:
            noted = json.loads(self._note.read_text())
            return Delivery(**{name: value for name, value in noted.items() if name in known})
        except (OSError, ValueError, AttributeError):
            return Delivery()

    def note(self, delivery: Delivery) -> None:
        """Write the note, whole or not at all; not where the run's folder was deleted meanwhile."""
        if self.folder.exists():
            write_atomically(self._note, json.dumps(asdict(delivery)).encode())

    def left(self) -> int:
        """How many events are still to be delivered. A metric, param or tag is an event of its own."""
        delivery = self.delivery()
        lines = sum(
            len(event.body) if event.kind in {"metrics", "params", "tags"} else 1
            for event in self.read(delivery.offset)
        )
        return lines + len(delivery.artifacts)


class Sessions:
    """Which session began last and which have ended; every look reads only what is new."""

    def __init__(self, spool: Spool) -> None:
        self.latest = ""
        self.ended: set[str] = set()
        self.last_at = 0
        self.last_steps: dict[str, int] = {}
        self.key = ""  # of the run, as its first session has it
        self._spool = spool
        self._offset = 0
        self.look()

    def look(self) -> "Sessions":
        """Read on."""
        for event in self._spool.read(self._offset):
            self._offset = event.end
            self.last_at = max(self.last_at, event.at)
            if event.kind == "start":
                self.latest = event.body["session"]
                self.key = self.key or event.body["key"]
            elif event.kind == "end":
                self.ended.add(event.body["session"])
            elif event.kind == "metrics":
                self.last_steps |= dict.fromkeys(event.body, event.step)
        return self


def line_of(at: int, kind: str, body: Mapping[str, Any], step: int | None = None) -> bytes:
    """The line of an event."""
    event: dict[str, Any] = {"at": at, kind: body}
    if step is not None:
        event["step"] = step
    return json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _parse(line: bytes, end: int) -> Event | None:
    try:
        fields_of_line = json.loads(line)
        at, step = int(fields_of_line.pop("at")), int(fields_of_line.pop("step", 0))
        ((kind, body),) = fields_of_line.items()
    except (ValueError, KeyError, AttributeError, TypeError):
        return None  # torn by a kill, or blank
    return Event(kind, body, at, step, end)


def spools_below(folder: Path) -> list[Spool]:
    """All spools in ``folder`` and below it, the run's own before those of its hosts."""
    paths = [path for path in folder.rglob("tracking/*.jsonl") if not path.name.endswith(".refused.jsonl")]
    paths.sort(key=lambda path: (path.parent, path.stem != MAIN, path.name))
    return [Spool(path.parent.parent, path.stem) for path in paths]
