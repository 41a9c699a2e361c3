"""Restoring arrays and files with real, randomly initialised networks."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from skimage import data

from datagen.degradations.kernels import MZSR_SIZE, gaussian_kernel
from datagen.degradations.resample import imresize
from pipeline.budget import measured_table
from pipeline.inference import LoadedModel, RestoreOptions, _in_tiles, load_model, resolve_options, restore_array
from pipeline.pictures import Picture, decode_picture, encode_picture, read_picture, write_picture
from pipeline.record import RECORD
from pipeline.restore import resolve_model, restore_files
from pipeline.samples import to_float, to_integers
from tests.support.s3 import S3Server
from training.adaptation import adapt, enlarge
from training.export import WEIGHTS, ExportError, save_export
from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, MZSRConfig, build_model
from training.zero_shot import ZeroShotOptions, enlarge_zero_shot

CONFIGS: dict[str, ModelConfig] = {
    "dynet": DyNetConfig(dim=8, refinement_blocks=1, variants={"small": (1, 1, 1, 1), "large": (1, 2, 2, 2)}),
    "edsr": EDSRConfig(blocks=2, features=16, scale=2),
    "mdsr": MDSRConfig(blocks=2, features=16),
    "mzsr": MZSRConfig(layers=4, features=16),
}
PHOTOGRAPH = to_float(np.ascontiguousarray(data.astronaut()[:200, 150:330]))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        save_export(build_model(config), config, folder / name, {"stage": "test"})
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def load(exports: dict[str, Path]) -> Callable[[str], LoadedModel]:
    loaded = {name: load_model(path, "cpu") for name, path in exports.items()}
    return loaded.__getitem__


def restore_quietly(*arguments: Any, **options: Any) -> tuple[int, str]:
    """Exit code of ``restore_files`` on the CPU, and what it said."""
    console = Console(file=io.StringIO(), width=300)
    code = restore_files(*arguments, **options, device="cpu", console=console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "variant", "tile", "scale"),
    # MZSR adapts to no more than a tile, which therefore must hold most of the picture to be compared.
    [("edsr", "", 96, 2), ("mdsr", "x3", 96, 3), ("mzsr", "", 192, 2)],
)
def test_tiles_of_convolutional_networks_equal_the_whole(
    load: Callable[[str], LoadedModel], name: str, variant: str, tile: int, scale: int
) -> None:
    whole = restore_array(load(name), PHOTOGRAPH, RestoreOptions(variant=variant, tile=0))
    assert whole.shape == (200 * scale, 180 * scale, 3)
    assert whole.dtype == np.float32
    tiled = restore_array(load(name), PHOTOGRAPH, RestoreOptions(variant=variant, tile=tile))
    assert np.abs(tiled - whole).max() <= 1 / 255


def test_a_picture_that_fits_a_tile_is_restored_whole(load: Callable[[str], LoadedModel]) -> None:
    picture = PHOTOGRAPH[:64, :72]
    whole = restore_array(load("dynet"), picture, RestoreOptions(tile=0))
    assert (restore_array(load("dynet"), picture, RestoreOptions(tile=72)) == whole).all()
    # DyNet's attention and prompts span what it is given, so that smaller tiles give another picture, not a broken one.
    tiled = restore_array(load("dynet"), picture, RestoreOptions(tile=64))
    assert tiled.shape == whole.shape
    assert 0 < np.abs(tiled - whole).mean() < np.abs(whole - picture).mean()


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(64, 65, 64, 0), (65, 200, 64, 32), (131, 67, 72, 16), (9, 300, 64, 1), (1000, 1, 512, 64)],
)
@pytest.mark.parametrize("scale", [1, 3])
def test_tiles_cover_the_picture_once_and_stay_within_their_size(
    height: int, width: int, tile: int, overlap: int, scale: int
) -> None:
    picture = torch.from_numpy(np.random.default_rng(0).random((1, 3, height, width), dtype=np.float32))
    seen = []

    def enlarge(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[-2:])
        return part.repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    result = _in_tiles(enlarge, picture, scale, tile, overlap)
    assert (result - enlarge(picture)).abs().max() < 1e-6
    assert len(seen) > 2
    assert max(max(side) for side in seen[:-1]) <= tile


def test_variants_differ_and_depths_name_them(load: Callable[[str], LoadedModel]) -> None:
    small, large, default, depths = (
        restore_array(load("dynet"), PHOTOGRAPH[:64, :64], RestoreOptions(variant=variant))
        for variant in ("small", "large", "", "[1,1,1,1]")
    )
    assert np.abs(small - large).max() > 1 / 255
    assert (default == large).all()
    assert (depths == small).all()


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("dynet", {"variant": "huge"}, "small"),
        ("dynet", {"variant": "[2,3]"}, "four whole numbers"),
        ("dynet", {"variant": "[2,a,3,4]"}, "four depths"),
        ("edsr", {"variant": "small"}, "default"),
        ("edsr", {"kernel_variance": 2.0}, "kernel_variance"),
        ("dynet", {"scale": 2}, "variant, tile, overlap"),
        ("dynet", {"tile": 64, "overlap": 33}, "half the tile"),
        ("dynet", {"tile": 10}, "at least 64"),
    ],
)
def test_options_that_do_not_suit_are_refused(
    load: Callable[[str], LoadedModel], name: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        resolve_options(load(name), RestoreOptions(**options))


def test_arrays_of_another_kind_are_refused(load: Callable[[str], LoadedModel]) -> None:
    for wrong in (np.zeros((8, 8, 3)), np.zeros((8, 8), np.float32), np.zeros((0, 8, 3), np.float32)):
        with pytest.raises(ValueError, match="expected float32"):
            restore_array(load("dynet"), wrong)


def test_mzsr_adapts_to_each_picture(load: Callable[[str], LoadedModel]) -> None:
    model = load("mzsr")
    picture = PHOTOGRAPH[:96, :80]
    restored = restore_array(model, picture, RestoreOptions(kernel_variance=1.5))
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None]
    network = model.network
    adapted = adapt(network, tensor, gaussian_kernel(MZSR_SIZE, 1.5, 1.5), 2)
    assert adapted.helped
    expected = enlarge(network, adapted.weights, tensor, 2).clamp(0, 1)
    assert np.abs(restored - expected[0].permute(1, 2, 0).numpy()).max() < 1e-5
    with torch.no_grad():
        unadapted = network(imresize(tensor, 2)).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(restored - unadapted).max() > 1e-3
    assert np.abs(restored - restore_array(model, picture, RestoreOptions(kernel_variance=4.0))).max() > 1e-4


def test_mzsr_falls_back_to_bicubic_and_says_so(load: Callable[[str], LoadedModel]) -> None:
    torch.manual_seed(0)
    perfect = build_model(CONFIGS["mzsr"])
    for parameter in list(perfect.parameters())[-2:]:
        torch.nn.init.zeros_(parameter)  # adds nothing to the bicubic enlargement …
    flat = np.full((64, 64, 3), 0.5, np.float32)  # … which is exact here, so that no step can help
    said: list[str] = []
    model = LoadedModel(perfect.eval(), CONFIGS["mzsr"], {}, load("mzsr").sha256)
    restored = restore_array(model, flat, notify=said.append)
    assert restored.shape == (128, 128, 3)
    assert np.abs(restored - 0.5).max() < 1e-5
    assert len(said) == 1
    assert "bicubic" in said[0]
    restore_array(model, PHOTOGRAPH[:20, :20], notify=said.append)
    assert "too small" in said[1]


@pytest.mark.parametrize(
    "options", [{"ensemble": True}, {"noise": 10.0}, {"back_projections": 2}, {"kernel": "4,1,-0.5", "ensemble": True}]
)
def test_mzsr_has_the_options_of_the_meta_test(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    save_export(build_model(CONFIGS["mzsr"]), CONFIGS["mzsr"], tmp_path, {"scale": 2, "alignment": "aligned"})
    model, picture = load_model(tmp_path, "cpu"), PHOTOGRAPH[:96, :80]
    restored = restore_array(model, picture, RestoreOptions(steps=2, **options))
    tensor = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
    shot = ZeroShotOptions(steps=2, **({"kernel": "2.0"} | options))
    expected = enlarge_zero_shot(model.network, tensor, shot)
    assert np.abs(restored - expected[0].permute(1, 2, 0).numpy()).max() < 1e-5
    plain = restore_array(model, picture, RestoreOptions(steps=2, kernel=options.get("kernel", "")))
    assert np.abs(restored - plain).max() > 1e-4


def test_pictures_of_a_folder_adapt_together(
    tmp_path: Path, exports: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_export(build_model(CONFIGS["mzsr"]), CONFIGS["mzsr"], tmp_path / "export", {"scale": 2})
    (tmp_path / "in").mkdir()
    sizes = {"a": (96, 80), "b": (96, 80), "c": (64, 70), "d": (96, 81), "small": (20, 20)}
    for number, (name, (height, width)) in enumerate(sizes.items()):
        write_picture(tmp_path / "in" / f"{name}.png", Picture(PHOTOGRAPH[7 * number :][:height, :width]))
    (tmp_path / "in" / "broken.png").write_text("text")
    for batch in (1, 4):
        arguments = (str(tmp_path / "export"), tmp_path / "in", tmp_path / str(batch))
        code, said = restore_quietly(*arguments, batch=batch)
        assert (code, "5 restored with mzsr, 1 failed" in said) == (1, True)
        assert "small.png: too small to adapt to (20x20); enlarged by bicubic" in said
        assert "5 already done, 1 failed" in restore_quietly(*arguments, batch=4)[1]
    for name, (height, width) in sizes.items():
        alone, together = (np.asarray(Image.open(tmp_path / batch / f"{name}.png"), np.int16) for batch in "14")
        assert alone.shape == (2 * height, 2 * width, 3)
        assert np.abs(alone - together).max() <= 1
    code, said = restore_quietly(*arguments[:2], tmp_path / "none", batch=4, kernel="round")
    assert (code, said.count("expected g_0.2")) == (1, 4)
    assert restore_quietly(str(exports["edsr"]), tmp_path / "in", tmp_path / "none", batch=2)[0] == 2
    assert "--batch 2: of MZSR" in capsys.readouterr().err


def test_an_ensemble_is_the_mean_over_flips_and_turns(load: Callable[[str], LoadedModel]) -> None:
    picture = PHOTOGRAPH[:48, :40]
    restored = restore_array(load("edsr"), picture, RestoreOptions(ensemble=True))
    turned = restore_array(load("edsr"), np.ascontiguousarray(picture[::-1, ::-1]), RestoreOptions(ensemble=True))
    assert np.abs(turned[::-1, ::-1] - restored).max() < 1e-5
    assert np.abs(restored - restore_array(load("edsr"), picture)).max() > 1e-4


def test_the_scale_of_mzsr_comes_from_the_export_or_the_caller(tmp_path: Path) -> None:
    save_export(build_model(CONFIGS["mzsr"]), CONFIGS["mzsr"], tmp_path, {"scale": 3})
    model = load_model(tmp_path, "cpu")
    assert restore_array(model, PHOTOGRAPH[:60, :60]).shape == (180, 180, 3)
    assert restore_array(model, PHOTOGRAPH[:60, :60], RestoreOptions(scale=4)).shape == (240, 240, 3)


def test_a_folder_is_restored_once_and_bad_files_do_not_stop_it(exports: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    picture = to_integers(PHOTOGRAPH[:48, :40])
    Image.fromarray(picture).save(source / "a.png")
    Image.fromarray(picture[..., 0]).save(source / "deep" / "grey.png")
    Image.fromarray(picture).save(source / "deep" / "b.jpg")
    Image.fromarray(np.dstack([picture, picture[..., 0]])).save(source / "alpha.webp", lossless=True, exact=True)
    (source / "bad.png").write_text("text")
    (source / "notes.txt").write_text("no picture")

    code, said = restore_quietly(str(exports["dynet"]), source, out, variant="small")
    assert code == 1
    assert "4 restored with small, 1 failed" in said
    assert "failed: bad.png: not a picture" in said
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert made == ["a.png", "alpha.webp", "deep/b.jpg", "deep/grey.png", RECORD]
    model = load_model(exports["dynet"], "cpu")
    expected = to_integers(restore_array(model, to_float(picture), RestoreOptions(variant="small")))
    assert (np.asarray(Image.open(out / "a.png")) == expected).all()
    assert Image.open(out / "deep" / "grey.png").mode == "L"
    alpha = read_picture(out / "alpha.webp").alpha
    assert alpha is not None
    assert (to_integers(alpha) == picture[..., 0]).all()

    written = {path: (out / path).stat().st_mtime_ns for path in made[:-1]}
    (source / "bad.png").unlink()
    code, said = restore_quietly(str(exports["dynet"]), source, out, variant="small")
    assert (code, "0 restored with small, 4 already done" in said) == (0, True)
    assert written == {path: (out / path).stat().st_mtime_ns for path in made[:-1]}

    # Another input under the same name, a spoilt result, a lost result and a torn record are each noticed by content.
    Image.fromarray(picture[::-1]).save(source / "a.png")
    shutil.copyfile(out / "a.png", out / "deep" / "grey.png")
    (out / "alpha.webp").unlink()
    with open(out / RECORD, "a") as record:
        record.write('{"name": "deep/b.j')
    code, said = restore_quietly(str(exports["dynet"]), source, out, variant="small")
    assert (code, "3 restored with small, 1 already done" in said) == (0, True)
    names = [json.loads(line)["name"] for line in (out / RECORD).read_text().splitlines() if line.endswith("}")]
    assert names[-3:] == ["a.png", "alpha.webp", "deep/grey.png"]

    code, said = restore_quietly(str(exports["dynet"]), source, out, variant="large")
    assert (code, "4 restored with large:" in said) == (0, True)


def test_16_bits_in_16_bits_out_and_alpha_grows_with_the_picture(exports: dict[str, Path], tmp_path: Path) -> None:
    pixels = PHOTOGRAPH[:32, :24] ** 1.1  # values between the 8-bit ones
    alpha = np.zeros((32, 24), np.float32)
    alpha[:, 12:] = 1
    write_picture(tmp_path / "in.png", Picture(pixels, alpha, bits=16, icc=b"a profile, whatever it says" * 9))
    assert restore_quietly(str(exports["edsr"]), tmp_path / "in.png", tmp_path / "out.png")[0] == 0
    restored = read_picture(tmp_path / "out.png")
    assert (restored.bits, restored.pixels.shape) == (16, (64, 48, 3))
    assert restored.alpha is not None
    assert (restored.alpha[:, :20] < 0.01).all()
    assert (restored.alpha[:, 28:] > 0.99).all()
    stored = read_picture(tmp_path / "in.png").pixels
    expected = restore_array(load_model(exports["edsr"], "cpu"), stored)
    assert (to_integers(restored.pixels, np.uint16) == to_integers(expected, np.uint16)).all()
    assert restored.icc == b"a profile, whatever it says" * 9


def test_one_picture_goes_to_a_file_or_into_a_folder(exports: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(to_integers(PHOTOGRAPH[:24, :24])).save(tmp_path / "in.png")
    for out, result in (("to.jpg", "to.jpg"), ("folder", "folder/in.png")):
        assert restore_quietly(str(exports["dynet"]), tmp_path / "in.png", tmp_path / out)[0] == 0
        assert read_picture(tmp_path / result).pixels.shape == (24, 24, 3)


def test_results_inside_the_input_folder_are_no_inputs(exports: dict[str, Path], tmp_path: Path) -> None:
    Image.fromarray(to_integers(PHOTOGRAPH[:24, :24])).save(tmp_path / "in.png")
    for _ in range(2):
        assert restore_quietly(str(exports["dynet"]), tmp_path, tmp_path / "restored")[0] == 0
    assert sorted(p.name for p in (tmp_path / "restored").iterdir()) == ["in.png", RECORD]


@pytest.mark.parametrize(
    ("source", "out", "options", "complaint"),
    [
        ("none.png", "out", {}, "no such file or folder"),
        ("in.png", "in.png", {}, "is the input itself"),
        ("in.png", "out.gif", {}, "choose one of"),
        (".", ".", {}, "is the input folder itself"),
        (".", "in.png", {}, "is a file"),
        ("empty", "out", {}, "no pictures below it"),
        ("in.png", "out.png", {"variant": "huge"}, "no variant 'huge'"),
        ("in.png", "out.png", {"tile": -2}, "tile: "),
    ],
)
def test_refused_before_any_work(
    exports: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
    options: dict[str, Any],
    complaint: str,
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    assert restore_quietly(str(exports["dynet"]), tmp_path / source, tmp_path / out, **options)[0] == 2
    assert complaint in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_folders_without_a_sound_model_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"models:/NAME@ALIAS"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ExportError, match="missing"):
        resolve_model(str(tmp_path))
    shutil.copytree(exports["dynet"], tmp_path / "broken")
    with open(tmp_path / "broken" / WEIGHTS, "r+b") as file:
        file.seek(-3, io.SEEK_END)
        file.write(b"\0\1\2")
    with pytest.raises(ExportError, match="sha256"):
        resolve_model(str(tmp_path / "broken"))
    grey = EDSRConfig(blocks=1, features=8, channels=1, mean=(0.5,))
    save_export(build_model(grey), grey, tmp_path / "grey", {})
    with pytest.raises(ExportError, match="three"):
        resolve_model(str(tmp_path / "grey"))


def test_memory_decides_between_the_whole_and_tiles_and_it_is_said(
    exports: dict[str, Path], load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    write_picture(tmp_path / "in.png", Picture(PHOTOGRAPH))
    code, said = restore_quietly(str(exports["edsr"]), tmp_path / "in.png", tmp_path / "whole.png")
    assert (code, "tiles" in said) == (0, False)
    code, said = restore_quietly(str(exports["edsr"]), tmp_path / "in.png", tmp_path / "tiles.png", budget_mem="10M")
    assert code == 0
    assert "in.png: in tiles of 64 pixels: the whole, 180x200, would take about 0.0 GiB" in said
    whole, tiles = (read_picture(tmp_path / f"{name}.png").pixels for name in ("whole", "tiles"))
    assert np.abs(whole - tiles).max() <= 1.01 / 255
    said_by_array: list[str] = []
    restore_array(load("dynet"), PHOTOGRAPH, RestoreOptions(variant="small"), notify=said_by_array.append, memory=1)
    assert "in tiles of 64 pixels" in said_by_array[0]
    assert "restore: --budget-mem" not in said


def test_streams(exports: dict[str, Path], tmp_path: Path) -> None:
    """As a person pipes: a picture in, a picture out, and not a word between its bytes."""
    picture = to_integers(PHOTOGRAPH[:24, :32])
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True)
    command = [str(Path(sys.executable).with_name("ird")), "restore", "--model", str(exports["dynet"]), "-", "-"]
    done = subprocess.run(command, input=buffer.getvalue(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(io.BytesIO(done.stdout)) as image:
        assert image.format == "WEBP"
        restored = np.asarray(image)
    expected = restore_array(load_model(exports["dynet"], "cpu"), to_float(picture))
    assert (restored == to_integers(expected)).all()
    assert b"1 restored with large" in done.stderr


def test_before_and_after_beside_each_other(exports: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = to_integers(PHOTOGRAPH[:24, :32])
    Image.fromarray(np.dstack([picture, picture[..., 0]])).save(tmp_path / "in" / "a.png")
    for again in ("1 restored", "0 restored with default, 1 already done"):
        code, said = restore_quietly(str(exports["edsr"]), tmp_path / "in", tmp_path / "out", compare=True)
        assert (code, again.replace("default", "edsr") in said) == (0, True)
    after, both = (np.asarray(Image.open(tmp_path / "out" / name)) for name in ("a.png", "a.compare.png"))
    assert both.shape == (48, 64 + 2 + 64, 4)
    assert (both[:, -64:] == after).all()
    assert (both[::2, :64:2, :3] == picture).all()


def test_a_budget_chooses_the_variant_of_each_picture(
    exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = load_model(exports["dynet"], "cpu")
    measured_table(model, tmp_path / "cache" / "ird" / "measured", lambda message: None)
    (file,) = (tmp_path / "cache" / "ird" / "measured").iterdir()
    # As on a machine whose figures are known: those of a test machine change with its load.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": {"small": 0.1, "large": 0.2}}))
    (tmp_path / "in").mkdir()
    for name, side in {"tiny.png": 32, "wide.png": 64}.items():
        Image.fromarray(to_integers(PHOTOGRAPH[:side, :side])).save(tmp_path / "in" / name)
    code, said = restore_quietly(str(exports["dynet"]), tmp_path / "in", tmp_path / "out", budget_ms=7)
    assert code == 0
    assert "tiny.png: large (small 2 ms, large 3 ms expected for 32x32; budget 7 ms)" in said
    assert "wide.png: small (small 6 ms, large 12 ms expected for 64x64; budget 7 ms)" in said
    assert "2 restored with large (1) and small (1)" in said
    code, said = restore_quietly(str(exports["dynet"]), tmp_path / "in", tmp_path / "o2", budget_ms=1e-6)
    assert code == 1
    assert "failed: tiny.png: 32x32: small, the fastest variant" in said
    code, said = restore_quietly(str(exports["dynet"]), tmp_path / "in", tmp_path / "o3", variant="auto")
    assert (code, "2 restored with large" in said) == (0, True)


def test_a_bucket_is_restored_once(
    exports: dict[str, Path], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    client = s3_server.client
    client.create_bucket(Bucket="restores")

    def put(key: str, picture: np.ndarray) -> None:
        client.put_object(Bucket="restores", Key=key, Body=encode_picture(Picture(picture), ".png"))

    put("in/a.png", PHOTOGRAPH[:24, :24])
    put("in/deep/b.png", PHOTOGRAPH[:24, :24])
    source, out = "s3://restores/in", "s3://restores/out"
    code, said = restore_quietly(str(exports["dynet"]), source, out)
    assert (code, "2 restored with large: s3://restores/out" in said) == (0, True)
    made = client.get_object(Bucket="restores", Key="out/deep/b.png")["Body"].read()
    assert decode_picture(made).pixels.shape == (24, 24, 3)
    client.delete_object(Bucket="restores", Key="out/a.png")
    put("in/deep/c.png", PHOTOGRAPH[:24, 1:25])
    code, said = restore_quietly(str(exports["dynet"]), source, out)
    assert (code, "2 restored with large, 1 already done" in said) == (0, True)
