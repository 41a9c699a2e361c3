"""Runs in MLflow, recorded so that tracking never hurts: what is logged goes to a file, another process sends it.

```
client.py     where runs are recorded; a client of MLflow with short timeouts
spool.py      the append-only file of a run's events, and how far it has been delivered
tracker.py    what a run calls: params, tags, metrics, artifacts, the end; each call appends a line
courier.py    sends one spool to its run, any number of times, with the same result
monitor.py    the process beside a run: couriers its spool, and marks the run FAILED if it dies
host.py       CPU, memory, disk, network and GPUs of a host, in a spool of its own
```

No program outside this package needs more than what is named here.
"""

from infra.tracking.client import TrackingConfig, connect, experiment_id, tracking_uri
from infra.tracking.host import HostMetrics
from infra.tracking.tracker import Tracker

__all__ = ["HostMetrics", "Tracker", "TrackingConfig", "connect", "experiment_id", "tracking_uri"]
