"""The pictures that an evaluation makes: kept as PNG, and not made again where an evaluation was interrupted."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from datagen.picture.region import decode_whole
from infra.files import sha256_of_file, write_atomically

UNFINISHED = "unfinished.jsonl"  # a line a picture; only while an evaluation runs, or after it was interrupted


class Restored(NamedTuple):
    """A restored picture, uint8 RGB [H, W, 3], the seconds that it took, and what a person should know of it."""

    picture: np.ndarray
    seconds: float
    note: str


class RestoredPictures:
    """``out``/restored/TASK/NAME.png, and the record of an evaluation that is not finished."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        """Take up what an interrupted evaluation left in ``out``; that of another ``request`` does not count."""
        self._out = out
        self._request = _digest(json.dumps(request, sort_keys=True).encode())
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            lines = (out / UNFINISHED).read_text().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by a kill: its picture is made again
            if entry["request"] == self._request:
                self._known[entry["task"], entry["picture"]] = entry
        # Without what does not count, and without a torn end that the next line would be added to.
        self._write()

    @property
    def known(self) -> int:
        """How many pictures the record holds."""
        return len(self._known)

    def find(self, task: str, name: str, given: np.ndarray) -> Restored | None:
        """What was made of ``given``, if it is known and its file is still what was written."""
        entry = self._known.get((task, name))
        path = self._path(task, name)
        if entry is None or entry["given"] != _digest(given.tobytes()) or not path.is_file():
            return None
        if sha256_of_file(path) != entry["file"]:
            return None
        return Restored(decode_whole(path.read_bytes()), entry["seconds"], entry["note"])

    def keep(self, task: str, name: str, given: np.ndarray, restored: Restored) -> None:
        """Write the picture, then note it."""
        path = self._path(task, name)
        data = cv2.imencode(".png", cv2.cvtColor(restored.picture, cv2.COLOR_RGB2BGR))[1].tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        entry = {"task": task, "picture": name, "request": self._request, "given": _digest(given.tobytes())}
        entry |= {"file": _digest(data), "note": restored.note}
        self._known[task, name] = {**entry, "seconds": restored.seconds}
        with open(self._out / UNFINISHED, "a") as record:
            record.write(json.dumps(self._known[task, name]) + "\n")

    def finish(self) -> None:
        """The evaluation is complete: the pictures stay, and the next one makes its own."""
        (self._out / UNFINISHED).unlink(missing_ok=True)

    def _path(self, task: str, name: str) -> Path:
        return self._out / "restored" / task / f"{name}.png"

    def _write(self) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in self._known.values())
        self._out.mkdir(parents=True, exist_ok=True)
        write_atomically(self._out / UNFINISHED, text.encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
