"""Checkpoints in a folder or a bucket: published whole or not at all, checksummed, self-describing.

Layout: ``step-00000100/state.pt``, ``step-00000100/manifest.json`` and ``latest``. The manifest holds the sha256 of
the state and is written after it, so a checkpoint is there when its manifest is; ``latest`` is written last, for people
and scripts. What a killed writer left has no manifest, is no checkpoint, and is removed by the next one.
"""

import hashlib
import io
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from infra.errors import Refusal
from infra.storage import NotFoundError, Store

STATE, MANIFEST, LATEST = "state.pt", "manifest.json", "latest"


class CheckpointError(Refusal, RuntimeError):
    """No usable checkpoint where one was expected, or none could be written. The message says where, and what to do."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``last`` ones, and those of multiples of ``every`` (0: of none)."""

    last: int = 2
    every: int = 0


def save_checkpoint(
    store: Store, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any], keep: Keep = Keep()
) -> str:
    """Publish ``state`` (tensors and plain values) as the checkpoint of ``step``; return its name.

    The whole of it is held in memory once more while it is written.

    Args:
        manifest: plain facts about it (config, code version, dataset id, run id), readable without torch.

    Raises:
        StorageError: the store did not take it.
    """
    name = f"step-{step:08d}"
    if checkpoint_fault(store, name) is not None:  # else a resumed run came by here again: same step, same bytes
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        facts = {**manifest, "step": step, "sha256": {STATE: hashlib.sha256(data).hexdigest()}}
        store.delete(f"{name}/{MANIFEST}")  # of a damaged one
        store.write(f"{name}/{STATE}", bytes(data))
        store.write(f"{name}/{MANIFEST}", json.dumps(facts, indent=2, sort_keys=True).encode())
    store.write(LATEST, name.encode())
    _sweep(store, name, keep)
    return name


def load_checkpoint(store: Store) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """State and manifest of the newest checkpoint whose checksum holds; None when there is none at all.

    A damaged checkpoint is named and passed over for the one before it.

    Raises:
        CheckpointError: checkpoints are there, and every one is damaged.
    """
    names = [name for name, files in _listed(store).items() if MANIFEST in files]
    for name in reversed(names):
        try:
            data, manifest = _read(store, name)
        except _Damaged as fault:
            print(f"checkpoint: {store.uri}/{name} is damaged ({fault}); trying the one before it", flush=True)
        else:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), manifest
    if names:
        raise CheckpointError(f"{store.uri}: all {len(names)} checkpoints are damaged; remove them to start anew")
    return None


def checkpoint_fault(store: Store, name: str) -> str | None:
    """What is wrong with one checkpoint, or None when its checksum holds."""
    try:
        _read(store, name)
    except _Damaged as fault:
        return str(fault)
    return None


class _Damaged(Exception):
    pass


def _read(store: Store, name: str) -> tuple[bytes, dict[str, Any]]:
    try:
        manifest = json.loads(store.read(f"{name}/{MANIFEST}"))
        expected, data = manifest["sha256"][STATE], store.read(f"{name}/{STATE}")
    except (NotFoundError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise _Damaged(f"sha256 of {STATE} is {actual[:12]}…, the manifest says {expected[:12]}…")
    return data, manifest


class CheckpointWriter:
    """Writes checkpoints beside the training, one at a time: ``save`` copies the state and returns.

    A store that fails does not stop a run: it is said, and the next checkpoint is another try.
    """

    def __init__(self, store: Store, keep: Keep) -> None:
        self._store, self._keep = store, keep
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    def save(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Begin to write; wait first for the one before, which is done by then unless the store is very slow."""
        self._join()
        snapshot = _copied(state)
        self._thread = threading.Thread(target=self._write, args=(step, snapshot, dict(manifest)), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            CheckpointError: the last one could not be.
        """
        self._join()
        if self._fault is not None:
            raise CheckpointError(f"the last checkpoint could not be written: {self._fault}") from self._fault

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        self._fault = None
        try:
            save_checkpoint(self._store, step, state, manifest, self._keep)
        except Exception as error:  # of a store of any kind
            self._fault = error
            print(f"checkpoint: step {step} could not be written: {error}. The run goes on", flush=True)


def _copied(state: Any) -> Any:
    """``state`` with every tensor copied to the CPU, so that the next step may change it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return state


def _listed(store: Store) -> dict[str, set[str]]:
    """Files of each step folder, by its name, in order of steps."""
    found: dict[str, set[str]] = {}
    for entry in store.list("step-"):
        name, _, file = entry.key.partition("/")
        if re.fullmatch(r"step-\d{8,}", name):
            found.setdefault(name, set()).add(file)
    return found


def _sweep(store: Store, newest: str, keep: Keep) -> None:
    """Remove what ``keep`` does not hold: the manifest first, so that a half-removed checkpoint is none."""
    found = _listed(store)
    whole = [name for name, files in found.items() if MANIFEST in files]
    kept = {newest, *whole[-keep.last :]}
    kept |= {name for name in whole if keep.every and int(name.removeprefix("step-")) % keep.every == 0}
    for name in found.keys() - kept:
        for file in sorted(found[name]):  # manifest.json before state.pt
            store.delete(f"{name}/{file}")
