"""Benchmarks: inputs that depend on names alone, protocols that cannot be mistaken, the registered pictures."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError
from skimage import data

from datagen.degradations.kernels import EVALUATION_KERNELS, gaussian_kernel, kernel_named
from infra.config import ConfigError
from training.benchmark import (
    BENCHMARKS,
    Benchmark,
    Condition,
    bicubic,
    load_benchmark,
    picture_files,
    pictures_sha256,
    read_clean,
    tasks_of,
)
from training.metrics import PROTOCOLS

PICTURE = np.ascontiguousarray(data.astronaut()[:61, :50])


def put(folder: Path, name: str, picture: np.ndarray = PICTURE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(cv2.imencode(Path(name).suffix, picture[..., ::-1])[1].tobytes())
    return folder


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_registered_benchmark(path: Path, real_data: Path) -> None:
    benchmark = load_benchmark(path.stem)
    assert len(picture_files(benchmark)) == benchmark.pictures


PUBLISHED = [
    ("set5_x2", 33.66, 0.9299),
    ("set5_x3", 30.39, 0.8682),
    ("set5_x4", 28.42, 0.8104),
    ("set5_x2_g_0.2", 30.24, 0.8976),
    ("set5_x2_g_2.0", 28.73, 0.8449),
    ("set5_x2_g_ani", 28.15, 0.8265),
    ("set5_x2_g_1.3", 30.54, 0.8773),
    ("set5_x4_g_2.0", 24.74, 0.7321),
]


@pytest.mark.parametrize(("name", "psnr", "ssim"), PUBLISHED)
def test_published_bicubic_rows(real_data: Path, name: str, psnr: float, ssim: float) -> None:
    """EDSR's table 3, whose LR files at x2 are of an older MATLAB (0.015 dB), and MZSR's tables, to the digit."""
    benchmark = load_benchmark(name)
    ((_, make_input),) = tasks_of(benchmark.condition).items()
    scale, (_, protocol) = benchmark.condition.scale, benchmark.compared_by()
    results = []
    for stem, path in picture_files(benchmark).items():
        clean = read_clean(path, scale)
        results.append(protocol.compare(bicubic(make_input(stem, clean, 0), scale), clean, scale))
    off = 0.021 if name == "set5_x2" else 0.0051
    assert np.mean([r["psnr"] for r in results]) == pytest.approx(psnr, abs=off)
    assert np.mean([r["ssim"] for r in results]) == pytest.approx(ssim, abs=0.0007)


def test_noise_is_drawn_by_the_name() -> None:
    ((task, add_noise),) = tasks_of(Condition(sigma=25)).items()
    first = add_noise("a", PICTURE, 0)
    assert task == "noise_25" and first.dtype == np.uint8
    assert np.array_equal(first, add_noise("a", PICTURE, 0))
    assert not np.array_equal(first, add_noise("b", PICTURE, 0))
    assert not np.array_equal(first, add_noise("a", PICTURE, 1))
    inner = (PICTURE > 80) & (PICTURE < 175)
    assert float((first.astype(float) - PICTURE)[inner].std()) == pytest.approx(25, rel=0.05)


def test_chains_of_a_recipe_are_tasks() -> None:
    assert list(tasks_of(Condition(recipe="all_in_one_3"))) == ["noise_15", "noise_25", "noise_50", "rain", "haze"]
    tasks = tasks_of(Condition(recipe="all_in_one_3", chains=("rain",)))
    assert list(tasks) == ["rain"] and not np.array_equal(tasks["rain"]("a", PICTURE, 0), PICTURE)
    with pytest.raises(ConfigError, match="rian: all_in_one_3 has noise_15"):
        tasks_of(Condition(recipe="all_in_one_3", chains=("rian",)))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_pictures_are_cut_to_the_scale(tmp_path: Path, scale: int) -> None:
    clean = read_clean(put(tmp_path, "a.png") / "a.png", scale)
    assert clean.shape == (61 // scale * scale, 50 // scale * scale, 3)
    for condition in (
        Condition(scale=scale),  # type: ignore[arg-type]
        Condition(scale=scale, kernel="g_ani", subsample="direct", sigma=5),  # type: ignore[arg-type]
    ):
        ((_, make_input),) = tasks_of(condition).items()
        assert make_input("a", clean, 0).shape == (61 // scale, 50 // scale, 3)


def test_a_wrong_protocol_needs_its_name_and_never_another_kind() -> None:
    enlarging = Benchmark(folder="", condition=Condition(scale=2))
    restoring = Benchmark(folder="", condition=Condition(sigma=25))
    assert enlarging.compared_by()[0] == "sr-y" and restoring.compared_by()[0] == "rgb"
    assert PROTOCOLS["sr-y"].y_only and PROTOCOLS["sr-y"].scales == 1
    with pytest.raises(ValidationError, match="expected one of super-resolution: sr-y"):
        Benchmark(folder="", condition=Condition(scale=2), protocol="rgb")
    with pytest.raises(ValidationError, match="expected one of restoration at the same size: rgb, y"):
        Benchmark(folder="", condition=Condition(sigma=25), protocol="sr-y")


def test_protocols_differ_as_they_say() -> None:
    clean = np.ascontiguousarray(data.astronaut()[:64, :64])
    other = clean.copy()
    other[:2] ^= 255
    assert PROTOCOLS["sr-y"].compare(other, clean, 2)["psnr"] == float("inf")
    assert PROTOCOLS["sr-y-whole"].compare(other, clean, 2)["psnr"] < 30
    coloured = np.clip(clean.astype(int) + np.array([6, -3, 0]), 0, 255).astype(np.uint8)
    scores = {name: PROTOCOLS[name].compare(coloured, clean, 2)["psnr"] for name in PROTOCOLS}
    assert scores["sr-y"] > scores["sr-rgb"] + 3
    assert scores["sr-y"] != scores["sr-y-unrounded"]
    assert scores["rgb"] != scores["sr-div2k"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "nothing to restore"),
        ({"kernel": "g_2.0", "sigma": 5}, "need a scale"),
        ({"scale": 2, "recipe": "all_in_one_3"}, "at scale 1"),
        ({"sigma": 5, "chains": ("rain",)}, "need a recipe"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Condition.model_validate(settings)


def test_the_registered_pictures_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(put(tmp_path / "set", "b.png"), "a.png", PICTURE[::-1])
    files = picture_files(Benchmark(folder=str(tmp_path / "set"), condition=Condition(scale=2)))
    assert list(files) == ["a", "b"]
    registered = pictures_sha256(files)
    monkeypatch.setenv("SETS", str(tmp_path))
    settings = {"folder": "$SETS/set", "condition": {"scale": 2}, "pictures": 2, "sha256": registered}
    picture_files(Benchmark.model_validate(settings))
    (tmp_path / "set" / "a.png").unlink()
    put(tmp_path / "set", "a.bmp", PICTURE[::-1])  # other bytes, the same pixels
    picture_files(Benchmark.model_validate(settings))
    put(tmp_path / "set", "a.bmp", np.roll(PICTURE, 1))
    with pytest.raises(ConfigError, match="not the registered pictures"):
        picture_files(Benchmark.model_validate(settings))
    put(tmp_path / "set", "a.png")
    with pytest.raises(ConfigError, match=r"a\.bmp and a\.png have one name"):
        picture_files(Benchmark.model_validate(settings))
    with pytest.raises(ConfigError, match="1 pictures, the benchmark has 2"):
        (tmp_path / "set" / "a.png").unlink()
        (tmp_path / "set" / "a.bmp").unlink()
        picture_files(Benchmark.model_validate(settings))
    with pytest.raises(ConfigError, match="environment variable is not set"):
        picture_files(Benchmark.model_validate(settings | {"folder": "$NOWHERE_AT_ALL/set"}))
    with pytest.raises(ConfigError, match=r"known benchmarks: .*set5_x2"):
        load_benchmark("set6_x2")


def test_blurs_by_what_people_write() -> None:
    assert kernel_named("g_ani") is EVALUATION_KERNELS["g_ani"]
    for text, expected in (("2", (2, 2, 0)), ("4,1", (4, 1, 0)), ("4, 1, -0.5", (4, 1, -0.5))):
        assert (kernel_named(text) == gaussian_kernel(21, *expected)).all()
    for text in ("", "wide", "1,2,3,4"):
        with pytest.raises(ValueError, match="a variance such as"):
            kernel_named(text)
