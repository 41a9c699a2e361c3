"""Pulling: checked, resumed, offline; and what is refused."""

import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from infra.launcher import end_session, free_port
from infra.tracking import TrackingConfig, connect
from pipeline.inference import export_sha256, load_model, restore_array
from pipeline.pictures import read_picture
from pipeline.registry.packaging import EXPORT, FILES
from pipeline.registry.promotion import set_alias
from pipeline.registry.pulling import pull
from pipeline.registry.pushing import push
from pipeline.registry.server import RegistryAwayError, RegistryError
from pipeline.restore import default_cache
from pipeline.samples import to_integers
from tests.support.registry import IRD, in_process
from training.export import WEIGHTS

# Ends itself the hard way when the third file has come.
KILLED_PULL = """
import os, sys
from pathlib import Path
from infra.tracking import TrackingConfig
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from pipeline.registry.pulling import pull
fetch, fetched = ModelsArtifactRepository.download_artifacts, []
def counting(self, path, dst_path=None):
    if len(fetched) == 3:
        os.kill(os.getpid(), 9)
    fetched.append(path)
    return fetch(self, path, dst_path)
ModelsArtifactRepository.download_artifacts = counting
pull("models:/tiny@demo", Path("out"), TrackingConfig())
"""


def test_pull_is_checked_and_done_once(settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    folder = pull("models:/tiny@demo", tmp_path, settings)
    assert folder == tmp_path / "tiny-v1"
    assert export_sha256(folder / EXPORT) == export_sha256(export)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert pull("models:/tiny@demo", tmp_path, settings) == folder
    assert pull("models:/tiny/1", tmp_path, settings) == folder
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["tiny-v1"]

    for damaged in (EXPORT / WEIGHTS, Path("code/pipeline/inference.py")):
        with open(folder / damaged, "r+b") as file:  # a disk that lies is noticed, and the copy replaced
            file.seek(100)
            file.write(b"\0\1\2\3")
        assert pull("models:/tiny@demo", tmp_path, settings) == folder
        assert stamps.keys() == set(folder.rglob("*"))
        assert b"\0\1\2\3" not in (folder / damaged).read_bytes()[90:110]


def test_a_pull_that_was_killed_goes_on(settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    killed = in_process([sys.executable, "-c", KILLED_PULL], tmp_path, MLFLOW_TRACKING_URI=settings.uri)
    assert killed.returncode == -9, killed.stderr
    (part,) = (tmp_path / "out").glob(".part-*")
    came = {path: path.stat().st_mtime_ns for path in part.rglob("*") if path.is_file()}
    assert len(came) == 3 and part / FILES in came
    cut = next(path for path in came if path.name != FILES)
    cut.write_bytes(cut.read_bytes()[:-1])  # as a kill within a file leaves it
    folder = pull("models:/tiny@demo", tmp_path / "out", settings)
    kept = [path for path in came if path != cut]
    assert [(folder / path.relative_to(part)).stat().st_mtime_ns for path in kept] == [came[path] for path in kept]
    assert export_sha256(folder / EXPORT) == export_sha256(export)
    assert not list((tmp_path / "out").glob(".part-*"))


def test_damage_in_the_registry_is_refused(settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    push(export, "damaged", settings=settings)
    client = connect(settings)
    model_id = client.get_model_version("damaged", "1").source.removeprefix("models:/")
    source = client.get_logged_model(model_id).artifact_location
    with open(Path(source.removeprefix("file://")) / EXPORT / WEIGHTS, "ab") as weights:
        weights.write(b"more")
    with pytest.raises(RegistryError, match=r"safetensors is not what was pushed \(sha256\)"):
        pull("models:/damaged/1", tmp_path, settings)
    assert not (tmp_path / "damaged-v1").exists()


@pytest.fixture
def server(settings: TrackingConfig, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server over the registry, and its process."""
    port = free_port()
    arguments = ["--backend-store-uri", settings.uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(tmp_path / "server.log", "wb") as log:
        command = [sys.executable, "-m", "mlflow", "server", *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while not healthy(port):
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
            yield f"http://someone:secret@127.0.0.1:{port}", process
        finally:
            end_session(process.pid, patience=2)
            process.wait(30)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def test_with_the_server_away_a_restore_uses_what_was_pulled_and_says_so(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Image.fromarray(data.astronaut()[:40, 200:248]).save(tmp_path / "in.png")
    settings = TrackingConfig()
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MLFLOW_TRACKING_URI": uri}
    # The folder that `ird restore` keeps models of this server in.
    cache = tmp_path / "cache" / "ird" / "models" / default_cache(settings).name
    pulled = pull("models:/tiny@demo", cache, settings)
    end_session(process.pid, patience=2)
    process.wait(30)
    command = [IRD, "restore", "--model", "models:/tiny@demo", "in.png", "away.png"]
    away = in_process(command, tmp_path, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", **variables)
    said = " ".join((away.stdout + away.stderr).split())
    assert away.returncode == 0, said
    assert "does not answer" in said and f"Using the copy in {pulled}" in said
    assert "secret" not in said
    expected = restore_array(load_model(pulled / EXPORT, "cpu"), read_picture(tmp_path / "in.png").pixels)
    assert (np.asarray(Image.open(tmp_path / "away.png")) == to_integers(expected)).all()


def test_an_alias_is_asked_for_each_time_and_a_version_only_once(
    settings: TrackingConfig, export: Path, tmp_path: Path
) -> None:
    second = push(export, "tiny", settings=settings)
    set_alias("tiny", second, "next", settings)
    assert pull("models:/tiny@next", tmp_path, settings).name == "tiny-v2"
    set_alias("tiny", 1, "next", settings)
    assert pull("models:/tiny@next", tmp_path, settings).name == "tiny-v1"
    database = Path(settings.uri.removeprefix("sqlite:///"))
    shutil.move(database, tmp_path / "away.db")
    try:
        said: list[str] = []
        assert pull("models:/tiny/2", tmp_path, settings, notify=said.append).name == "tiny-v2"
        assert not said
        assert pull("models:/tiny@next", tmp_path, settings, notify=said.append).name == "tiny-v1"
        assert len(said) == 1 and "no such file" in said[0]
        with pytest.raises(RegistryAwayError):
            pull("models:/tiny@demo", tmp_path, settings)  # never pulled by that alias
        assert not database.exists()  # asking makes no empty database
    finally:
        shutil.move(tmp_path / "away.db", database)


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
    settings: TrackingConfig, tmp_path: Path, uri: str, complaint: str
) -> None:
    with pytest.raises(RegistryError, match=complaint):
        pull(uri, tmp_path, settings)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_said_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{free_port()}")
    away = TrackingConfig()
    with pytest.raises(RegistryError, match=r"does not answer.*MLFLOW_TRACKING_URI") as caught:
        pull("models:/tiny@demo", tmp_path, away)
    assert "secret" not in str(caught.value)
