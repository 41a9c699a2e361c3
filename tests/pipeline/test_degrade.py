"""``ird degrade``: files, folders, replay to the byte, the gallery; and what it refuses."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from skimage import data

from infra.config import ConfigError
from pipeline.cli import main
from pipeline.degrade import degrade_files, gallery, replay_file
from pipeline.pictures import read_picture
from tests.support.dataset import REPOSITORY

IRD = str(Path(sys.executable).with_name("ird"))
RECIPES = sorted(path.stem for path in (REPOSITORY / "configs" / "degradations").glob("*.yaml"))


def ird(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [IRD, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


def run(*arguments: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=300)
    code = degrade_files(*arguments, console=console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    path = tmp_path / "clean.png"
    Image.fromarray(data.astronaut()[:96, 150:278]).save(path)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_replay_gives_the_same_bytes(clean: Path, tmp_path: Path, recipe: str) -> None:
    for seed in (0, 1):
        out, again = tmp_path / "out.png", tmp_path / "again.png"
        assert run(clean, out, recipe, seed)[0] == 0
        meta = json.loads((tmp_path / "out.png.json").read_text())
        assert meta["recipe"] == recipe and meta["key"] == "clean.png" and meta["size"] == [96, 128]
        replay_file(tmp_path / "out.png.json", clean, again)
        assert again.read_bytes() == out.read_bytes() != clean.read_bytes()
        assert (tmp_path / "again.png.json").read_bytes() == (tmp_path / "out.png.json").read_bytes()


def test_the_commands_replay_too(clean: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    done = ird("degrade", clean, out, "--recipe", "composite_weather", "--seed", 3)
    assert done.returncode == 0 and "out.png: " in done.stdout
    assert ird("degrade", "--replay", f"{out}.json", clean, again).returncode == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_folder_with_a_bad_picture(clean: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    Image.open(clean).save(folder / "a.jpg")
    Image.open(clean).save(folder / "sub" / "b.png")
    (folder / "broken.png").write_bytes(clean.read_bytes()[:3000])
    (folder / "notes.txt").write_text("no picture")
    code, said = run(folder, out, "all_in_one_3", 0)
    assert code == 1 and "2 degraded by all_in_one_3, 1 failed" in said and "failed: broken.png: damaged" in said
    made = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert made == ["a.png", "a.png.json", "sub/b.png", "sub/b.png.json"]
    assert json.loads((out / "sub" / "b.png.json").read_text())["key"] == "sub/b.png"
    (folder / "broken.png").unlink()
    assert run(folder, out, "all_in_one_3", 0)[0] == 0
    alone = tmp_path / "alone.png"
    assert run(folder / "a.jpg", alone, "all_in_one_3", 0)[0] == 0
    assert alone.read_bytes() == (out / "a.png").read_bytes()


def test_another_seed_draws_something_else(clean: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(clean, tmp_path / f"{seed}.png", "dynet_pretrain", seed)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()


def test_a_size_that_is_no_multiple_of_the_scale_is_cut(tmp_path: Path) -> None:
    odd = tmp_path / "odd.png"
    Image.fromarray(data.astronaut()[:99, 150:281]).save(odd)
    assert run(odd, tmp_path / "small.png", "bsrgan", 0)[0] == 0
    assert Image.open(tmp_path / "small.png").size == (32, 24)
    replay_file(tmp_path / "small.png.json", odd, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "small.png").read_bytes()
    Image.fromarray(data.astronaut()[:3, :3]).save(tmp_path / "tiny.png")
    code, said = run(tmp_path / "tiny.png", tmp_path / "out.png", "bsrgan", 0)
    assert code == 1 and "smaller than 4x4 pixels, the scale of recipe bsrgan" in said


def test_transparency_depth_of_bits_and_grey_survive(tmp_path: Path) -> None:
    pixels = data.astronaut()[:64, 150:214]
    alpha = np.linspace(0, 255, 64 * 64).reshape(64, 64, 1).astype(np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "alpha.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    for name in ("alpha", "grey"):
        assert run(tmp_path / f"{name}.png", tmp_path / f"{name}-out.tif", "all_in_one_3", 0)[0] == 0
    kept = read_picture(tmp_path / "alpha-out.tif").alpha
    assert kept is not None and np.array_equal(kept, read_picture(tmp_path / "alpha.png").alpha)
    assert read_picture(tmp_path / "grey-out.tif").pixels.shape == (64, 64, 3)


def test_another_picture_of_the_size_is_degraded_with_a_note(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clean, tmp_path / "out.png", "all_in_one_3", 0)
    replay_file(tmp_path / "out.png.json", clean, tmp_path / "again.png")
    assert "note" not in capsys.readouterr().err
    Image.fromarray(data.astronaut()[100:196, 150:278]).save(tmp_path / "other.png")
    replay_file(tmp_path / "out.png.json", tmp_path / "other.png", tmp_path / "again.png")
    assert "other.png has other pixels than what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"meta.json: no JSON"),
        ("[1]", r"meta.json: holds a list; expected the JSON file that `ird degrade IN OUT` writes"),
        ('{"caption": "a cat", "width": 5}', r"meta.json: lacks 'recipe', 'size', 'steps'; expected the JSON file"),
        ('{"recipe": "r", "size": [96], "steps": []}', r"size = \[96\]; expected \[height, width\] in pixels"),
        ('{"recipe": "r", "size": [96, 128], "steps": 5}', r"meta.json: a meta holds no 'steps'"),
        ('{"recipe": "r", "size": [96, 128], "steps": [{"name": "frost"}]}', "unknown step 'frost'"),
        (
            '{"recipe": "r", "size": [96, 128], "steps": [{"name": "jpeg", "quality": 0}]}',
            r"step jpeg: quality = 0: outside the allowed \[1, 100\]",
        ),
        ('{"recipe": "r", "size": [40, 40], "steps": []}', r"clean.png: 96x128 pixels, but .* made from 40x40"),
        (
            '{"key": "k", "recipe": "r", "size": [96, 128], "steps": [{"name": "haze", "depth": "given"}]}',
            "was made with a depth map",
        ),
    ],
)
def test_a_foreign_or_wrong_record_is_refused(clean: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        replay_file(tmp_path / "meta.json", clean, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_refusals_before_any_work(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.json: No such file"):
        replay_file(tmp_path / "absent.json", clean, tmp_path / "out.png")
    with pytest.raises(ConfigError, match=r"absent.png: no such file or folder"):
        run(tmp_path / "absent.png", tmp_path / "out.png", "all_in_one_3", 0)
    with pytest.raises(ConfigError, match=r"out.jpg: must keep the pixels as they are; choose one of .png"):
        run(clean, tmp_path / "out.jpg", "all_in_one_3", 0)
    with pytest.raises(ConfigError, match="is the input itself"):
        run(clean, clean, "all_in_one_3", 0)
    with pytest.raises(ConfigError, match="is the input folder itself"):
        run(tmp_path, tmp_path, "all_in_one_3", 0)
    with pytest.raises(ConfigError, match="unknown recipe 'all_in_one'; did you mean"):
        run(clean, tmp_path / "out.png", "all_in_one", 0)
    Image.open(clean).save(tmp_path / "clean.jpg")
    with pytest.raises(ConfigError, match=r"clean.jpg and clean.png would both become clean.png; rename one"):
        run(tmp_path, tmp_path / "out", "all_in_one_3", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no pictures below it"):
        run(tmp_path / "empty", tmp_path / "out", "all_in_one_3", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.png"], "give IN and OUT, or --gallery OUT"),
        (["in.png", "out.png", "--source", "x.png"], "--source goes with --gallery"),
        (["in.png", "out.png", "--gallery", "g.html"], "--gallery takes no IN"),
        (["in.png", "out.png", "--replay", "m.json", "--recipe", "bsrgan"], "--replay needs no --recipe"),
        (["--gallery", "g.gif"], "g.gif: cannot write .gif; one of .html"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ird", "degrade", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_gallery_of_an_own_picture(clean: Path, tmp_path: Path) -> None:
    gallery(tmp_path / "page.html", clean, "all_in_one_5")
    page = (tmp_path / "page.html").read_text()
    assert "recipe all_in_one_5" in page and "recipe bsrgan" not in page and "<section>" in page
    with pytest.raises(ConfigError, match=r"notes.png: not a picture"):
        (tmp_path / "notes.png").write_text("no picture")
        gallery(tmp_path / "page.html", tmp_path / "notes.png", None)
