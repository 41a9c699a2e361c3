"""A real training whose tracking server is frozen and killed under it: nothing about the training changes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from infra.storage import open_store
from tests.infra.tracking.conftest import only_run, points, settle
from tests.support.dataset import REPOSITORY
from tests.support.mlflow_server import MlflowServer
from training.checkpoint import load_checkpoint

STEPS = 60


def command(dataset: Path, out: Path, *more: str) -> list[str]:
    config = str(REPOSITORY / "configs/training/pretrain_demo.yaml")
    small = ["model.dim=8", "data.patch=16", "data.batch=2", f"steps={STEPS}", "log_every=1", "checkpoint_every=1000"]
    settings = [*small, f"data.dataset={dataset}", f"out={out}", *more]
    return [sys.executable, "-m", "training.pretrain", "--config", config, *settings]


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(open_store(out / "checkpoints"))
    assert saved is not None
    return saved[0]["model"]


@pytest.mark.slow
@pytest.mark.timeout(1500)  # where nothing is compiled yet, DeepSpeed's op comes first
def test_training_ends_with_the_same_weights_and_all_its_points(
    mlflow_server: MlflowServer, small_dataset: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": mlflow_server.uri}
    untracked = command(small_dataset, tmp_path / "untracked", "tracking.enabled=false")
    subprocess.run(untracked, cwd=REPOSITORY, env=environment, check=True, capture_output=True, timeout=900)
    out = tmp_path / "tracked"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command(small_dataset, out, "tracking.experiment=training"),
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        mlflow_server.freeze()  # from the first step, over the end of the training
        assert process.wait(240) == 0, (tmp_path / "log").read_text()
        mlflow_server.thaw()
        mlflow_server.kill()
    finally:
        process.kill()
        mlflow_server.kill()
        mlflow_server.start()
    assert "ird track sync" in (tmp_path / "log").read_text()
    settle(out)

    plain, tracked = weights(tmp_path / "untracked"), weights(out)
    assert all(torch.equal(plain[name], tracked[name]) for name in plain)
    run = only_run(mlflow_server.uri, "training")
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert points(mlflow_server.uri, run.info.run_id, "loss") == [(line["step"], line["loss"]) for line in history]
    assert len(history) == STEPS and run.info.status == "FINISHED"
    assert json.loads((out / "finished.json").read_text())["run_id"] == run.info.run_id
