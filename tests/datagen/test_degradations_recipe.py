"""Recipe files: what is refused and how it is said, and how parameters are drawn."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from datagen.degradations.recipe import RECIPES, Distribution, Recipe, load_recipe
from infra.config import ConfigError, config_hash, dump_config

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def write(folder: Path, *steps: object, **recipe: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "chains": [{"steps": list(steps)}]} | recipe))
    return path


def test_the_published_recipes_are_there() -> None:
    expected = {"dynet_pretrain", "all_in_one_3", "all_in_one_5", "bsrgan", "real_esrgan", "mzsr_kernels"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_file_loads_says_what_it_costs_and_survives_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ") and "# Cost: " in text
    dump_config(recipe, tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe and config_hash(again) == config_hash(recipe)


def test_a_recipe_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("dynet_pretrain").name == "dynet_pretrain"


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'dynet_pretrian'; did you mean 'dynet_pretrain'\? Known: all_in"
    ):
        load_recipe("dynet_pretrian")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "gausian_noise", "sigma": 5}, r"unknown step 'gausian_noise'; did you mean 'gaussian_noise'\?"),
        (
            {"name": "gaussian_noise", "sigm": 5},
            r"unknown parameter 'sigm'; did you mean 'sigma'\? Allowed: sigma, grey, clip",
        ),
        ({"name": "gaussian_noise"}, r"step gaussian_noise: required and not given: sigma: \[0, 255\] \(standard"),
        ({"name": "gaussian_noise", "sigma": 300}, r"step gaussian_noise: sigma = 300: outside the allowed \[0, 255\]"),
        ({"name": "gaussian_noise", "sigma": {"uniform": [5, 400]}}, r"sigma = 400: outside the allowed \[0, 255\]"),
        ({"name": "gaussian_noise", "sigma": {"uniform": [50, 5]}}, r"must be in ascending order, got \[50.0, 5.0\]"),
        ({"name": "gaussian_noise", "sigma": {"log_uniform": [0, 5]}}, r"both ends must be positive"),
        ({"name": "gaussian_noise", "sigma": {"unifrom": [5, 50]}}, r"unifrom: unknown key; did you mean 'uniform'\?"),
        (
            {"name": "gaussian_noise", "sigma": {"uniform": [5, 9], "choice": [1]}},
            r"exactly one of uniform, log_uniform",
        ),
        (
            {"name": "gaussian_noise", "sigma": {"choice": [1, 2], "weights": [1]}},
            r"weights: one for each entry of choice",
        ),
        ({"name": "gaussian_noise", "sigma": 5, "grey": "yes"}, r"grey = 'yes': expected one of False, True"),
        ({"name": "gaussian_noise", "sigma": 5, "p": 1.5}, r"p: Input should be less than or equal to 1, got 1.5"),
        ({"name": "jpeg", "quality": {"integers": [0, 90]}}, r"quality = 0: outside the allowed \[1, 100\] \(IJG"),
        (
            {"name": "jpeg", "quality": {"uniform": [10.5, 90]}},
            r"quality = 10.5: expected a whole number in \[1, 100\]",
        ),
        ({"name": "jpeg", "quality": 50, "subsampling": "4:1:1"}, r"subsampling = '4:1:1': expected one of '4:2:0'"),
        ({"name": "jpeg", "quality": {"uniform": [10, 90]}}, r"quality: draws whole numbers only; use integers"),
        (
            {"name": "gaussian_blur", "sigma1": 1, "size": {"integers": [7, 9]}},
            r"size: draws odd numbers only; use choice",
        ),
        ({"name": "gaussian_blur", "sigma1": 1, "size": 8}, r"size = 8: must be odd"),
    ],
)
def test_bad_steps_are_refused_with_the_place_and_the_range(
    step: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"name": "quantise"}, step)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_recipe(path)
    assert str(path) in str(refusal.value) and "chains.0.steps.1" in str(refusal.value)


def test_bad_recipes_are_refused(tmp_path: Path) -> None:
    step = {"name": "quantise"}
    with pytest.raises(ConfigError, match="output: Input should be 'clipped', '8bit' or 'float', got '9bit'"):
        load_recipe(write(tmp_path, step, output="9bit"))
    with pytest.raises(ConfigError, match="at least one weight must be above 0"):
        load_recipe(write(tmp_path, chains=[{"weight": 0, "steps": [step]}]))
    with pytest.raises(ConfigError, match="chains: List should have at least 1 item"):
        load_recipe(write(tmp_path, chains=[]))
    with pytest.raises(ConfigError, match=r"chain: unknown key; did you mean 'chains'\?"):
        load_recipe(write(tmp_path, step, chain=[]))


@pytest.mark.parametrize(
    ("distribution", "low", "high", "mean"),
    [
        ({"uniform": [10, 30]}, 10, 30, 20),
        ({"log_uniform": [1, 100]}, 1, 100, 99 / np.log(100)),
        ({"integers": [1, 4]}, 1, 4, 2.5),
        ({"choice": [0, 10], "weights": [1, 3]}, 0, 10, 7.5),
        (7, 7, 7, 7),
    ],
)
def test_distributions_draw_what_they_say(distribution: object, low: float, high: float, mean: float) -> None:
    drawn = Distribution.model_validate(distribution)
    rng = np.random.default_rng(0)
    values = np.array([drawn.sample(rng) for _ in range(4000)], dtype=float)
    assert values.min() >= low and values.max() <= high
    assert values.mean() == pytest.approx(mean, rel=0.05)
    if "integers" in str(distribution):
        assert set(values) == {1, 2, 3, 4}


def test_the_dynet_recipe_corrupts_four_fifths_of_the_area() -> None:
    """50 % degraded and 30 % masked, in every chain."""
    recipe: Recipe = load_recipe("dynet_pretrain")
    for chain in recipe.chains:
        mask = chain.model_dump()["steps"][-1]
        assert mask["name"] == "block_mask"
        assert mask["parameters"]["masked"] == {"value": 0.3} and mask["parameters"]["restored"] == {"value": 0.2}
