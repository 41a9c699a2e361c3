"""What a version holds and says of its origin, and what is refused before one is made."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.files import sha256_of_file
from infra.storage import open_store
from infra.tracking import TrackingConfig, connect
from pipeline.inference import export_sha256
from pipeline.registry.packaging import EXPORT, FILES
from pipeline.registry.pulling import pull
from pipeline.registry.pushing import figures_of, find_export, push
from pipeline.registry.server import RegistryError
from pipeline.registry.versions import list_versions
from training.checkpoint import save_checkpoint
from training.export import WEIGHTS, ExportError, load_export, save_export
from training.models import MZSRConfig, build_model

MEANS = [
    {"task": "noise_25", "method": "degraded", "psnr": 20.1, "ssim": 0.4},
    {"task": "noise_25", "method": "dynet-small", "psnr": 27.123456, "ssim": 0.7},
    {"task": "sr_x2", "method": "edsr", "psnr": 30.0, "ssim": 0.9},
]


def test_a_version_holds_all_variants_and_says_where_it_comes_from(
    settings: TrackingConfig, export: Path, run_id: str, pushed: Path
) -> None:
    (row,) = list_versions(settings, "tiny")
    assert (row.name, row.version, row.aliases, row.run_id) == ("tiny", 1, ("demo",), run_id)
    assert len(row.tags.pop("files_sha256")) == 64  # type: ignore[attr-defined]
    assert row.tags == {
        "stage": "finetune",
        "dataset_id": "d1",
        "code": "c1",
        "run_id": run_id,
        "model": "dynet",
        "variants": "small,large",
        "sha256": export_sha256(export),
        "psnr.noise_25.small": "25.5",
        "psnr.noise_25.large": "26",
        "ssim.noise_25.large": "0.8",
    }
    # Pushing does not change how the run ended, and nothing lands in the working directory.
    run = connect(settings).get_run(run_id)
    assert run.info.status == "KILLED"
    assert [output.model_id for output in run.outputs.model_outputs]
    assert list((pushed / "mlartifacts").rglob(WEIGHTS))


def test_every_file_is_vouched_for_and_the_requirements_are_exact(settings: TrackingConfig, tmp_path: Path) -> None:
    folder = pull("models:/tiny@demo", tmp_path, settings)
    sums = json.loads((folder / FILES).read_text())
    assert {"MLmodel", "requirements.txt", str(EXPORT / WEIGHTS), "code/pipeline/inference.py"} <= sums.keys()
    assert all(sha256_of_file(folder / name) == expected for name, expected in sums.items())
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    names = {line.partition("==")[0] for line in requirements}
    assert {"mlflow", "numpy", "pydantic", "safetensors", "torch"} <= names
    assert not {"deepspeed", "ray", "typer", "boto3"} & names
    assert not list(folder.rglob("*.pkl"))
    assert (folder / "serving_input_example.json").is_file()


def test_mzsr_offers_its_own_params(settings: TrackingConfig, tmp_path: Path) -> None:
    config = MZSRConfig(layers=2, features=4)
    save_export(build_model(config), config, tmp_path / "export", {"scale": 3})
    push(tmp_path / "export", "zero-shot", settings=settings)
    description = (pull("models:/zero-shot/1", tmp_path, settings) / "MLmodel").read_text()
    for name in (
        "variant",
        "tile",
        "overlap",
        "ensemble",
        "scale",
        "steps",
        "kernel_variance",
        "noise",
        "back_projections",
    ):
        assert f'"name": "{name}"' in description
    assert {row.name for row in list_versions(settings)} >= {"tiny", "zero-shot"}


def test_a_run_folder_brings_its_checkpoint_and_an_evaluation_its_figures(
    settings: TrackingConfig, export: Path, run_id: str, command: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    network, config, metadata = load_export(export)
    save_export(network, config, tmp_path / "run" / "export", metadata)
    save_checkpoint(open_store(tmp_path / "run" / "checkpoints"), 7, {"a": 1}, {"run_id": run_id})
    (tmp_path / "results.json").write_text(json.dumps({"means": MEANS}))
    assert figures_of(tmp_path / "results.json", "edsr") == {
        "psnr.sr_x2.default": "30.0000",
        "ssim.sr_x2.default": "0.9000",
    }
    code, said = command("registry", "push", tmp_path / "run", "--name", "b", "--metrics", tmp_path / "results.json")
    assert (code, said.splitlines()[-1]) == (0, "models:/b/1")
    (row,) = list_versions(settings, "b")
    state = tmp_path / "run" / "checkpoints" / "step-00000007" / "state.pt"
    assert (row.tags["checkpoint"], row.tags["checkpoint_sha256"]) == ("step-00000007", sha256_of_file(state))
    assert row.figures == {"psnr.noise_25.small": 27.1235, "ssim.noise_25.small": 0.7}

    code, said = command("registry", "show", "models:/b/1")
    assert code == 0
    for word in ("dynet", "small, large", run_id, "step-00000007", "d1", "27.12", "noise_25"):
        assert word in said
    shown = json.loads(command("registry", "show", "models:/tiny@demo", "--json")[1])
    assert (shown["version"], shown["variants"], shown["figures"]["psnr.noise_25.large"]) == (1, ["small", "large"], 26)
    assert [event["how"] for event in shown["history"]["demo"]] == ["set"]
    assert "small, large" in command("registry", "list", "tiny")[1]


def test_a_run_on_record_is_found_by_its_id(settings: TrackingConfig, export: Path, run_id: str) -> None:
    client = connect(settings)
    with pytest.raises(ExportError, match="no folder that it names"):
        find_export(run_id, settings)
    client.log_param(run_id, "out", str(export.parent))
    assert find_export(run_id, settings) == export
    with pytest.raises(RegistryError, match="no run 0"):
        find_export("0" * 32, settings)


def test_bad_requests_are_refused_clearly(settings: TrackingConfig, export: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no run abc"):
        push(export, "tiny", run_id="abc", settings=settings)
    with pytest.raises(ExportError, match="missing"):
        push(tmp_path, "tiny", settings=settings)
    with pytest.raises(ExportError, match="no export here"):
        find_export(str(tmp_path), settings)
    with pytest.raises(RegistryError, match="no model 'none'"):
        list_versions(settings, "none")
    (tmp_path / "results.json").write_text(json.dumps({"means": MEANS}))
    with pytest.raises(RegistryError, match="no figures of mzsr; it measured degraded, dynet-small, edsr"):
        figures_of(tmp_path / "results.json", "mzsr")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RegistryError, match=r"expected the results\.json"):
        figures_of(tmp_path / "results.json", "mzsr")
