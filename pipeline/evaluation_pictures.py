"""The pictures that an evaluation makes: kept as PNG, and not made again where an evaluation was interrupted."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from datagen.picture.region import decode_whole
from infra.storage import open_store
from pipeline.places import Place
from pipeline.record import Record

UNFINISHED = "unfinished.jsonl"  # a line a picture; only while an evaluation runs, or after it was interrupted


class Restored(NamedTuple):
    """A restored picture, uint8 RGB [H, W, 3], the seconds that it took, and what a person should know of it."""

    picture: np.ndarray
    seconds: float
    note: str


class RestoredPictures:
    """``out``/restored/TASK/NAME.png, and the record of an evaluation that is not finished."""

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        """Take up what an interrupted evaluation left in ``out``; one of another ``request`` begins anew."""
        self._store = open_store(out)
        self._record = Record(self._store, request, UNFINISHED)
        if not self.known:
            self.finish()

    @property
    def known(self) -> int:
        """How many pictures the record holds."""
        return self._record.known

    def find(self, task: str, name: str, given: np.ndarray) -> Restored | None:
        """What was made of ``given``, if it is known and its file is still what was written."""
        result = self._result(task, name)
        entry = self._record.find(result.key, _digest(given), result)
        return None if entry is None else Restored(decode_whole(result.read()), entry["seconds"], entry["note"])

    def keep(self, task: str, name: str, given: np.ndarray, restored: Restored) -> None:
        """Write the picture, then note it."""
        result = self._result(task, name)
        result.write(cv2.imencode(".png", cv2.cvtColor(restored.picture, cv2.COLOR_RGB2BGR))[1].tobytes())
        facts = {"picture": name, "seconds": restored.seconds, "note": restored.note}
        self._record.note(result.key, _digest(given), result, facts)

    def finish(self) -> None:
        """The evaluation is complete: the pictures stay, and the next one makes its own."""
        self._record.forget()

    def _result(self, task: str, name: str) -> Place:
        return Place(self._store, f"restored/{task}/{name}.png")


def _digest(picture: np.ndarray) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()
