"""``ird demo`` as a person runs it: interrupted, run again, its page opened, its model pulled."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.demo import load_demo_config, run_demo
from pipeline.pictures import read_picture
from tests.end_to_end.readme import readme_command
from tests.support.browser import open_page
from tests.support.dataset import REPOSITORY
from tests.support.processes import ended_within

IRD = str(Path(sys.executable).with_name("ird"))
# The same chain, smaller: how good what it makes is, the demo judges itself; what it does, this test.
DYNET = "model.dim=8, data.patch=16, data.batch=4"
SHORT = [
    f"pretrain.overrides=[{DYNET}, steps=12, log_every=2, checkpoint_every=2]",
    f"finetune.overrides=[{DYNET}, steps=4, log_every=2]",
    "edsr.overrides=[steps=4, log_every=2, data.patch=24, data.batch=8]",
    "mzsr_large_scale.overrides=[steps=4, log_every=2, data.patch=32]",
    "mzsr_meta.overrides=[steps=2, log_every=1]",
    "evaluate.overrides=[crop=64]",
]
STAGES = [
    "corpus",
    "dataset",
    "pretrain",
    "finetune",
    "edsr",
    "mzsr_large_scale",
    "mzsr_meta",
    "evaluate",
    "register",
    "restore",
    "report",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo, which was interrupted once in the middle of pre-training."""
    place = tmp_path_factory.mktemp("demo")
    command = [IRD, "demo", "--out", str(place / "run"), *SHORT]
    with open(place / "first.log", "wb") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(place), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while not (place / "run/pretrain/out/checkpoints/latest").exists():
                assert process.poll() is None and time.monotonic() < deadline, (place / "first.log").read_text()
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGINT)
            code = ended_within(90, process)
        assert code == 130
    assert "Run the same command again" in (place / "first.log").read_text()
    again = run(command, place)
    (place / "second.log").write_text(again)
    return place


def environment(place: Path) -> dict[str, str]:
    uri = f"sqlite:///{place}/mlflow.db"
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": uri, "XDG_CACHE_HOME": str(place / "cache")}


def run(command: list[str], place: Path) -> str:
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment(place), capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_second_run_goes_on_where_the_first_was_interrupted(workplace: Path) -> None:
    second = (workplace / "second.log").read_text()
    assert "Curation and sharding on Ray: scan, select, pack, verify: done before" in second
    assert "pretrain: resuming at step" in second
    for stage in STAGES:
        record = json.loads((workplace / "run" / stage / "stage.json").read_text())
        assert record["done"] and record["seconds"] >= 0
    assert "report.html" in second and "models:/ird-demo@demo" in second


@pytest.mark.slow
def test_a_third_run_does_nothing_again(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workplace}/mlflow.db")
    third: list[str] = []
    run_demo(load_demo_config(None, [f"out={workplace / 'run'}", *SHORT]), say=third.append)
    assert [line.endswith(": done before") for line in third] == [True] * len(STAGES)


@pytest.mark.slow
def test_the_curation_had_something_to_say(workplace: Path) -> None:
    log = (workplace / "run/dataset/log.txt").read_text()
    for reason in (
        "exact_duplicate",
        "near_duplicate",
        "too_small",
        "flat",
        "blurred",
        "damaged",
        "not_a_picture",
        "leak",
    ):
        assert reason in log, reason


@pytest.mark.slow
def test_every_stage_is_a_run_below_one_parent(workplace: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{workplace}/mlflow.db")
    parent = json.loads((workplace / "run/mlflow.json").read_text())["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    names = {child.info.run_name for child in children}
    assert names == {"pretrain", "finetune", "edsr", "mzsr_large_scale", "mzsr_meta", "evaluate", "dataset"}
    assert {child.info.status for child in children} == {"FINISHED"}
    dataset_id = json.loads((workplace / "run/dataset/out/dataset.json").read_text())["id"]
    for child in children:
        if child.info.run_name in {"pretrain", "finetune", "edsr", "mzsr_meta"}:
            assert child.data.tags["ird.dataset_id"] == dataset_id
            history = client.get_metric_history(child.info.run_id, "loss")
            steps = [point.step for point in history]
            assert steps == sorted(set(steps)) and steps


@pytest.mark.slow
def test_each_variant_of_the_pulled_model_restores_its_own_picture(workplace: Path) -> None:
    noisy = sorted((workplace / "run/restore/degraded").iterdir())
    assert noisy
    for path in noisy:
        pictures = [read_picture(workplace / "run/restore" / v / path.name).pixels for v in ("small", "large")]
        original = read_picture(path).pixels
        assert pictures[0].shape == pictures[1].shape == original.shape
        assert np.abs(pictures[0] - pictures[1]).max() > 0 and np.abs(pictures[0] - original).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "log"),
    [("deepspeed", "pretrain/out/log.txt"), ("ird restore", "restore/log.txt")],
    ids=["second", "third"],
)
def test_a_door_is_gone_through_as_the_readme_has_it(workplace: Path, door: str, log: str) -> None:
    """The stage ran what the README says, in processes of its own, with a few words more."""
    first = (workplace / "run" / log).read_text().splitlines()[0]
    program, *words = shlex.split(first.removeprefix("$ "))
    typed = iter([Path(program).name, *(word.removeprefix(f"{REPOSITORY}/") for word in words)])
    expected = [word for word in readme_command(door) if word not in ("IN", "OUT")]
    assert all(word in typed for word in expected), (expected, first)


@pytest.mark.slow
def test_the_page_opens_in_a_browser_with_all_it_promises(workplace: Path, chromium: str, tmp_path: Path) -> None:
    page = workplace / "run" / "report.html"
    dom, screenshot = open_page(chromium, page, tmp_path)
    for word in ("rain", "haze", "noise", "PSNR", "near_duplicate", "bicubic", "models:/ird-demo@demo", "MZSR"):
        assert word in dom, word
    assert 'data-broken-images="0"' in dom
    assert screenshot.stat().st_size > 50_000
    source = page.read_text()
    assert 'src="http' not in source and 'href="http' not in source and page.stat().st_size < 10 * 2**20
