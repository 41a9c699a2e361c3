"""Files for other programs hold the same network, for every size, and say what they are."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.networks import CONFIGS, assert_close, built, picture
from training.export import ExportError, save_export
from training.models import DyNetConfig, ModelConfig, variants_of
from training.portable import METADATA, PortableError, export_portable

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="needs onnx, onnxscript and onnxruntime: pip install 'ird[onnx]'")
ORIGIN = {"run_id": "a1", "dataset_id": "ird-1", "step": 9}

# Tracing a graph with open sizes takes most of a second a block, so that these are as shallow as they can be.
SHALLOW = {"variants": {"small": (1, 1, 1, 1), "large": (1, 1, 1, 2)}, "refinement_blocks": 0}
DYNET: ModelConfig = CONFIGS["dynet"].model_copy(update=SHALLOW)
GAINS: ModelConfig = DYNET.model_copy(update={"variant_gains": True})
PROMPTIR: ModelConfig = CONFIGS["promptir"].model_copy(update={"blocks": (1, 1, 1, 1), "refinement_blocks": 0})


def exported(config: ModelConfig, folder: Path) -> Path:
    save_export(built(config), config, folder / "export", ORIGIN)
    return folder / "export"


def sizes(stride: int) -> list[tuple[int, int, int]]:
    """Batch, height, width: odd, one side divisible, both, smaller and larger than what was traced."""
    return [(1, stride + 1, 31), (3, 40, 21), (1, 21, 40), (2, 64, 48), (1, 75, 90)]


def assert_same_pictures(run: Any, config: ModelConfig, variant: str, stride: int, bound: float) -> None:
    network = built(config).eval()
    for batch, height, width in sizes(stride):
        image = picture(config, height, width, batch)
        with torch.no_grad():
            assert_close(run(image), network(image, variant), bound)


def onnx_runner(path: Path) -> tuple[Any, dict[str, str]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["restored"], {"image": image.numpy()})[0])

    assert session.get_inputs()[0].shape[0::2] == ["batch", "height"]
    return run, session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize(("name", "variant"), [("edsr-x3", "default"), ("mdsr", "x2"), ("edsr-grey", "default")])
def test_super_resolution_as_torch_export(name: str, variant: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    written = export_portable(exported(config, tmp_path), tmp_path / "model.pt2", "torch", variant)
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert_same_pictures(program, config, variant, 1, 1e-6)
    facts = json.loads(extra[METADATA])
    assert facts == json.loads(json.dumps(written.metadata))
    assert type(config).model_validate(facts["model"]) == config
    assert (facts["variant"], facts["run_id"], facts["dataset_id"]) == (variant, "a1", "ird-1")
    assert max(written.differences.values()) <= 1e-6


@pytest.mark.slow
def test_the_file_needs_nothing_of_ird(tmp_path: Path) -> None:
    export_portable(exported(CONFIGS["edsr-x2"], tmp_path), tmp_path / "model.pt2", "torch")
    code = (
        "import sys, torch; sys.path = [p for p in sys.path if p]; run = torch.export.load(sys.argv[1]).module(); "
        "print(tuple(run(torch.rand(1, 3, 20, 31)).shape), any(m.partition('.')[0] == 'training' for m in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt2")]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert said.stdout.strip() == "(1, 3, 40, 62) False", said.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("config", "variant"), [(GAINS, "small"), (PROMPTIR, "default")], ids=["gains", "promptir"])
def test_restoration_as_torch_export(config: ModelConfig, variant: str, tmp_path: Path) -> None:
    export_portable(exported(config, tmp_path), tmp_path / "model.pt2", "torch", variant)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_pictures(program, config, variant, 8, 1e-5)
    with pytest.raises(AssertionError, match=r"size\(\)\[2\] >= 9"):
        program(picture(config, 8, 24))


@needs_onnx
@pytest.mark.slow
def test_dynet_as_onnx_variant_by_variant(tmp_path: Path) -> None:
    folder, runs = exported(DYNET, tmp_path), {}
    for variant in variants_of(DYNET):
        export_portable(folder, tmp_path / f"{variant}.onnx", "onnx", variant)
        runs[variant], facts = onnx_runner(tmp_path / f"{variant}.onnx")
        assert_same_pictures(runs[variant], DYNET, variant, 8, 1e-4)
        assert facts["variant"] == variant and facts["run_id"] == "a1" and facts["dataset_id"] == "ird-1"
        assert DyNetConfig.model_validate_json(facts["model"]) == DYNET
    image = picture(DYNET, 24, 24)
    assert (runs["small"](image) - runs["large"](image)).abs().max() > 1e-4


@needs_onnx
def test_super_resolution_as_onnx(tmp_path: Path) -> None:
    config = CONFIGS["edsr-x4"]
    export_portable(exported(config, tmp_path), tmp_path / "model.onnx", "onnx")
    assert_same_pictures(onnx_runner(tmp_path / "model.onnx")[0], config, "default", 1, 1e-5)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.onnx"]  # weights inside, not beside


@pytest.mark.skipif(ONNX, reason="onnx is installed")
def test_without_onnx_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(PortableError, match=re.escape("pip install 'ird[onnx]'")):
        export_portable(exported(CONFIGS["edsr-x2"], tmp_path), tmp_path / "model.onnx", "onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_file_that_differs_too_much_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PortableError, match=r"model.pt2: not written; on \d picture\(s\) of .* more than -1"):
        export_portable(exported(CONFIGS["edsr-x2"], tmp_path), tmp_path / "model.pt2", "torch", bound=-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


@pytest.mark.parametrize(
    ("name", "file", "variant", "message"),
    [
        ("edsr-x2", "model.onnx", "", "of format torch ends with .pt2"),
        ("edsr-x2", "model.pt2", "small", "unknown variant 'small'; allowed: default"),
        ("dynet", "model.pt2", "tiny", "no variant 'tiny'; allowed: small = "),
        ("dynet", "model.pt2", [1, 2, 3], r"no variant \[1, 2, 3\]"),
        ("mzsr", "model.pt2", "", "learns from each picture"),
    ],
)
def test_refusals(name: str, file: str, variant: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PortableError, match=message):
        export_portable(exported(CONFIGS[name], tmp_path), tmp_path / file, "torch", variant)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


def test_a_folder_without_an_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"config\.json: missing"):
        export_portable(tmp_path, tmp_path / "model.pt2", "torch")
