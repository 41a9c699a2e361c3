"""Checkpoints: published whole or not at all, checksummed, self-describing.

Layout: ``FOLDER/step-00000100/{state.pt, manifest.json}`` and ``FOLDER/latest``, which names a step
folder only after that folder is complete and in place.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from infra.errors import Refusal
from infra.files import sha256_of_file, write_atomically


class CheckpointError(Refusal, RuntimeError):
    """No usable checkpoint where one was expected. The message names the folder and what to do."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], manifest: dict[str, Any], keep: int) -> Path:
    """Publish ``state`` (tensors and plain values) as the checkpoint of ``step``; keep the last ``keep``.

    Args:
        state: what ``torch.save`` writes: weights, moving average, optimizer, loop and loader state.
        manifest: plain facts about it (config, code version, dataset id, run id), readable without torch.
    """
    name = f"step-{step:08d}"
    if checkpoint_fault(folder / name) is None:  # a resumed run came by here again: same step, same bytes
        write_atomically(folder / "latest", name.encode())
        return folder / name
    temporary = folder / f".tmp-{name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    torch.save(state, temporary / "state.pt")
    with open(temporary / "state.pt", "rb+") as file:
        os.fsync(file.fileno())
    facts = {**manifest, "step": step, "sha256": {"state.pt": sha256_of_file(temporary / "state.pt")}}
    write_atomically(temporary / "manifest.json", json.dumps(facts, indent=2, sort_keys=True).encode())
    final = folder / name
    shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been returned above
    temporary.rename(final)
    write_atomically(folder / "latest", name.encode())
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and manifest of the newest checkpoint whose checksum holds; None when there is none at all.

    A damaged checkpoint is named and passed over for the one before it.

    Raises:
        CheckpointError: checkpoints are there, and every one is damaged.
    """
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    candidates = _steps(folder)
    for candidate in reversed(candidates):
        fault = checkpoint_fault(candidate)
        if fault is None:
            state = torch.load(candidate / "state.pt", map_location="cpu", weights_only=True)
            return state, json.loads((candidate / "manifest.json").read_text())
        print(f"checkpoint: {candidate} is damaged ({fault}); trying the one before it")
    if candidates:
        raise CheckpointError(
            f"{folder}: all {len(candidates)} checkpoints are damaged; remove the folder to start anew"
        )
    return None


def checkpoint_fault(checkpoint: Path) -> str | None:
    """What is wrong with one checkpoint folder, or None when its checksum holds."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        expected = manifest["sha256"]["state.pt"]
        actual = sha256_of_file(checkpoint / "state.pt")
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None if actual == expected else f"sha256 of state.pt is {actual[:12]}…, the manifest says {expected[:12]}…"


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
