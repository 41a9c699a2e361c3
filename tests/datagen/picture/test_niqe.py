import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from scipy import special

from datagen.picture import niqe as module
from datagen.picture.decode import decode, read_header
from datagen.picture.niqe import FEATURES, PATCH, features, fit, fit_shipped, load_model, niqe, save_model
from datagen.picture.quality import luma, measure
from datagen.source.embedded import corpus_files

PHOTOGRAPHS = ("astronaut.png", "camera.png", "china.jpg", "rocket.jpg", "chelsea.png", "coffee.png", "flower.jpg")


def grey(name: str) -> np.ndarray:
    data = (corpus_files("pictures") | corpus_files("held_out"))[name]
    return luma(decode(data, read_header(data, 10**7))[0])


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    there = corpus_files("pictures").keys() | corpus_files("held_out").keys()
    return [grey(name) for name in PHOTOGRAPHS if name in there]


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def noisy(picture: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(picture[..., None], quality, "GRAY"), "GRAY")[..., 0]


@pytest.mark.parametrize(
    ("degrade", "levels"),
    [(blurred, (1, 2, 4)), (noisy, (10, 25, 50)), (compressed, (30, 10))],
    ids=["blur", "noise", "jpeg"],
)
def test_score_rises_with_every_degradation(photographs: list[np.ndarray], degrade, levels) -> None:  # type: ignore[no-untyped-def]
    model = load_model()
    scores = np.array([[niqe(p, model), *(niqe(degrade(p, level), model) for level in levels)] for p in photographs])
    rising = (np.diff(scores, axis=1) > 0).all(axis=1)
    assert rising.sum() >= len(photographs) - 1, scores.round(2)
    assert (scores[:, -1] > scores[:, 0]).all(), scores.round(2)


