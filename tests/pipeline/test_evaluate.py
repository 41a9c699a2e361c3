"""``ird evaluate`` on folders of real pictures, with real networks."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from skimage import data
from typer.testing import CliRunner

from datagen.dataset import read_samples
from datagen.degradations.resample import imresize
from datagen.picture.region import decode_whole
from datagen.source.embedded import corpus_files
from infra.config import ConfigError
from infra.storage import open_store
from infra.tracking import TrackingConfig
from pipeline.cli import app
from pipeline.evaluate import EvaluateOptions, Evaluation, evaluate_folder, to_json
from pipeline.evaluation_page import crops_of
from pipeline.evaluation_pictures import UNFINISHED, Restored, RestoredPictures
from training.benchmark import Benchmark, Condition, bicubic, picture_files, read_clean, to_batch, to_picture
from training.ensemble import self_ensemble
from training.export import load_export, save_export
from training.metrics import PROTOCOLS, compare
from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, MZSRConfig, build_model

CONFIGS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "edsr": (EDSRConfig(blocks=1, features=8), {"dataset_id": "0123456789abcdef"}),
    "mdsr": (MDSRConfig(blocks=1, features=8), {}),
    "mzsr": (MZSRConfig(layers=3, features=8), {"stage": "mzsr_meta", "scale": 2, "alignment": "aligned"}),
    "large_scale": (MZSRConfig(layers=3, features=8), {"stage": "mzsr_large_scale", "scale": 2}),
    "dynet": (DyNetConfig(dim=8, refinement_blocks=1, variants={"small": (1, 1, 1, 1), "large": (1, 2, 2, 2)}), {}),
}
QUIET = TrackingConfig(enabled=False)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name, (config, metadata) in CONFIGS.items():
        torch.manual_seed(0)
        save_export(build_model(config), config, folder / name, metadata)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixed sizes, a grey one, one with transparency, one of 16 bits."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = data.astronaut()[..., ::-1]
    cv2.imwrite(str(folder / "colour.png"), colours[100:196, 150:271])
    cv2.imwrite(str(folder / "grey.jpg"), data.camera()[200:290, 100:175])
    alpha = np.full((70, 83, 1), 128, np.uint8)
    cv2.imwrite(str(folder / "alpha.png"), np.concatenate([colours[300:370, 200:283], alpha], axis=2))
    cv2.imwrite(str(folder / "deep.png"), colours[:68, 300:372].astype(np.uint16) * 257)
    return folder


def measure(
    folder: Path, condition: dict[str, Any], model: str | Path, protocol: str = "", **options: Any
) -> Evaluation:
    benchmark = Benchmark(folder=str(folder), condition=Condition.model_validate(condition), protocol=protocol)
    chosen = EvaluateOptions(model=str(model), tracking=QUIET, **options)
    return evaluate_folder(benchmark, chosen, Console(file=io.StringIO(), width=200))


@pytest.mark.parametrize(
    ("model", "condition", "options"),
    [
        ("edsr", {"scale": 2}, {"ensemble": True}),
        ("mdsr", {"scale": 3}, {"tile": 64, "overlap": 8}),
        ("mzsr", {"scale": 2, "kernel": "g_ani", "subsample": "direct"}, {"steps": 2, "back_projections": 1}),
        ("mzsr", {"scale": 2}, {"steps": 1, "assume": "estimate"}),
        ("large_scale", {"scale": 2}, {}),
        ("dynet", {"sigma": 25}, {"variant": "small"}),
        ("zssr", {"scale": 2, "kernel": "g_2.0", "subsample": "direct"}, {"zssr": {"steps": 2, "crop": 24}}),
        ("zssr", {"scale": 3}, {"zssr": {"steps": 1, "crop": 24}, "assume": "estimate"}),
    ],
)
def test_every_model_on_grey_alpha_16_bits_and_mixed_sizes(
    exports: Path, pictures: Path, model: str, condition: dict[str, Any], options: dict[str, Any]
) -> None:
    rows, summary = measure(pictures, condition, model if model == "zssr" else exports / model, **options)
    assert [row["picture"] for row in rows] == ["alpha", "colour", "deep", "grey"]
    assert all(np.isfinite([row["psnr"], row["ssim"]]).all() for row in rows)
    assert summary["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]))
    assert summary["pictures"] == 4


def test_a_figure_is_that_of_the_model_and_the_protocol(exports: Path, pictures: Path) -> None:
    rows, _ = measure(pictures, {"scale": 2}, exports / "edsr", tile=0)
    clean = np.ascontiguousarray(cv2.imread(str(pictures / "colour.png"))[:96, :120, ::-1])
    low = imresize(to_batch(clean), 0.5, round_to_uint8=True)
    network, _, _ = load_export(exports / "edsr")
    with torch.no_grad():
        expected = compare(to_picture(network(low)), clean, shave=2, y_only=True)
        together = compare(to_picture(self_ensemble(network, low)), clean, shave=2, y_only=True)
    assert rows[1]["psnr"] == pytest.approx(expected["psnr"], abs=0.02)
    assert rows[1]["psnr_before"] == compare(bicubic(to_picture(low), 2), clean, shave=2, y_only=True)["psnr"]
    rows, _ = measure(pictures, {"scale": 2}, exports / "edsr", tile=0, ensemble=True)
    assert rows[1]["psnr"] == pytest.approx(together["psnr"], abs=0.02)


def test_a_figure_does_not_depend_on_the_other_files(pictures: Path, tmp_path: Path) -> None:
    rows, summary = measure(pictures, {"sigma": 25}, "input")
    (tmp_path / "colour.png").write_bytes((pictures / "colour.png").read_bytes())
    alone, _ = measure(tmp_path, {"sigma": 25}, "input")
    assert alone[0]["psnr"] == rows[1]["psnr"] != rows[0]["psnr"]
    assert summary["protocol"] == "rgb" and 20 < summary["psnr"] < 22
    _, by_task = measure(pictures, {"recipe": "all_in_one_3", "chains": ("noise_15", "noise_50")}, "input")
    assert by_task["tasks"]["noise_15"]["psnr"] > by_task["tasks"]["noise_50"]["psnr"] + 8


def test_what_is_kept(exports: Path, pictures: Path, tmp_path: Path) -> None:
    scripted = tmp_path / "distance.pt"

    class Distance(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean()

    torch.jit.script(Distance()).save(str(scripted))
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    benchmark = Benchmark(folder=str(pictures), condition=Condition(scale=2))
    options = EvaluateOptions(
        model=str(exports / "edsr"),
        out=str(tmp_path / "out"),
        lpips=str(scripted),
        niqe=True,
        tracking=TrackingConfig(uri=store),
    )
    evaluation = evaluate_folder(benchmark, options, Console(file=io.StringIO(), width=200))
    table = pq.read_table(tmp_path / "out" / "pictures.parquet").to_pylist()
    assert [row["psnr"] for row in table] == [row["psnr"] for row in evaluation.rows]
    assert all(0 < row["lpips"] < 2 for row in table)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["psnr"] == evaluation.summary["psnr"]
    for row in table:
        kept = decode_whole((tmp_path / "out" / "restored" / row["task"] / f"{row['picture']}.png").read_bytes())
        clean = read_clean(picture_files(benchmark)[row["picture"]], 2)
        assert PROTOCOLS["sr-y"].compare(kept, clean, 2)["psnr"] == row["psnr"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * 4 * 3
    assert f"{evaluation.summary['psnr']:.2f} dB" in page and "://" not in page
    import mlflow

    client = mlflow.MlflowClient(store)
    run = client.get_run(json.loads((tmp_path / "out" / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics["psnr"] == pytest.approx(evaluation.summary["psnr"])
    assert run.data.tags["ird.dataset_id"] == "0123456789abcdef"


def test_killed_it_goes_on_with_the_next_picture(pictures: Path, tmp_path: Path) -> None:
    program = [str(Path(sys.executable).with_name("ird")), "evaluate", "--model", "zssr", "--zssr-steps", "60"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    record = out / UNFINISHED
    process = subprocess.Popen([*program, "--scale", "2", "--out", str(out), str(pictures)], env=environment)
    while not record.exists() or not record.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = [json.loads(line) for line in record.read_text().splitlines()]
    assert 0 < len(before) < 4
    with open(record, "a") as file:
        file.write('{"task": "x2-bicubic", "pic')  # as a kill in the middle of a line leaves it

    whole, resumed = (
        measure(pictures, {"scale": 2}, "zssr", zssr={"steps": 60}, out=str(folder)).rows
        for folder in (tmp_path / "whole", out)
    )
    for entry, row in zip(before, resumed):
        assert (entry["picture"], entry["seconds"]) == (row["picture"], row["seconds"])  # not made again
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in whole]
    assert not record.exists()


def test_only_the_same_question_is_taken_up(tmp_path: Path) -> None:
    given = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    made = Restored(np.full((4, 4, 3), 7, np.uint8), 2.5, "a note")
    RestoredPictures(tmp_path, {"steps": 1}).keep("x2", "one", given, made)
    again = RestoredPictures(tmp_path, {"steps": 1})
    found = again.find("x2", "one", given)
    assert found is not None and np.array_equal(found.picture, made.picture) and found[1:] == made[1:]
    assert again.find("x2", "one", given + 1) is None and again.find("x3", "one", given) is None
    path = tmp_path / "restored" / "x2" / "one.png"
    path.write_bytes(path.read_bytes() + b"!")
    assert again.find("x2", "one", given) is None
    path.unlink()
    assert again.find("x2", "one", given) is None
    assert RestoredPictures(tmp_path, {"steps": 2}).known == 0
    assert RestoredPictures(tmp_path, {"steps": 1}).known == 0  # what does not count is not kept for later


def test_the_worst_and_the_best_place_of_a_picture() -> None:
    clean = np.full((160, 200, 3), 100, np.uint8)
    before, restored = clean.copy(), clean.copy()
    before[10:40, 20:60] += 60  # restored without fault
    restored[100:130, 120:160] += 50  # made up
    worst, best = crops_of("x2", "a", before, restored, clean)
    assert 66 <= worst.top <= 100 and 96 <= worst.left <= 120
    assert best.top <= 10 and best.left <= 20 and best.gain > 10
    assert worst.clean.shape == (64, 64, 3) and worst.error == pytest.approx(50**2 * 30 * 40 / 64**2, rel=0.01)


def test_pictures_of_the_training_data_are_a_leak(small_dataset: Path, tmp_path: Path) -> None:
    source = read_samples(open_store(small_dataset)).column("source")[0].as_py()
    encoded = np.frombuffer(corpus_files("pictures")[source.split("/", 1)[1]], np.uint8)
    picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    cv2.imwrite(str(tmp_path / "turned.png"), cv2.flip(picture, 1)[::2, ::2])
    other = np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "other.png"), cv2.resize(other, (200, 200), interpolation=cv2.INTER_CUBIC))
    rows, summary = measure(tmp_path, {"scale": 4}, "bicubic", dataset=str(small_dataset))
    assert summary["leaks"] == ["turned"]
    assert rows[1]["leak"] == f"{source} (copy, mirrored)"
    assert summary["without_leaks"]["psnr"] == rows[0]["psnr"]


def test_a_model_of_another_dataset_is_not_cleared_by_this_one(
    exports: Path, pictures: Path, small_dataset: Path
) -> None:
    with pytest.raises(ConfigError, match="was trained on 0123456789abcdef"):
        measure(pictures, {"scale": 2}, exports / "edsr", dataset=str(small_dataset))


@pytest.mark.parametrize(
    ("condition", "model", "options", "expected"),
    [
        ({"scale": 3}, "edsr", {}, "makes pictures 2 times as large, --scale is 3"),
        ({"sigma": 5}, "bicubic", {}, "--model input"),
        ({"scale": 2}, "input", {}, "--model bicubic"),
        ({"scale": 3}, "mzsr", {}, "was trained for x2"),
        ({"sigma": 5}, "mzsr", {}, "give --scale"),
        ({"sigma": 5}, "zssr", {}, "needs --scale"),
        ({"scale": 2}, "bicubic", {"lpips": "nowhere.pt"}, "TorchScript"),
    ],
)
def test_what_does_not_suit_is_refused(
    exports: Path, pictures: Path, condition: dict[str, Any], model: str, options: dict[str, Any], expected: str
) -> None:
    source = model if model in ("bicubic", "input", "zssr") else exports / model
    with pytest.raises(ConfigError, match=expected):
        measure(pictures, condition, source, **options)


def test_the_command_prints_one_json_object(pictures: Path) -> None:
    arguments = ["evaluate", "--model", "bicubic", "--scale", "2", "--protocol", "sr-y", str(pictures), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert 20 < summary["psnr"] < 40 and 0.5 < summary["ssim"] < 1 and summary["protocol"] == "sr-y"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "bicubic", "--scale", "2", "--protocol", "rgb", "FOLDER"], "expected one of super-resolution"),
        (["--model", "bicubic", "FOLDER"], "nothing to restore"),
        (["--model", "bicubic", "--scale", "2", "set6"], "known benchmarks"),
        (["--scale", "2", "FOLDER"], "give --model and one FOLDER"),
    ],
)
def test_the_command_refuses_with_a_sentence(pictures: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        given = [str(pictures) if argument == "FOLDER" else argument for argument in arguments]
        CliRunner().invoke(app, ["evaluate", *given], catch_exceptions=False)


def test_infinite_psnr_is_null_in_json() -> None:
    assert json.loads(to_json({"psnr": float("inf"), "tasks": {"a": {"psnr": 1.0}}})) == {
        "psnr": None,
        "tasks": {"a": {"psnr": 1.0}},
    }
    assert set(PROTOCOLS) >= {"sr-y", "rgb"}
