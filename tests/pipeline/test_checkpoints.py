"""Import of public checkpoints and export for other programs, as a person meets them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from skimage import data

from pipeline.checkpoints import export_model, import_checkpoint
from pipeline.inference import RestoreOptions, load_model, restore_array
from pipeline.pictures import Picture, read_picture, write_picture
from pipeline.restore import restore_files
from pipeline.samples import to_float
from tests.training.public_networks import PublicEDSR, PublicMDSR, PublicRestorer, randomised
from training.export import ExportError, load_export, save_export
from training.models import EDSRConfig, build_model
from training.public_checkpoints import ImportOptions
from training.public_files import CheckpointError
from training.public_names import Kind

PHOTOGRAPH = to_float(np.ascontiguousarray(data.astronaut()[:40, 150:206]))


def public_dynet() -> torch.nn.Module:
    return randomised(PublicRestorer(dim=8, prompts=((8, 8), (8, 4), (8, 2)), refinement=1))


def lightning(network: torch.nn.Module, path: Path) -> Path:
    torch.save({"state_dict": {f"net.{name}": w for name, w in network.state_dict().items()}, "epoch": 119}, path)
    return path


def run(*arguments: Any, **options: Any) -> tuple[int | None, str]:
    """What a command returns, and what it says, in one line."""
    console = Console(file=io.StringIO(), width=200)
    act = import_checkpoint if len(arguments) == 3 and isinstance(arguments[1], Path) else export_model
    code = act(*arguments, **options, console=console)  # type: ignore[operator]
    assert isinstance(console.file, io.StringIO)
    return code, " ".join(console.file.getvalue().split())


def test_an_imported_dynet_restores_pictures(tmp_path: Path) -> None:
    public = public_dynet()
    code, said = run("dynet", lightning(public, tmp_path / "model.ckpt"), tmp_path / "dynet")
    assert code == 0
    assert "reduce_noise_channel_1.weight" in said and "ignored" in said and "never uses" in said
    assert f"ird restore --model {tmp_path / 'dynet'} --variant small IN OUT" in said

    write_picture(tmp_path / "in.png", Picture(PHOTOGRAPH, None, False, 8, None))
    quiet = Console(file=io.StringIO())
    results = {}
    for variant, depth in (("small", (2, 3, 3, 4)), ("large", (4, 6, 6, 8))):
        out = tmp_path / f"{variant}.png"
        code = restore_files(
            str(tmp_path / "dynet"), tmp_path / "in.png", out, variant=variant, device="cpu", console=quiet
        )
        assert code == 0
        results[variant] = read_picture(out).pixels
        image = torch.from_numpy(read_picture(tmp_path / "in.png").pixels.transpose(2, 0, 1))[None]
        expected = public(image, depth)[0].clamp(0, 1).permute(1, 2, 0).numpy()
        assert np.abs(results[variant] - expected).max() <= 0.51 / 255  # rounded to 8 bits
    assert np.abs(results["small"] - results["large"]).max() > 1 / 255


def test_an_imported_edsr_enlarges_pictures(tmp_path: Path) -> None:
    public = randomised(PublicEDSR(3, blocks=2, features=8, residual_scale=0.5))
    torch.save(public.state_dict(), tmp_path / "edsr.pt")
    code, said = run("edsr", tmp_path / "edsr.pt", tmp_path / "edsr", options=ImportOptions(residual_scale=0.5))
    assert code == 0 and "image_range 255: read from sub_mean" in said
    found = restore_array(load_model(tmp_path / "edsr", "cpu"), PHOTOGRAPH, RestoreOptions())
    image = torch.from_numpy(PHOTOGRAPH.transpose(2, 0, 1))[None]
    expected = (public(255 * image) / 255)[0].clamp(0, 1).permute(1, 2, 0).numpy()
    assert found.shape == (120, 168, 3) and np.abs(found - expected).max() <= 1e-5


def test_what_the_weights_do_not_say_is_said(tmp_path: Path) -> None:
    torch.save(PublicMDSR(blocks=1, features=8).state_dict(), tmp_path / "mdsr.pt")
    code, said = run("mdsr", tmp_path / "mdsr.pt", tmp_path / "mdsr")
    assert code == 0 and "residual_scale 1: as published" in said and "variants: x2, x3, x4" in said


def test_the_export_says_where_it_came_from_and_may_be_made_again(tmp_path: Path) -> None:
    file = lightning(public_dynet(), tmp_path / "model.ckpt")
    contents = []
    for _ in range(2):
        assert run("dynet", file, tmp_path / "dynet")[0] == 0
        contents.append([(tmp_path / "dynet" / name).read_bytes() for name in ("config.json", "model.safetensors")])
    assert contents[0] == contents[1]
    imported = load_export(tmp_path / "dynet")[2]["imported"]
    assert (imported["kind"], imported["file"], len(imported["sha256"])) == ("dynet", "model.ckpt", 64)


def test_another_export_is_not_written_over(tmp_path: Path) -> None:
    config = EDSRConfig(blocks=1, features=4)
    save_export(build_model(config), config, tmp_path / "mine", {"step": 9})
    file = lightning(public_dynet(), tmp_path / "model.ckpt")
    with pytest.raises(ExportError, match=r"mine: holds another export already; choose another --out"):
        run("dynet", file, tmp_path / "mine")
    assert load_export(tmp_path / "mine")[2] == {"step": 9}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("missing", ["missing prompt2.conv3x3.weight 8×8×3×3 nothing", "1 key(s)", "whole checkpoint"]),
        ("reshaped", ["of another shape output.weight 3×16×3×3 3×15×3×3", "1 key(s)"]),
        ("unexpected", ["unexpected head.bias nothing 3", "bias=True"]),
        ("biasfree", ["norm1.body.bias", "more", "BiasFree"]),
        ("broken", ["bad values output.weight finite floating point NaN or infinity", "before the values broke"]),
    ],
)
def test_what_does_not_fit_is_shown_and_nothing_is_written(fault: str, expected: list[str], tmp_path: Path) -> None:
    network = public_dynet()
    tensors = dict(network.state_dict())
    if fault == "missing":
        del tensors["prompt2.conv3x3.weight"]
    elif fault == "reshaped":
        tensors["output.weight"] = tensors["output.weight"][:, :15].clone()
    elif fault == "unexpected":
        tensors["head.bias"] = torch.ones(3)
    elif fault == "biasfree":
        tensors = {name: w for name, w in tensors.items() if not name.endswith("body.bias")}
    else:
        tensors["output.weight"] = tensors["output.weight"] * float("nan")
    torch.save(tensors, tmp_path / "model.pth")
    code, said = run("dynet", tmp_path / "model.pth", tmp_path / "out")
    assert code == 1 and "nothing written" in said and str(tmp_path / "model.pth") in said
    for words in expected:
        assert words in said.replace("│ ", "").replace("┃ ", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["promptir", "edsr"])
def test_another_kind_is_refused_with_file_and_remedy(kind: Kind, tmp_path: Path) -> None:
    file = lightning(public_dynet(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=rf"{file}: looks like dynet, not {kind} .*import it as dynet"):
        run(kind, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_goes_into_a_folder_under_its_own_name(tmp_path: Path) -> None:
    torch.save(PublicMDSR(blocks=1, features=8).state_dict(), tmp_path / "mdsr.pt")
    run("mdsr", tmp_path / "mdsr.pt", tmp_path / "mdsr")
    _, said = run(str(tmp_path / "mdsr"), tmp_path / "files", "torch", "x3")
    assert "largest difference" in said and "135" in said and str(tmp_path / "files" / "mdsr-x3.pt2") in said
    program = torch.export.load(tmp_path / "files" / "mdsr-x3.pt2").module()
    image = torch.rand(1, 3, 17, 30)
    expected = load_model(tmp_path / "mdsr", "cpu").network(image, "x3")
    assert (program(image) - expected).abs().max() <= 1e-6
