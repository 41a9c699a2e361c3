"""What a training step pays for tracking: the time of `log_metrics`, with a server that answers and one that does not.

    python benchmarks/tracking.py [--steps 5000] [--metrics 10]

Beside it, what MLflow's own client takes for the same call on SQLite.
"""

import argparse
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.tracking import Tracker, TrackingConfig, connect, experiment_id


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--metrics", type=int, default=10)
    given = parser.parse_args()
    values = {f"metric_{number}": 1.0 / (number + 3) for number in range(given.metrics)}
    with (
        tempfile.TemporaryDirectory(prefix="ird-bench-", ignore_cleanup_errors=True) as name,
        socket.socket() as silent,
    ):
        folder = Path(name)
        database = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
        tracker = Tracker(database, "bench", folder / "answers")
        _times("log_metrics, SQLite", given.steps, lambda step: tracker.log_metrics(values, step))
        _finish(tracker)

        silent.bind(("127.0.0.1", 0))
        silent.listen(16)  # connections are taken, and nobody ever answers: a frozen server
        frozen = TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = Tracker(frozen, "bench", folder / "frozen")
        _times("log_metrics, frozen server", given.steps, lambda step: tracker.log_metrics(values, step))
        _finish(tracker)

        from mlflow.entities import Metric

        client = connect(database)
        run_id = client.create_run(experiment_id(client, database)).info.run_id
        now = int(time.time() * 1000)
        _times(
            "MLflow's log_batch, SQLite",
            min(given.steps, 200),
            lambda step: client.log_batch(run_id, [Metric(key, value, now, step) for key, value in values.items()]),
        )


def _finish(tracker: Tracker) -> None:
    began = time.perf_counter()
    delivered = tracker.finish()
    print(f"finish: {time.perf_counter() - began:.1f} s, all delivered: {delivered}", flush=True)


def _times(what: str, steps: int, call: Callable[[int], None]) -> None:
    times, work = [], []
    for step in range(steps):
        began, worked = time.perf_counter(), time.thread_time()
        call(step)
        times.append(1000 * (time.perf_counter() - began))
        work.append(1000 * (time.thread_time() - worked))
        time.sleep(0.0005)  # a step; a loop without one would measure a queue that no training has
    for kind, some in (("", sorted(times)), (" (CPU)", sorted(work))):
        middle, late = some[len(some) // 2], some[int(len(some) * 0.99)]
        print(f"{what + kind:<34} median {middle:.3f} ms   99 % below {late:.3f} ms   longest {some[-1]:.3f} ms")


if __name__ == "__main__":
    main()
