"""A curation as a run of MLflow: one for a dataset, over all its restarts.

All talk with the server goes on in a thread of its own, so that a server which is slow or away stops nothing, and
changes neither result nor exit code.
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datagen.config import DatagenConfig
from datagen.dataset import SUMMARY, code_version, read_dataset_json, read_json, write_json
from datagen.progress import Standing, followed
from datagen.report import REPORT
from infra.storage import Store
from infra.tracking import Tracker, TrackingConfig

# The run's id, and when it was first started: steps of its metrics are seconds since then.
RUN = "curation/mlflow.json"

_NOTE = "mlflow.json"  # Where infra.tracking.Tracker looks for it in its folder.
_BETWEEN = 5.0  # seconds from one set of live metrics to the next
_PATIENCE = 60.0  # seconds that the end of a run waits for the server


@contextlib.contextmanager
def watched(config: DatagenConfig, store: Store) -> Iterator[None]:
    """Within it the progress of every step goes to MLflow, if ``config.tracking`` says where.

    As it ends, the run has the counts of the last selection, and the state FINISHED, FAILED or, when it was
    interrupted, KILLED. In any case no progress bar is left behind.
    """
    if not config.tracking:
        with followed():
            yield
        return
    with _running(config.tracking, store) as run, followed(run.follow):
        run.tell(lambda tracker: tracker.log_params(_params(config)))
        run.tell(lambda tracker: tracker.set_tags({"stage": "datagen", "code_version": code_version()}))
        yield
        run.tell(lambda tracker: tracker.log_metrics(_counts(read_json(store, SUMMARY)), run.step()))


def record_result(config: DatagenConfig, store: Store) -> None:
    """Put a finished dataset on the record of its run: size, id, verification and report."""
    if not config.tracking:
        return
    with _running(config.tracking, store) as run:
        run.tell(lambda tracker: _log_result(tracker, store, run))


def _log_result(tracker: Tracker, store: Store, run: "_Run") -> None:
    summary, dataset = read_json(store, SUMMARY), read_dataset_json(store)
    sizes = {f"dataset.{name}": float(dataset["totals"][name]) for name in ("bytes", "samples", "shards")}
    faults = {"verify.faults": float(summary["verify"]["faults"])} if "verify" in summary else {}
    tracker.log_metrics({**_counts(summary), **sizes, **faults}, run.step())
    tracker.set_tags({"dataset_id": dataset["id"]})
    report = run.folder / REPORT
    report.write_bytes(store.read(REPORT))
    tracker.log_artifact(report)


class _Run:
    """What is to be told to the server, and the thread that tells it."""

    def __init__(self, settings: TrackingConfig, store: Store, folder: Path) -> None:
        self.folder = folder
        self._settings, self._store = settings, store
        self._calls: list[Callable[[Tracker], None]] = []
        self._standings: dict[str, Standing] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._status = "FINISHED"
        self._started = time.time()
        # A daemon: a server that never answers must not keep the process.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def follow(self, standing: Standing) -> None:
        """Take note of how far a step is; the latest is told every few seconds."""
        with self._lock:
            self._standings[standing.step] = standing

    def tell(self, call: Callable[[Tracker], None]) -> None:
        """Do this, in the run's own thread, as soon as the server has time."""
        with self._lock:
            self._calls.append(call)

    def step(self) -> int:
        """Of a metric that is logged now: seconds since the dataset's first run began."""
        return int(time.time() - self._started)

    def end(self, status: str) -> None:
        """Tell what is left; gives up on a server that does not answer."""
        self._status = status
        self._ended.set()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            print("tracking: the server does not answer, so the record of this run is not complete", file=sys.stderr)

    def _work(self) -> None:
        try:
            tracker = self._open()
            while True:
                last = self._ended.wait(_BETWEEN)
                self._send(tracker)
                if last:
                    break
            tracker.finish(self._status)
        except Exception as error:  # Whatever it is, a curation does not stop for its record.
            print(f"tracking: {type(error).__name__}: {error} (the curation goes on)", file=sys.stderr)

    def _open(self) -> Tracker:
        known = read_json(self._store, RUN)
        if known:
            (self.folder / _NOTE).write_text(json.dumps({"run_id": known["run_id"]}))
            self._started = known["started"]
        tracker = Tracker(self._settings, Path(self._store.uri).name or "dataset", self.folder)
        if tracker.run_id and tracker.run_id != known.get("run_id"):
            write_json(self._store, RUN, {"run_id": tracker.run_id, "started": self._started})
        return tracker

    def _send(self, tracker: Tracker) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
            standings, self._standings = self._standings, {}
        for standing in standings.values():
            tracker.log_metrics(_live(standing), self.step())
        for call in calls:
            call(tracker)
        tracker.flush()


@contextlib.contextmanager
def _running(settings: TrackingConfig, store: Store) -> Iterator[_Run]:
    with tempfile.TemporaryDirectory(prefix="ird-mlflow-", ignore_cleanup_errors=True) as folder:
        run = _Run(settings, store, Path(folder))
        try:
            yield run
        except BaseException as error:
            run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        run.end("FINISHED")


def _live(standing: Standing) -> dict[str, float]:
    step = standing.step
    figures = {f"{step}.done": float(standing.done), f"{step}.{standing.unit}_per_second": standing.rate}
    return figures | {f"{step}.{name}": value for name, value in standing.figures.items()}


def _params(config: DatagenConfig) -> dict[str, Any]:
    """The configuration, without where it is recorded: that address may hold a password."""
    return config.model_dump(mode="json", exclude={"tracking"})


def _counts(summary: dict[str, Any]) -> dict[str, float]:
    """The funnel of the last selection."""
    select = summary.get("select", {})
    if not select:
        return {}
    counts = {"pictures": float(select["inputs"]), "kept": float(select["kept"])}
    for verdict in ("rejected", "failed"):
        counts |= {f"{verdict}.{reason}": float(number) for reason, number in select[verdict].items()}
    return counts
