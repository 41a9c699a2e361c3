"""The registry on a real SQLite store: push, alias, pull in a fresh process, restore; and MLflow's own loader."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from infra.launcher import free_port
from infra.tracking import TrackingConfig, connect, experiment_id
from pipeline.inference import export_sha256
from pipeline.registry import EXPORT, RegistryError, list_versions, pull, push, set_alias
from training.export import WEIGHTS, ExportError, save_export
from training.models import DyNetConfig, MZSRConfig, build_model

PICTURE = data.astronaut()[:40, 200:248]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def settings(root: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", experiment="test")


@pytest.fixture(scope="module")
def export(root: Path) -> Path:
    config = DyNetConfig(dim=8, refinement_blocks=1, variants={"small": (1, 1, 1, 1), "large": (1, 2, 2, 2)})
    torch.manual_seed(0)
    save_export(build_model(config), config, root / "export", {"stage": "finetune", "dataset_id": "d1", "code": "c1"})
    return root / "export"


@pytest.fixture(scope="module")
def run_id(settings: TrackingConfig) -> str:
    client = connect(settings)
    run = client.create_run(experiment_id(client, settings), run_name="finetune")
    client.set_terminated(run.info.run_id, "KILLED")
    return str(run.info.run_id)


@pytest.fixture(scope="module")
def version(settings: TrackingConfig, export: Path, run_id: str) -> int:
    search_path = list(sys.path)
    version = push(export, "tiny", run_id=run_id, alias="demo", tags={"psnr.denoise.small": 25.5}, settings=settings)
    assert sys.path == search_path
    return version


def in_fresh_process(code: str, cwd: Path, **variables: str) -> Any:
    """Run ``code`` in a new interpreter in ``cwd`` and return the JSON of its last line."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RESTORE = """
import json, sys
from pathlib import Path
from pipeline.restore import restore_files
codes = [restore_files("models:/tiny@demo", Path("in.png"), Path(f"{v}.png"), variant=v) for v in ("small", "large")]
print(json.dumps(codes))
"""

PLAIN_MLFLOW = """
import json, sys
# What the editable install of ird adds to the import system; without it this interpreter does not know ird.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
assert not any(importlib.util.find_spec(name) for name in ("infra", "datagen", "training", "pipeline"))
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/tiny@demo")
from pathlib import Path
import pipeline.inference
picture = np.load("in.npy")[None]
for variant in ("small", "large"):
    np.save(f"plain-{variant}.npy", model.predict(picture, params={"variant": variant}))
np.save("plain-batch.npy", model.predict(np.repeat(picture, 2, axis=0)))
refusals = {}
for name, params in {"typo": {"varient": "small"}, "variant": {"variant": "huge"}, "tile": {"tile": -1}}.items():
    try:
        model.predict(picture, params=params)
    except mlflow.exceptions.MlflowException as error:
        refusals[name] = [error.error_code, error.message]
try:
    model.predict(picture / 255)
except mlflow.exceptions.MlflowException as error:
    refusals["floats"] = ["", str(error)]
