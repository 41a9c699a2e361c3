"""What a folder or prefix of results holds already, known by content, so that a rerun does only what is missing."""

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.files import sha256_of_file
from infra.storage import NotFoundError, Store
from pipeline.places import Job, Place

# One line for each picture that has been restored; what makes a rerun skip it.
RECORD = "restored.jsonl"
_EVERY_SECONDS = 15.0  # between two writes of the record of a bucket


class Record:
    """The pictures that a store holds restored: what went in, how it was done, what came out.

    In a folder a line is added after its picture is in place; a line that a killed process tore is passed over. A
    bucket cannot be added to, so its record is written whole, every few seconds and at the end; what a kill loses of it
    is done again.
    """

    def __init__(self, store: Store, request: Mapping[str, Any], file: str = RECORD) -> None:
        """Read the record of ``store``; results of another ``request`` (model and options) do not count."""
        self._store = store
        self._file = file
        self._local = not store.uri.startswith("s3://")
        self._request = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        self._known: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()
        self._torn = False
        try:
            text = store.read(file).decode(errors="replace")
        except NotFoundError:
            text = ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["name"]] = entry
            except (ValueError, KeyError, TypeError):
                continue

    @property
    def known(self) -> int:
        """How many results of this request are on record."""
        return sum(entry.get("request") == self._request for entry in self._known.values())

    def holds(self, job: Job) -> bool:
        """Whether the result is there, as it was written, for the same input and the same request."""
        try:
            return self.find(job.name, _identity(job.given), job.result) is not None
        except NotFoundError:
            return False

    def add(self, job: Job) -> None:
        """Note a result that is in place."""
        self.note(job.name, _identity(job.given), job.result, {})

    def find(self, name: str, given: str, result: Place) -> dict[str, Any] | None:
        """The line on ``name``, if ``result`` is there, as it was written, for an input that was ``given`` (what
        changes with its content) and the same request."""
        entry = self._known.get(name, {})
        if entry.get("request") != self._request or entry.get("input") != given:
            return None
        try:
            return entry if entry.get("output") == _identity(result) else None
        except NotFoundError:
            return None

    def note(self, name: str, given: str, result: Place, facts: Mapping[str, Any]) -> None:
        """Note ``result``, which is in place, and ``facts`` of it."""
        entry = {"name": name, "input": given, "request": self._request, "output": _identity(result), **facts}
        self._known[name] = entry
        if self._local:
            with open(Path(self._store.uri) / self._file, "a") as file:
                file.write("\n" * self._torn + json.dumps(entry) + "\n")
            self._torn = False
        elif time.monotonic() - self._written > _EVERY_SECONDS:
            self.close()

    def forget(self) -> None:
        """Take the record away; the results stay."""
        self._known.clear()
        self._torn = False
        with contextlib.suppress(NotFoundError):
            self._store.delete(self._file)

    def close(self) -> None:
        """Publish what a bucket's record lacks."""
        if not self._local:
            lines = (json.dumps(entry) + "\n" for entry in self._known.values())
            self._store.write(self._file, "".join(lines).encode())
            self._written = time.monotonic()


def _identity(place: Place) -> str:
    """What changes with the content: the sha256 of a file, the ETag of an object."""
    store = place.store
    assert store is not None
    if store.uri.startswith("s3://"):
        return f"etag:{store.stat(place.key).version}"
    path = Path(store.uri) / place.key
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file")
    return sha256_of_file(path)
