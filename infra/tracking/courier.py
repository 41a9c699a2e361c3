"""Sends one spool to its run, any number of times, with the same result.

Nothing has to be known of earlier tries, because each delivery changes nothing the second time:

- The primary key of a point in MLflow's database is (run, name, time, step, value). All of it stands in the spool, so a
  point that is sent again is the row that is there. That holds even for a request that a frozen server only answers
  long after its client gave up and sent it again, which no question asked beforehand could rule out.
- Parameters that the run has are left out, tags and the end are set again, artifacts replaced by themselves.
- A run is made with a key of ours as a tag, and searched for by that key before it is made.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from infra.files import write_atomically
from infra.tracking.client import connect_to, experiment_id_at, masked
from infra.tracking.spool import MAIN, Event, Sessions, Spool

MAX_METRICS, MAX_NAMES = 1000, 100  # MLflow refuses more in one call
KEY_TAG, DUPLICATE_TAG = "ird.run_key", "ird.duplicate_of"

_SMALLEST_BATCH = 16
_TIMEOUTS = (5, 30)  # seconds: of a request at first, and after many that were not answered in time
_BACKOFF = (0.5, 30.0)  # seconds
# MLflow says BAD_REQUEST of content that its database will never take, and proxies say it of many things.
_TRIES_OF_BAD_REQUEST = 5


class Gone(Exception):
    """The run is not on the server, or was deleted there."""


class NoRunYet(Exception):
    """The run whose hosts these metrics are of has not been made so far."""


class Courier:
    """Delivers the events of one spool, in order, a batch at a time."""

    def __init__(self, spool: Spool, uri: str) -> None:
        self.spool = spool
        self.delivery = spool.delivery()
        self._uri = uri
        self._sessions = Sessions(spool)
        self._client: Any = None
        self.failed = 0  # tries in a row
        self._batch = MAX_METRICS
        self._timeout = _TIMEOUTS[0]
        self._known_params: set[str] = set()
        self._checked = False  # whether the run was seen on the server by this courier
        self._parent = ""  # reference of the parent, until the run is linked to it
        self._artifact_failures = 0
        self._next_artifact = 0.0  # time.monotonic

    @property
    def is_done(self) -> bool:
        """Whether every whole line has been delivered."""
        return not self.delivery.artifacts and next(self.spool.read(self.delivery.offset), None) is None

    def deliver(self) -> bool:
        """Send one batch, and upload one artifact. False when there was nothing to do, or it failed: see ``failed``."""
        try:
            worked = self._deliver_events()
        except Gone as gone:
            # The spool holds all there ever was, so a run that was lost can be made again.
            self._checked = False
            self._fail(f"{gone}; it is made again from {self.spool.path}", run_id="", offset=0)
            return False
        except Exception as error:  # whatever a server, a proxy or a database comes up with
            self._batch = max(self._batch // 2, _SMALLEST_BATCH)
            self._timeout = min(self._timeout * 2, _TIMEOUTS[1])
            self._fail(f"{type(error).__name__}: {str(error)[:300]}")
            return False
        self.failed = 0
        if worked:
            self._batch = min(self._batch * 2, MAX_METRICS)
            self._timeout = _TIMEOUTS[0]
        return self._deliver_artifact() or worked

    def _fail(self, error: str, **changes: Any) -> None:
        self.failed += 1
        self._note(error, failures=self.delivery.failures + 1, **changes)

    def _deliver_events(self) -> bool:
        events = list(islice(self.spool.read(self.delivery.offset), self._batch))
        if not events:
            return False
        self.spool.sync()  # what the server has must not be lost here
        run_id = self._run()
        taken = list(_as_one_request(events, self._batch))
        last = taken[-1]
        if last.kind == "start":
            self._begin(run_id)
        elif last.kind == "end":
            self._end(run_id, last)
        elif last.kind == "artifact":
            self.delivery.artifacts.append(last.body)
        elif last.kind in {"params", "tags", "metrics"}:
            self._send(run_id, taken)
        if last.kind != "start":
            self._link_parent(run_id)
        self._note("", offset=last.end)
        return True

    def _run(self) -> str:
        """The id of the run; it is looked for or made if this courier has not seen it yet."""
        if self.spool.name != MAIN:
            return self._run_of_host()
        self.delivery.session = self._sessions.look().latest
        self._connect()
        if self._checked:
            return self.delivery.run_id
        start = next(event for event in self.spool.read() if event.kind == "start")
        if not self.delivery.run_id:
            noted = _read_note(self.spool)
            self.delivery.run_id = noted if noted and self._exists(noted) else ""
        elif not self._exists(self.delivery.run_id):
            raise Gone(f"run {self.delivery.run_id} is not on this server")
        if not self.delivery.run_id:
            key = start.body["key"]
            experiment = experiment_id_at(self._client, start.body["experiment"], self._uri)
            self.delivery.run_id = self._find(experiment, key) or self._make(experiment, key, start)
        self._parent = start.body["parent"]
        self._link_parent(self.delivery.run_id)
        self._known_params = set(self._client.get_run(self.delivery.run_id).data.params)
        note = {"run_id": self.delivery.run_id, "run_key": start.body["key"]}  # no URI: it may hold a password
        write_atomically(self.spool.folder.parent / "mlflow.json", json.dumps(note).encode())
        self._checked = True
        self._note("")
        return self.delivery.run_id

    def _make(self, experiment: str, key: str, start: Event) -> str:
        tags = {KEY_TAG: key, "mlflow.source.name": "ird", "mlflow.user": _user()}
        return str(self._client.create_run(experiment, start.at, tags, start.body["name"]).info.run_id)

    def _run_of_host(self) -> str:
        run_id = _read_note(self.spool)
        if not run_id:
            raise NoRunYet(f"{self.spool.folder.parent / 'mlflow.json'} is not there yet: rank 0 makes the run")
        if not self.delivery.run_id:
            self.delivery.run_id = run_id
        elif run_id != self.delivery.run_id:
            raise Gone(f"run {self.delivery.run_id} was replaced")
        self._connect()
        return run_id

    def _begin(self, run_id: str) -> None:
        if self.spool.name != MAIN:
            return
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, "ird.exit", "running")
        self._client.set_tag(run_id, "ird.starts", str(sum(event.kind == "start" for event in self.spool.read())))

    def _end(self, run_id: str, end: Event) -> None:
        if self.spool.name != MAIN or end.body["session"] != self._sessions.look().latest:
            return  # that session was found dead after the next one had begun
        hours, gpu_hours = spent(self.spool)
        self._client.set_tag(run_id, "ird.exit", end.body["exit"])
        self._client.set_tag(run_id, "ird.hours", f"{hours:.4f}")
        self._client.set_tag(run_id, "ird.gpu_hours", f"{gpu_hours:.4f}")
        self._client.set_terminated(run_id, end.body["status"], end.at)
        self._remove_duplicates(run_id)

    def _send(self, run_id: str, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Any] = []
        params: dict[str, Any] = {}
        tags: dict[str, Any] = {}
        for event in events:
            if event.kind == "metrics":
                metrics += [
                    Metric(name, float("nan") if value is None else value, event.at, event.step)
                    for name, value in event.body.items()
                ]
            elif event.kind == "params":
                params |= {name: Param(name, text) for name, text in event.body.items() if name not in params}
            else:
                tags |= {name: RunTag(name, text) for name, text in event.body.items()}
        new = [param for name, param in params.items() if name not in self._known_params]
        for some_params, some_tags in _in_step(new, list(tags.values())):
            self._log(run_id, [], some_params, some_tags)
        for first in range(0, len(metrics), self._batch):
            self._log(run_id, metrics[first : first + self._batch], [], [])
        self._known_params |= set(params)

    def _log(self, run_id: str, metrics: list[Any], params: list[Any], tags: list[Any]) -> None:
        """One request; of a batch that the server will never take, each entity alone, and the refused set aside."""
        try:
            self._client.log_batch(run_id, metrics, params, tags)
        except Exception as error:
            if not self._is_refusal(error):
                raise
            if not self._exists(run_id):
                raise Gone(f"run {run_id} is not on this server any more") from None
            entities = [*metrics, *params, *tags]
            if len(entities) == 1:
                self._set_aside(dict(entities[0]), error)
                return
            for metric in metrics:
                self._log(run_id, [metric], [], [])
            for param in params:
                self._log(run_id, [], [param], [])
            for tag in tags:
                self._log(run_id, [], [], [tag])

    def _deliver_artifact(self) -> bool:
        """Upload one. A store that is away holds up artifacts, not points."""
        if not self.delivery.artifacts or not self._checked or time.monotonic() < self._next_artifact:
            return False
        reference, *others = self.delivery.artifacts
        path = Path(reference["path"])
        try:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(_TIMEOUTS[1])
            upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            upload(self.delivery.run_id, str(path), reference["folder"] or None)
        except Exception as error:
            if path.exists():
                self._artifact_failures += 1
                self._next_artifact = time.monotonic() + backoff(self._artifact_failures)
                self._fail(f"{path}: {type(error).__name__}: {str(error)[:300]}", artifacts=[*others, reference])
                return False
            self._set_aside(reference, error)
        self._note("", artifacts=others)
        return True

    def _set_aside(self, what: dict[str, Any], error: Exception) -> None:
        with open(self.spool.refused, "a") as refused:
            refused.write(masked(json.dumps({"refused": what, "why": str(error)[:300]}, default=str)) + "\n")

    def _link_parent(self, run_id: str) -> None:
        """Name the parent. One whose run is not made yet is looked for again with the next events."""
        if not self._parent:
            return
        parent = self._parent
        if parent.startswith("ird-"):
            parent = self._find(self._client.get_run(run_id).info.experiment_id, parent)
        if parent:
            self._client.set_tag(run_id, "mlflow.parentRunId", parent)
            self._parent = ""

    def _find(self, experiment: str, key: str) -> str:
        """The run of a key, or "". Of two, which a request answered too late can leave, everyone takes the first."""
        runs = self._client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'")
        runs = sorted(runs, key=lambda run: (DUPLICATE_TAG in run.data.tags, run.info.start_time, run.info.run_id))
        return str(runs[0].info.run_id) if runs else ""

    def _remove_duplicates(self, run_id: str) -> None:
        """Of two requests to make the run, a frozen server may have answered the first after all."""
        run = self._client.get_run(run_id)
        key = run.data.tags[KEY_TAG]
        for other in self._client.search_runs([run.info.experiment_id], f"tags.`{KEY_TAG}` = '{key}'"):
            if other.info.run_id != run_id and not other.data.metrics and not other.data.params:
                self._client.set_tag(other.info.run_id, DUPLICATE_TAG, run_id)
                self._client.delete_run(other.info.run_id)

    def _exists(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _is_refusal(self, error: Exception) -> bool:
        code = getattr(error, "error_code", "")
        bad_for_long = code == "BAD_REQUEST" and self.failed >= _TRIES_OF_BAD_REQUEST
        return bad_for_long or code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}

    def _connect(self) -> None:
        # MLflow reads both at each request. Tries are counted here.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(self._timeout)
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "2")
        if self._client is None:
            self._client = connect_to(self._uri)

    def _note(self, error: str, **changes: Any) -> None:
        for name, value in {**changes, "error": masked(error)}.items():
            setattr(self.delivery, name, value)
        self.spool.note(self.delivery)


def backoff(failures: int) -> float:
    """Seconds until the next try, by the number of tries that failed in a row: doubled each time, with jitter."""
    return float(min(_BACKOFF[0] * 2 ** min(failures, 10), _BACKOFF[1]) * random.uniform(0.5, 1.0))


def spent(spool: Spool) -> tuple[float, float]:
    """Hours of all sessions, and the same times their devices; a killed one lasted until its last event."""
    hours = gpu_hours = 0.0
    began, last, gpus = 0, 0, 0
    for event in spool.read():
        if event.kind == "start":
            hours, gpu_hours = hours + (last - began) / 3.6e6, gpu_hours + gpus * (last - began) / 3.6e6
            began, gpus = event.at, event.body["gpus"]
        last = event.at
    return hours + (last - began) / 3.6e6, gpu_hours + gpus * (last - began) / 3.6e6


def _as_one_request(events: list[Event], limit: int) -> Iterator[Event]:
    """As many events from the front as fit into one request; what is no param, tag or metric goes alone."""
    counts = {"metrics": 0, "params": 0, "tags": 0}
    for number, event in enumerate(events):
        if event.kind not in counts:
            if number == 0:
                yield event
            return
        counts[event.kind] += len(event.body)
        full = counts["metrics"] > limit or max(counts["params"], counts["tags"]) > MAX_NAMES
        if number and full:
            return
        yield event


def _in_step(params: list[Any], tags: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    for first in range(0, max(len(params), len(tags)), MAX_NAMES):
        yield params[first : first + MAX_NAMES], tags[first : first + MAX_NAMES]


def _read_note(spool: Spool) -> str:
    try:
        return str(json.loads((spool.folder.parent / "mlflow.json").read_text())["run_id"])
    except (OSError, ValueError, KeyError):
        return ""


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"