from mlflow.pyfunc.scoring_server import invocations  # what `mlflow models serve` answers a POST with
request = json.dumps({"inputs": picture.tolist(), "params": {"variant": "small"}})
served = invocations(request, "application/json", model, model.metadata.get_input_schema())
np.save("served.npy", np.array(json.loads(served.response)["predictions"], np.uint8))
print(json.dumps({"code": pipeline.inference.__file__, "refusals": refusals}))
"""


def test_a_version_holds_all_variants_and_says_where_it_comes_from(
    version: int, settings: TrackingConfig, export: Path, run_id: str, root: Path
) -> None:
    (row,) = list_versions(settings, "tiny")
    assert (row.name, row.version, row.aliases, row.run_id) == ("tiny", version, ("demo",), run_id)
    assert row.tags == {
        "stage": "finetune",
        "dataset_id": "d1",
        "code": "c1",
        "run_id": run_id,
        "model": "dynet",
        "variants": "small,large",
        "sha256": export_sha256(export),
        "psnr.denoise.small": "25.5",
    }
    # Pushing does not change how the run ended, and nothing lands in the working directory.
    run = connect(settings).get_run(run_id)
    assert run.info.status == "KILLED"
    assert [output.model_id for output in run.outputs.model_outputs]
    assert list((root / "mlartifacts").rglob(WEIGHTS))


def test_pull_is_checked_and_done_once(version: int, settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    folder = pull("models:/tiny@demo", tmp_path, settings)
    assert folder == tmp_path / "tiny-v1"
    assert export_sha256(folder / EXPORT) == export_sha256(export)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pull("models:/tiny@demo", tmp_path, settings) == folder
    assert pull(f"models:/tiny/{version}", tmp_path, settings) == folder
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-v1"]
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    names = {line.partition("==")[0] for line in requirements}
    assert {"mlflow", "numpy", "pydantic", "safetensors", "torch"} <= names
    assert not {"deepspeed", "ray", "typer", "boto3"} & names
    assert not list(folder.rglob("*.pkl"))

    with open(folder / EXPORT / WEIGHTS, "r+b") as weights:  # a disk that lies is noticed, and the copy replaced
        weights.seek(100)
        weights.write(b"\0\1\2\3")
    assert pull("models:/tiny@demo", tmp_path, settings) == folder
    assert export_sha256(folder / EXPORT) == export_sha256(export)


def test_damage_in_the_registry_is_refused(
    settings: TrackingConfig, export: Path, version: int, tmp_path: Path
) -> None:
    push(export, "damaged", settings=settings)
    client = connect(settings)
    model_id = client.get_model_version("damaged", "1").source.removeprefix("models:/")
    source = client.get_logged_model(model_id).artifact_location
    with open(Path(source.removeprefix("file://")) / EXPORT / WEIGHTS, "ab") as weights:
        weights.write(b"more")
    with pytest.raises(RegistryError, match="sha256"):
        pull("models:/damaged/1", tmp_path, settings)
    assert list(tmp_path.iterdir()) == []


def test_restored_by_a_fresh_process_and_by_plain_mlflow_alike(
    version: int, settings: TrackingConfig, tmp_path: Path
) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "in.png")
    np.save(tmp_path / "in.npy", PICTURE)
    variables = {"MLFLOW_TRACKING_URI": settings.uri, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert in_fresh_process(RESTORE, tmp_path, **variables) == [0, 0]
    small, large = (np.asarray(Image.open(tmp_path / f"{variant}.png")) for variant in ("small", "large"))
    assert small.shape == large.shape == PICTURE.shape
    assert (small != large).any()

    told = in_fresh_process(PLAIN_MLFLOW, tmp_path, **variables)
    assert Path(told["code"]).parts[-3:] == ("code", "pipeline", "inference.py")
    assert (np.load(tmp_path / "plain-small.npy")[0] == small).all()
    assert (np.load(tmp_path / "plain-large.npy")[0] == large).all()
    assert (np.load(tmp_path / "plain-batch.npy") == large).all()  # the default is the last variant
    assert (np.load(tmp_path / "served.npy")[0] == small).all()
    refusals = told["refusals"]
    assert [refusals[name][0] for name in ("typo", "variant", "tile")] == ["INVALID_PARAMETER_VALUE"] * 3
    assert "varient" in refusals["typo"][1]
    assert "overlap, tile, variant" in refusals["typo"][1]
    assert "small" in refusals["variant"][1]
    assert "uint8" in refusals["floats"][1]


def test_aliases_move_and_a_version_is_found_offline_once_pulled(
    version: int, settings: TrackingConfig, export: Path, tmp_path: Path
) -> None:
    second = push(export, "tiny", settings=settings)
    assert second == version + 1
    set_alias("tiny", second, "next", settings)
    assert pull("models:/tiny@next", tmp_path, settings).name == f"tiny-v{second}"
    set_alias("tiny", version, "next", settings)
    assert pull("models:/tiny@next", tmp_path, settings).name == f"tiny-v{version}"
    assert [row.aliases for row in list_versions(settings, "tiny")] == [(), ("demo", "next")]

    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    note = tmp_path / f"tiny-v{version}" / "pulled.json"
    note.write_text(note.read_text().replace(settings.uri, away.uri))
    assert pull(f"models:/tiny/{version}", tmp_path, away).name == f"tiny-v{version}"


def test_mzsr_offers_its_own_params(version: int, settings: TrackingConfig, tmp_path: Path) -> None:
    config = MZSRConfig(layers=2, features=4)
    save_export(build_model(config), config, tmp_path / "export", {"scale": 3})
    push(tmp_path / "export", "zero-shot", settings=settings)
    description = (pull("models:/zero-shot/1", tmp_path, settings) / "MLmodel").read_text()
    for name in ("variant", "tile", "overlap", "scale", "kernel_variance"):
        assert f'"name": "{name}"' in description
    assert {row.name for row in list_versions(settings)} >= {"tiny", "zero-shot"}


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("models:/none@demo", "no model 'none' at sqlite:///.*models there: .*tiny"),
        ("models:/tiny@none", r"no alias 'none' .* its aliases: demo \(version 1\)"),
        ("models:/tiny/99", "no version 99 .* its versions: 1"),
        ("models:/tiny", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/../x@demo", "expected models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_named_beside_what_is(
    version: int, settings: TrackingConfig, tmp_path: Path, uri: str, complaint: str
) -> None:
    with pytest.raises(RegistryError, match=complaint):
        pull(uri, tmp_path, settings)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_clearly(version: int, settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no run abc"):
        push(export, "tiny", run_id="abc", settings=settings)
    with pytest.raises(ExportError, match="missing"):
        push(tmp_path, "tiny", settings=settings)
    with pytest.raises(RegistryError, match="no version 99"):
        set_alias("tiny", 99, "demo", settings)
    with pytest.raises(RegistryError, match="no model 'none'"):
        list_versions(settings, "none")


def test_a_server_that_is_away_is_said_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{free_port()}")
    with pytest.raises(RegistryError, match=r"does not answer.*MLFLOW_TRACKING_URI") as caught:
        pull("models:/tiny@demo", tmp_path, TrackingConfig())
    assert "secret" not in str(caught.value)
