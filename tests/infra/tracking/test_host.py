"""The metrics of a host in the run that works on it."""

import time
from pathlib import Path

from infra.tracking import HostMetrics, Tracker, TrackingConfig, connect
from infra.tracking.host import host_name
from infra.tracking.monitor import beats
from infra.tracking.spool import Spool
from tests.infra.tracking.conftest import points


def test_hosts_are_in_the_run_and_count_on_after_a_restart(tmp_path: Path) -> None:
    settings = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="hosts")
    connect(settings).search_experiments()
    folder, name = tmp_path / "run", f"system/{host_name()}/cpu_percent"
    spool = Spool(folder, f"system-{host_name()}")
    for start in range(2):
        host = HostMetrics(settings, folder, interval=0.2)  # begins before there is a run
        tracker = Tracker(settings, "run", folder)
        taken = spool.size()
        deadline = time.monotonic() + 120
        while spool.size() <= taken or len(points(settings.uri, tracker.run_id, name)) < 3 * (start + 1):
            assert time.monotonic() < deadline, spool.delivery()
            time.sleep(0.1)
        host.stop()
        tracker.finish()
        while beats(spool):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    history = points(settings.uri, tracker.run_id, name)
    assert [step for step, _ in history] == list(range(1, len(history) + 1))
    assert all(0 <= value <= 100 for _, value in history)
    run = connect(settings).get_run(tracker.run_id)
    assert run.data.metrics[f"system/{host_name()}/memory_gib"] > 0 and run.info.status == "FINISHED"


def test_nothing_is_recorded_without_tracking(tmp_path: Path) -> None:
    HostMetrics(TrackingConfig(enabled=False), tmp_path).stop()
    assert list(tmp_path.iterdir()) == []
