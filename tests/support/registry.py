"""A registry with one version in it, made once a run; each test file works on a copy of its database."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.tracking import TrackingConfig, connect, experiment_id
from pipeline.registry.pushing import push
from training.export import save_export
from training.models import DyNetConfig, build_model

IRD = str(Path(sys.executable).with_name("ird"))


def in_process(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``cwd`` without this process's variables for MLflow, but with ``variables``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def pushed(once_per_run: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A folder with an export of a tiny DyNet, and a database in which it is ``models:/tiny/1``, alias ``demo``."""

    def make(folder: Path) -> None:
        config = DyNetConfig(dim=8, refinement_blocks=1, variants={"small": (1, 1, 1, 1), "large": (1, 2, 2, 2)})
        torch.manual_seed(0)
        settings = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test")
        client = connect(settings)
        run = client.create_run(experiment_id(client, settings), run_name="finetune")
        client.set_terminated(run.info.run_id, "KILLED")
        origin = {"stage": "finetune", "dataset_id": "d1", "code": "c1", "run_id": run.info.run_id}
        save_export(build_model(config), config, folder / "export", origin)
        search_path = list(sys.path)
        figures = {"psnr.noise_25.small": "25.5", "psnr.noise_25.large": "26", "ssim.noise_25.large": "0.8"}
        assert push(folder / "export", "tiny", alias="demo", tags=figures, settings=settings) == 1
        assert sys.path == search_path
        (folder / "run.json").write_text(json.dumps(run.info.run_id))

    return once_per_run("registry", make)


@pytest.fixture(scope="session")
def export(pushed: Path) -> Path:
    return pushed / "export"


@pytest.fixture(scope="session")
def run_id(pushed: Path) -> str:
    return str(json.loads((pushed / "run.json").read_text()))


@pytest.fixture(scope="module")
def settings(pushed: Path, tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """A registry of the test file's own."""
    database = tmp_path_factory.mktemp("registry") / "mlflow.db"
    shutil.copyfile(pushed / "mlflow.db", database)
    return TrackingConfig(uri=f"sqlite:///{database}", experiment="test")


@pytest.fixture
def command(settings: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """``command("registry", "list")``: exit code of ``ird registry list`` here, and what it printed, in one line."""
    from typer.testing import CliRunner

    from infra.errors import Refusal
    from pipeline.cli import app

    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.uri)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: Any) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, Refusal):
            return 2, str(result.exception)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run