def test_the_shipped_model_is_what_its_photographs_give(tmp_path: Path) -> None:
    refit = fit_shipped()
    save_model(refit, tmp_path / "first.json")
    save_model(fit_shipped(), tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    shipped = load_model()
    # Another CPU may round the last digits of a float32 sum otherwise.
    np.testing.assert_allclose(refit.mean, shipped.mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(refit.covariance, shipped.covariance, rtol=1e-2, atol=1e-6)
    assert refit.fitted_from == shipped.fitted_from
    assert "CC0" in shipped.fitted_from and "chelsea" not in shipped.fitted_from


def test_a_saved_model_scores_alike(tmp_path: Path) -> None:
    model = fit_shipped()
    save_model(model, tmp_path / "model.json")
    picture = grey("camera.png")
    assert niqe(picture, load_model(tmp_path / "model.json")) == pytest.approx(niqe(picture, model), rel=1e-3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fitted_from": "", "mean": [1], "covariance": [[1]]}'])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_model(path)


def test_features_are_those_of_the_definition() -> None:
    """Written down patch by patch in float64 from the paper's equations."""
    picture = grey("camera.png")[:200, :300]
    found = features(picture)
    assert found.shape == (6, FEATURES)
    for row, (y, x) in zip(found, [(y, x) for y in (0, 96) for x in (0, 96, 192)]):
        np.testing.assert_allclose(row, reference(picture, y, x), rtol=1e-3, atol=5e-4)


def reference(picture: np.ndarray, y: int, x: int) -> list[float]:
    offsets = np.arange(-3, 4)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    values = np.pad(picture.astype(np.float64), 6, mode="edge")
    result: list[float] = []
    for step in (1, 2):
        side, halo = PATCH // step, 6 // step
        top, left = y // step + halo, x // step + halo
        around = values[top - 3 : top + side + 3, left - 3 : left + side + 3]
        views = np.lib.stride_tricks.sliding_window_view(around, (7, 7))
        mean = (views * window).sum(axis=(2, 3))
        deviation = np.sqrt(np.maximum((views**2 * window).sum(axis=(2, 3)) - mean**2, 0))
        normal = (around[3:-3, 3:-3] - mean) / (deviation + 1)
        shape = solve((abs(normal).mean() ** 2) / (normal**2).mean())
        result += [shape, math.sqrt((normal**2).mean() * special.gamma(1 / shape) / special.gamma(3 / shape))]
        for a, b in (
            (normal[:, :-1], normal[:, 1:]),
            (normal[:-1], normal[1:]),
            (normal[:-1, :-1], normal[1:, 1:]),
            (normal[:-1, 1:], normal[1:, :-1]),
        ):
            product = a * b
            left_sigma = math.sqrt((product[product < 0] ** 2).mean())
            right_sigma = math.sqrt((product[product > 0] ** 2).mean())
            ratio = left_sigma / right_sigma
            moments = abs(product).mean() ** 2 / (product**2).mean()
            shape = solve(moments * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2)
            scale = math.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
            mean_of_fit = (right_sigma - left_sigma) * scale * special.gamma(2 / shape) / special.gamma(1 / shape)
            result += [shape, mean_of_fit, left_sigma * scale, right_sigma * scale]
        values = values.reshape(len(values) // 2, 2, -1, 2).mean(axis=(1, 3))
    return result


def solve(moments: float) -> float:
    low, high = 0.2, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        value = special.gamma(2 / middle) ** 2 / (special.gamma(1 / middle) * special.gamma(3 / middle))
        low, high = (middle, high) if value < moments else (low, middle)
    return low


def test_chosen_patches_are_the_sharpest_and_have_the_features_they_have_among_all() -> None:
    picture = blurred(grey("camera.png"), 5)
    picture[128:384, 128:384] = grey("camera.png")[128:384, 128:384]
    everything, chosen = features(picture), features(picture, patches=4)
    where = [int(abs(everything - row).max(axis=1).argmin()) for row in chosen]
    np.testing.assert_allclose(everything[where], chosen, rtol=1e-4, atol=1e-6)
    assert where == sorted(where)
    assert set(where) <= {6, 7, 8, 11, 12, 13, 16, 17, 18}, "the patches that touch the sharp middle"
    np.testing.assert_array_equal(features(picture, 4, measure(picture).cells), chosen)
    gravel = grey("gravel.png")
    np.testing.assert_array_equal(features(gravel, patches=1000), features(gravel))


def test_pictures_that_cannot_be_described_have_no_score() -> None:
    model = load_model()
    noise = np.random.default_rng(0).integers(0, 256, (PATCH * 2, PATCH * 2), dtype=np.uint8)
    assert math.isnan(niqe(noise[:PATCH, : 2 * PATCH - 1], model))  # one patch
    assert math.isnan(niqe(noise[: PATCH - 1], model))  # none
    assert math.isnan(niqe(noise[:16, :16], model))
    assert math.isnan(niqe(np.full((300, 300), 77, dtype=np.uint8), model))
    assert math.isnan(niqe(np.full((300, 300), 77, dtype=np.uint8), model, patches=None))
    assert math.isfinite(niqe(noise[:PATCH], model))
    assert math.isfinite(niqe(np.where(noise < 128, 0, 255).astype(np.uint8), model))


def test_flat_patches_are_left_out() -> None:
    picture = np.full((PATCH * 3, PATCH * 3), 200, dtype=np.uint8)
    picture[:PATCH] = grey("gravel.png")[:PATCH, : PATCH * 3]
    assert len(features(picture)) == 3
    assert np.isfinite(features(picture)).all()


def test_too_few_patches_make_no_model() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([grey("camera.png")])
    with pytest.raises(ValueError, match="0 sharp patches"):
        fit([])


def test_a_patch_does_not_depend_on_the_ones_described_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = grey("camera.png")
    together = features(picture)
    monkeypatch.setattr(module, "_TOGETHER", 1)
    np.testing.assert_allclose(features(picture), together, rtol=1e-4, atol=1e-6)
