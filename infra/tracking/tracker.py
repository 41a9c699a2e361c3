"""What a run calls. Each call appends a line to the run's spool and returns; `infra.tracking.monitor` sends it."""

import contextlib
import functools
import json
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from infra.errors import without_password
from infra.tracking.client import TrackingConfig, masked, tracking_uri
from infra.tracking.monitor import beats, start_monitor
from infra.tracking.spool import Delivery, Sessions, Spool, line_of

NOTE = "mlflow.json"  # in the run's folder: its run id, for whoever comes later
KEY_PREFIX = "ird-"

_MAX_NAME, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000  # MLflow refuses longer ones
_FIRST_TRY = 60.0  # seconds that a start waits for the first try to reach the server (a new database takes 20)
_SILENCE = 30.0  # seconds without any delivery after which an end stops waiting
_FAILURES = 3  # tries that fail while nothing is delivered, after which it stops sooner
_LOOKS = 2.0  # seconds between two looks at the monitor
_REVIVALS = 5


class Tracker:
    """One MLflow run. Every method returns at once and without raising, whatever the server or the disk does.

    All processes that open the same folder, one after the other, are one run. A point of a metric whose step is not
    beyond the last one in the spool is dropped: a run that resumes from an older checkpoint computes some steps twice.
    """

    def __init__(
        self, settings: TrackingConfig, run_name: str, folder: Path, *, is_main: bool = True, gpus: int = 0
    ) -> None:
        """Go on with the run of ``folder``, or begin one; waits for the first try to reach the server, and no longer.

        Args:
            settings: where to record.
            run_name: name of a new run.
            folder: the run's own folder. It holds mlflow.json, with the run id, and tracking/, with the spool.
            is_main: false on every rank but 0: all methods then do nothing.
            gpus: devices at work, over all ranks; the tag ``ird.gpu_hours`` counts them.
        """
        self._settings = settings
        self._folder = folder
        self._spool = Spool(folder)
        self._key = ""
        self._run_id = ""
        self._session = secrets.token_hex(8)
        self._descriptor = -1
        self._last_at = 0
        self._last_steps: dict[str, int] = {}
        self._not_finite: set[str] = set()
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._active = is_main and settings.enabled
        if self._active:
            try:
                self._open(run_name, gpus)
            except Exception as error:  # a full or read-only disk must not stop training
                self._give_up(error)

    @property
    def run_id(self) -> str:
        """The run's id; empty as long as no server has given it one."""
        if not self._run_id and self._active:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._run_id = json.loads((self._folder / NOTE).read_text())["run_id"]
        return self._run_id

    @property
    def reference(self) -> str:
        """What a child takes as ``parent_run_id``: the run id, or a key by which the run is found later."""
        return self.run_id or self._key

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, nested mappings as dotted keys. On a resume the values first logged stand."""
        self._append("params", {_name(k): masked(str(v))[:_MAX_PARAM] for k, v in _flatten(params)})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, replacing former values."""
        self._append("tags", {_name(key): masked(str(value))[:_MAX_TAG] for key, value in tags.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record points at ``step``. NaN stays NaN; infinities become NaN, and that is said once a metric."""
        if not self._active:
            return
        step = int(step)
        points: dict[str, float | None] = {}
        for key, value in metrics.items():
            name = _name(key)
            if step > self._last_steps.get(name, -1):
                self._last_steps[name] = step
                points[name] = self._finite(name, float(value), step)
        if points:
            self._append("metrics", points, step)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Have a file uploaded, or a folder with all it holds. It is read later, so it has to stay where it is."""
        self._append("artifact", {"path": str(Path(path).absolute()), "folder": folder})

    def flush(self, timeout: float = 0.0) -> bool:
        """Whether everything so far has been delivered; waits up to ``timeout`` seconds for it."""
        deadline = time.monotonic() + timeout
        while not (delivered := not self._active or self._delivered()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return delivered

    def finish(self, status: str = "FINISHED", exit_state: str = "") -> bool:
        """End the run with an MLflow status: FINISHED, FAILED or KILLED (which a resume makes RUNNING again).

        Waits as long as events are being delivered. What cannot be stays in the spool, and it is said how to send it.

        Args:
            exit_state: the tag ``ird.exit``; default: finished, failed or stopped.

        Returns:
            Whether everything has been delivered.
        """
        if not self._active:
            return True
        state = exit_state or {"FINISHED": "finished", "FAILED": "failed"}.get(status, "stopped")
        self._append("end", {"session": self._session, "status": status, "exit": state})
        delivered = False
        try:
            delivered = self._wait_for_end()
            if not delivered:
                print(
                    f"tracking: {self._spool.left()} events could not be delivered to "
                    f"{masked(tracking_uri(self._settings))}; `ird track sync {self._folder}` sends them",
                    flush=True,
                )
            if self._spool.refused.exists():
                self._say(f"the server refuses what {self._spool.refused} names")
        except Exception as error:
            self._give_up(error)
        _ = self.run_id
        self._over.set()
        self._active = False
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        return delivered

    def _open(self, run_name: str, gpus: int) -> None:
        self._descriptor = self._spool.open()
        before = Sessions(self._spool)
        self._last_at, self._last_steps = before.last_at, before.last_steps
        self._key = before.key or KEY_PREFIX + secrets.token_hex(16)
        start = start_of(self._session, self._key, self._settings) | {"name": run_name, "gpus": gpus}
        self._append("start", start)
        os.fsync(self._descriptor)
        start_monitor(self._spool, tracking_uri(self._settings))
        self._wait_for_first_try()
        threading.Thread(target=self._watch, name="tracking", daemon=True).start()

    def _append(self, kind: str, body: Mapping[str, Any], step: int | None = None) -> None:
        """One write of one line: after it, a kill of this process loses nothing."""
        if not self._active:
            return
        try:
            with self._lock:
                self._last_at = max(self._last_at, time.time_ns() // 1_000_000)
                os.write(self._descriptor, line_of(self._last_at, kind, body, step))
        except Exception as error:  # a full disk must not stop training
            self._say(f"{type(error).__name__}: {error} ({self._spool.path}; the run goes on)")

    def _finite(self, name: str, value: float, step: int) -> float | None:
        if math.isfinite(value):
            return value
        if math.isinf(value) and name not in self._not_finite:
            # SQLite would turn it into 1.8e308, which ruins every plot.
            self._not_finite.add(name)
            self._say(f"{name} is {value} at step {step}; infinities are recorded as NaN")
        return None

    def _delivered(self) -> bool:
        delivery = self._spool.delivery()
        return delivery.offset >= self._spool.size() and not delivery.artifacts

    def _wait_for_first_try(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < _FIRST_TRY:
            delivery = self._spool.delivery()
            if delivery.session == self._session and (delivery.run_id or delivery.error):
                return self._say_outage(delivery)
            if time.monotonic() - started > _SILENCE and not beats(self._spool):
                return None
            time.sleep(0.02)
        return self._say_outage(Delivery(error="the server has not answered yet"))

    def _wait_for_end(self) -> bool:
        last = self._spool.delivery()
        quiet_since = time.monotonic()
        while not self._delivered():
            delivery = self._spool.delivery()
            if (delivery.offset, len(delivery.artifacts)) != (last.offset, len(last.artifacts)):
                quiet_since, last = time.monotonic(), delivery
            if time.monotonic() - quiet_since > _SILENCE or delivery.failures >= last.failures + _FAILURES:
                return self._delivered()
            time.sleep(0.05)
        return True

    def _watch(self) -> None:
        """Say an outage once, and start another monitor if someone killed it."""
        revivals = 0
        missing = 0
        while not self._over.wait(_LOOKS):
            with contextlib.suppress(Exception):
                self._say_outage(self._spool.delivery())
                missing = 0 if beats(self._spool) else missing + 1
                if missing > 2 and revivals < _REVIVALS:
                    revivals, missing = revivals + 1, -5
                    start_monitor(self._spool, tracking_uri(self._settings))

    def _say_outage(self, delivery: Delivery) -> None:
        if delivery.error and "outage" not in self._said:
            self._said.add("outage")
            self._say(f"{delivery.error} (events are kept in {self._spool.path}; the run goes on)")
        elif not delivery.error and "outage" in self._said and delivery.run_id:
            self._said.discard("outage")
            self._say("the server takes events again")

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            print(f"tracking: {masked(message)}", flush=True)

    def _give_up(self, error: Exception) -> None:
        self._say(f"{type(error).__name__}: {error}; nothing is recorded (the run goes on)")
        self._active = False


def start_of(session: str, key: str, settings: TrackingConfig) -> dict[str, Any]:
    """The body of a start event of this process, without the name and the devices of a run."""
    return {
        "session": session,
        "key": key,
        "experiment": settings.experiment,
        "parent": settings.parent_run_id,
        "uri": without_password(tracking_uri(settings)),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
    }


@functools.lru_cache(maxsize=4096)
def _name(key: str) -> str:
    """MLflow takes letters, digits and ``_-. :/`` in names, 250 at most, and what is a plain path of them."""
    parts = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:_MAX_NAME].split("/")
    return "/".join("_" if set(part) == {"."} else part for part in parts if part) or "_"


def _flatten(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in params.items():
        flat += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return flat
