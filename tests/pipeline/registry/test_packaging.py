"""A registered model in an environment that has its requirements and nothing else: loaded, served, bit for bit."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from infra.launcher import end_session, free_port
from infra.tracking import TrackingConfig
from pipeline.registry.pulling import pull
from pipeline.restore import restore_files
from tests.support.environment import make_environment
from tests.support.registry import in_process

PICTURE = data.astronaut()[:40, 200:248]

PLAIN_MLFLOW = """
import importlib.util, json
missing = [n for n in ("infra", "training", "pipeline", "deepspeed", "ray", "typer", "skimage", "boto3", "webdataset")
           if importlib.util.find_spec(n) is None]
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/tiny@demo")
import pipeline.inference
picture = np.load("in.npy")[None]
for variant in ("small", "large"):
    np.save(f"plain-{variant}.npy", model.predict(picture, params={"variant": variant}))
np.save("plain-batch.npy", model.predict(np.repeat(picture, 2, axis=0)))
refusals = {}
for name, params in {"typo": {"varient": "small"}, "variant": {"variant": "huge"}, "tile": {"tile": -2}}.items():
    try:
        model.predict(picture, params=params)
    except mlflow.exceptions.MlflowException as error:
        refusals[name] = [error.error_code, error.message]
try:
    model.predict(picture / 255)
except mlflow.exceptions.MlflowException as error:
    refusals["floats"] = ["", str(error)]
print(json.dumps({"missing": missing, "code": pipeline.inference.__file__, "refusals": refusals}))
"""


@pytest.fixture(scope="module")
def place(settings: TrackingConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, what ``ird restore`` makes of it, and the environment of the registered model."""
    place = tmp_path_factory.mktemp("fresh")
    requirements = (pull("models:/tiny@demo", place, settings) / "requirements.txt").read_text().split()
    make_environment(place / "environment", requirements)
    Image.fromarray(PICTURE).save(place / "in.png")
    np.save(place / "in.npy", PICTURE)
    for variant in ("small", "large"):
        out, cache = place / f"{variant}.png", place / "cache"
        code = restore_files(
            "models:/tiny@demo", place / "in.png", out, variant=variant, settings=settings, cache=cache, device="cpu"
        )
        assert code == 0
    return place


def restored(place: Path, variant: str) -> np.ndarray:
    return np.asarray(Image.open(place / f"{variant}.png"))


def test_plain_mlflow_restores_the_same_bits(place: Path, settings: TrackingConfig) -> None:
    python = str(place / "environment" / "bin" / "python")
    done = in_process([python, "-c", PLAIN_MLFLOW], place, MLFLOW_TRACKING_URI=settings.uri, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["missing"]) == 9  # the environment has none of ird, nor of what only ird needs
    assert Path(told["code"]).parts[-3:] == ("code", "pipeline", "inference.py")
    small, large = restored(place, "small"), restored(place, "large")
    assert small.shape == large.shape == PICTURE.shape
    assert (small != large).any()
    assert (np.load(place / "plain-small.npy")[0] == small).all()
    assert (np.load(place / "plain-large.npy")[0] == large).all()
    assert (np.load(place / "plain-batch.npy") == large).all()  # the default is the last variant
    refusals = told["refusals"]
    assert [refusals[name][0] for name in ("typo", "variant", "tile")] == ["INVALID_PARAMETER_VALUE"] * 3
    assert "varient" in refusals["typo"][1]
    assert "overlap, tile, variant" in refusals["typo"][1]
    assert "small" in refusals["variant"][1]
    assert "uint8" in refusals["floats"][1]


def test_mlflow_models_serve_answers_with_the_same_bits(place: Path, settings: TrackingConfig) -> None:
    with served(place, settings) as url:
        code, answer = post(url, {"inputs": PICTURE[None].tolist(), "params": {"variant": "small"}})
        assert code == 200
        assert (np.array(answer["predictions"], np.uint8)[0] == restored(place, "small")).all()
        code, answer = post(url, {"inputs": PICTURE[None].tolist(), "params": {"varient": "small"}})
        assert code == 400
        assert "varient" in json.dumps(answer)


@contextmanager
def served(place: Path, settings: TrackingConfig) -> Iterator[str]:
    """The address at which ``mlflow models serve`` of the fresh environment answers."""
    binaries, port = place / "environment" / "bin", free_port()
    command = [binaries / "mlflow", "models", "serve", "--env-manager", "local", "-m", "models:/tiny@demo"]
    variables = {"MLFLOW_TRACKING_URI": settings.uri, "PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(place)}
    with open(place / "serve.log", "wb") as log:
        server = subprocess.Popen(
            [*command, "-p", str(port), "-h", "127.0.0.1"],
            cwd=place,
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while not answers(f"http://127.0.0.1:{port}/ping"):
                assert time.monotonic() < deadline and server.poll() is None, (place / "serve.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            end_session(server.pid, patience=2)
            server.wait(30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
