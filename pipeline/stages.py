"""A chain of stages in one folder, resumed by running it again.

A stage is done when its record says so under the same key; the key covers its settings and the keys
of all stages it reads, so changing a setting redoes that stage and what depends on it, and nothing else.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.files import write_atomically

RECORD = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One step of a chain. ``run(folder)`` does the work and returns facts for the record (JSON values)."""

    name: str
    title: str
    run: Callable[[Path], Mapping[str, Any]]
    settings: Mapping[str, Any]
    after: Sequence[str] = ()


def run_stages(stages: Sequence[Stage], root: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Run the stages in order below ``root``, skipping those that are done; return all records by name.

    A stage interrupted under the same key finds its folder as it left it (and resumes from what is
    there); under another key the folder is removed first.
    """
    records: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages, start=1):
        folder = root / stage.name
        key = _key(stage, records)
        heading = f"[{number}/{len(stages)}] {stage.title}"
        before = read_record(folder)
        if before.get("key") != key:
            shutil.rmtree(folder, ignore_errors=True)
            before = {}
        if before.get("done"):
            say(f"{heading}: done before")
            records[stage.name] = before
            continue
        say(heading)
        spent = before.get("seconds", 0.0)
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, {"name": stage.name, "title": stage.title, "key": key, "done": False, "seconds": spent})
        facts: Mapping[str, Any] = {}
        try:
            facts = stage.run(folder)
            done = True
        except BaseException:
            done = False
            raise
        finally:
            seconds = spent + time.monotonic() - started
            record = {"name": stage.name, "title": stage.title, "key": key, "done": done, "seconds": seconds, **facts}
            _write_record(folder, record)
        records[stage.name] = record
        say(f"      {seconds:.0f} s")
    return records


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a stage folder; empty when there is none."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return record


def _key(stage: Stage, records: Mapping[str, Mapping[str, Any]]) -> str:
    upstream = {name: records[name]["key"] for name in stage.after}
    canonical = json.dumps([stage.name, dict(stage.settings), upstream], sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=2, default=str).encode())
