import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.training.networks import CONFIGS, built
from training.export import ExportError, load_export, save_export
from training.models import MZSRConfig, build_model

EDSR = CONFIGS["edsr-x2"]


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_export(built(EDSR), EDSR, tmp_path / name, {"step": 1})
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_memory_layout_and_training_state_do_not_matter(tmp_path: Path) -> None:
    model = built(EDSR)
    expected = {name: w.clone() for name, w in model.state_dict().items()}
    save_export(model.to(memory_format=torch.channels_last).train(), EDSR, tmp_path, {})
    loaded, _, _ = load_export(tmp_path)
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())


def test_half_precision_weights_are_widened(tmp_path: Path) -> None:
    model = built(EDSR).bfloat16()
    save_export(model, EDSR, tmp_path, {})
    loaded, _, _ = load_export(tmp_path)
    for name, w in loaded.state_dict().items():
        assert w.dtype == torch.float32
        assert torch.equal(w, model.state_dict()[name].float())


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    save_export(built(EDSR), EDSR, tmp_path, {})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_export(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    save_export(built(EDSR), EDSR, tmp_path, {"step": 1})
    mzsr = MZSRConfig(layers=3, features=4)
    save_export(build_model(mzsr), mzsr, tmp_path, {"step": 2})
    _, config, metadata = load_export(tmp_path)
    assert config == mzsr
    assert metadata == {"step": 2}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    save_export(built(EDSR), EDSR, tmp_path, {})
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"flip": bytes(data), "truncate": bytes(data[:-100]), "empty": b""}[damage])
    with pytest.raises(ExportError, match=r"model\.safetensors: sha256 is .*config\.json expects.*damaged"):
        load_export(tmp_path)


def test_weights_of_another_export_are_refused(tmp_path: Path) -> None:
    """What a save killed between its two files leaves behind."""
    save_export(built(EDSR), EDSR, tmp_path / "a", {})
    torch.manual_seed(9)
    save_export(build_model(EDSR), EDSR, tmp_path / "b", {})
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ExportError, match="of another export"):
        load_export(tmp_path / "a")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json: missing \(not an export\)"):
        load_export(tmp_path / "nowhere")
    save_export(built(EDSR), EDSR, tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match=r"model\.safetensors: missing"):
        load_export(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ExportError, match="the save did not finish"):
        load_export(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "export format 99; this version reads format 1"),
        ("model", {"name": "resnet"}, "not a model this version knows.*'dynet'"),
        ("model", {"name": "edsr", "width": 8}, "width"),
        ("model", {"name": "edsr", "features": 16, "blocks": 2}, "of another shape.*head.weight"),
        ("model", {"name": "mzsr"}, "missing.*unexpected"),
        ("metadata", None, None),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_refused(key: str, value: object, message: str | None, tmp_path: Path) -> None:
    save_export(built(EDSR), EDSR, tmp_path, {})
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    if value is None:
        del description[key]
        message = f"not the config of an export.*{key}"
    else:
        description[key] = value
    path.write_text(json.dumps(description))
    with pytest.raises(ExportError, match=message):
        load_export(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    save_export(built(EDSR), EDSR, tmp_path, {})
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ExportError, match=r"config\.json: not valid JSON"):
        load_export(tmp_path)


def test_a_model_that_is_not_its_config_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"nothing written.*of another shape"):
        save_export(built(EDSR), EDSR.model_copy(update={"features": 16}), tmp_path, {})
    with pytest.raises(ExportError, match=r"missing.*unexpected.*_orig_mod"):
        save_export(torch.compile(built(EDSR), backend="eager"), EDSR, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"loss": float("nan")}, {"path": Path("x")}], ids=["nan", "object"])
def test_metadata_must_be_json(metadata: dict, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="metadata must be JSON"):
        save_export(built(EDSR), EDSR, tmp_path, metadata)
    assert list(tmp_path.iterdir()) == []
