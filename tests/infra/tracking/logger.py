"""A program that logs like a training loop: ``FOLDER STEPS PAUSE``, with the server in MLFLOW_TRACKING_URI.

It keeps a checkpoint every seven steps, and goes on from the last one when it is started again.
"""

import os
import sys
import time
from pathlib import Path

from infra.files import write_atomically
from infra.tracking import Tracker, TrackingConfig

folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
tracker = Tracker(TrackingConfig(experiment=folder.name), "logger", folder)
tracker.log_params({"steps": steps, "optimizer": {"lr": 1e-4}})
checkpoint = folder / "checkpoint.txt"
first = int(checkpoint.read_text()) if checkpoint.exists() else 0
tracker.set_tags({"pid": os.getpid()})
(folder / "started").write_text(str(os.getpid()))
for step in range(first + 1, steps + 1):
    time.sleep(pause)
    tracker.log_metrics({"loss": 1 / step, "lr": 1e-4 * step}, step)
    tracker.flush()
    if step % 7 == 0:
        write_atomically(checkpoint, str(step).encode())
print("delivered" if tracker.finish() else "not delivered", tracker.run_id)
