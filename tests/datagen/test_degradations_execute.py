"""degrade is a pure function of (seed, epoch, key, draw); its meta replays bit for bit; bad input is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

from datagen.degradations import degrade, load_recipe, plan, replay
from datagen.degradations.execute import _in_groups
from datagen.degradations.recipe import RECIPES, Recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PHOTO = torch.from_numpy(data.astronaut()[:96, 150:246].copy()).permute(2, 0, 1).float() / 255
COUNT = 12
CLEAN = torch.stack([PHOTO.roll(9 * i, dims=-1) for i in range(COUNT)])
REAL_ESRGAN = load_recipe("real_esrgan")
KEYS = [f"sample-{i:03d}" for i in range(COUNT)]


def recipe_of(*steps: object, **others: object) -> Recipe:
    return Recipe.model_validate({"name": "test", "chains": [{"steps": list(steps)}]} | others)


@pytest.mark.parametrize("name", NAMES)
def test_batch_composition_and_order_change_nothing(name: str) -> None:
    recipe = load_recipe(name)
    whole, metas = degrade(CLEAN, recipe, seed=3, epoch=1, keys=KEYS)
    order = [7, 2, 11, 0, 5]
    some, some_metas = degrade(CLEAN[order], recipe, seed=3, epoch=1, keys=[KEYS[i] for i in order])
    for position, index in enumerate(order):
        assert some_metas[position] == metas[index]
        assert torch.equal(some[position], whole[index])
    alone, alone_meta = degrade(CLEAN[4:5], recipe, seed=3, epoch=1, keys=KEYS[4:5])
    assert torch.equal(alone[0], whole[4]) and alone_meta[0] == metas[4]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_keeps_the_range_and_replays_from_json(name: str) -> None:
    recipe = load_recipe(name)
    before = CLEAN.clone()
    degraded, metas = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS)
    assert torch.equal(CLEAN, before), "the clean batch was written to"
    assert degraded.shape == (COUNT, 3, 96 // recipe.scale, 96 // recipe.scale)
    assert degraded.dtype == torch.float32 and degraded.min() >= 0 and degraded.max() <= 1
    if recipe.output == "8bit":
        assert torch.allclose(degraded * 255, (degraded * 255).round(), atol=1e-4)
    stored = json.loads(json.dumps(metas))
    assert stored == metas and all(meta["recipe"] == name for meta in stored)
    assert torch.equal(replay(CLEAN, stored), degraded)
    assert torch.equal(replay(CLEAN[3], stored[3]), degraded[3])
    if recipe.scale == 1:
        assert all(not torch.equal(a, b) for a, b in zip(degraded, CLEAN, strict=True))


@pytest.mark.parametrize("size", [(37, 41), (32, 50)])
def test_odd_sizes_are_the_same_bits_in_any_batch(size: tuple[int, int]) -> None:
    """Vectorised functions may round by the place in memory; what is in the batch beside it must not matter."""
    recipe = load_recipe("all_in_one_5")
    clean = CLEAN[:, :, : size[0], : size[1]]
    whole, metas = degrade(clean, recipe, seed=1, epoch=0, keys=KEYS)
    assert {meta["chain"] for meta in metas} == {chain.label for chain in recipe.chains}
    for index, key in enumerate(KEYS):
        assert torch.equal(degrade(clean[index, None], recipe, seed=1, epoch=0, keys=[key])[0][0], whole[index])


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_a_device_do_what_samples_alone_do(name: str) -> None:
    """The path that a GPU takes, on the CPU; rounding to 8 bits may fall to either side, and JPEG may amplify that."""
    recipe = load_recipe(name)
    alone, metas = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS)
    together = torch.stack(_in_groups([meta["steps"] for meta in metas], list(CLEAN), [None] * COUNT))
    assert float((together - alone).abs().mean()) < 1e-4


def test_a_batch_may_cross_the_end_of_an_epoch() -> None:
    recipe = load_recipe("all_in_one_3")
    epochs, draws = [4] * 5 + [5] * 7, [index % 3 for index in range(COUNT)]
    mixed, metas = degrade(CLEAN, recipe, seed=2, epoch=epochs, keys=KEYS, draw=draws)
    for index in (0, 4, 5, 11):
        alone, meta = degrade(
            CLEAN[index, None], recipe, seed=2, epoch=epochs[index], keys=[KEYS[index]], draw=draws[index]
        )
        assert meta == [metas[index]] and torch.equal(alone[0], mixed[index])
    with pytest.raises(ValueError, match="epoch: 5 values for a batch of 12"):
        degrade(CLEAN, recipe, seed=2, epoch=epochs[:5], keys=KEYS)
    with pytest.raises(ValueError, match="draw: 2 values for a batch of 12"):
        degrade(CLEAN, recipe, seed=2, epoch=0, keys=KEYS, draw=[0, 1])


HAZE = {"name": "haze", "beta": 1.2, "airlight": 0.9, "near": 0.2, "far": {"uniform": [1, 2]}}
RAMP = torch.linspace(0, 1, 96).expand(1, 96, 96)


def test_a_given_depth_takes_the_place_of_the_made_up_one() -> None:
    recipe = recipe_of(HAZE, {"name": "gaussian_noise", "sigma": {"uniform": [5, 50]}}, output="float")
    maps = [RAMP if index % 2 else None for index in range(COUNT)]
    hazy, metas = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS, depth=maps)
    without, others = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS)
    for index, (meta, other) in enumerate(zip(metas, others, strict=True)):
        step = meta["steps"][0]
        assert meta["steps"][1] == other["steps"][1], "a depth map changes nothing that is drawn after it"
        if index % 2:
            assert step["depth"] == "given" and not {"seed", "horizon", "relief"} & set(step)
            t = torch.exp(-1.2 * (0.2 + (step["far"] - 0.2) * RAMP))
            alone = replay(CLEAN[index], {"steps": [step]}, RAMP)
            assert torch.allclose(alone, CLEAN[index] * t + 0.9 * (1 - t), atol=1e-6)
        else:
            assert step["depth"] == "procedural" and step["seed"] >= 0 and meta == other
            assert torch.equal(hazy[index], without[index])
    stored = json.loads(json.dumps(metas))
    assert torch.equal(replay(CLEAN, stored, maps), hazy)
    grouped = torch.stack(_in_groups([meta["steps"] for meta in metas], list(CLEAN), maps))
    assert torch.allclose(grouped, hazy, atol=1e-5)
    whole, _ = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS, depth=RAMP.expand(COUNT, -1, -1, -1))
    assert torch.equal(whole[1::2], hazy[1::2])
    with pytest.raises(ValueError, match=r"meta of 'sample-001' was made with a depth map .*: give it as depth"):
        replay(CLEAN, stored)


def test_a_depth_map_follows_the_picture_through_a_resize() -> None:
    recipe = recipe_of({"name": "resize", "factor": 0.5}, HAZE | {"far": 1.2}, {"name": "resize_to_output"})
    hazy, _ = degrade(CLEAN[:1], recipe, seed=0, epoch=0, keys=["k"], depth=RAMP[None])
    contrast = hazy[0].std(dim=(0, 1))
    assert contrast[:20].mean() > 1.5 * contrast[-20:].mean()


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (RAMP[None], "1 depth maps for a batch of 12"),
        ([RAMP * 2] * COUNT, r"a depth map must lie in \[0, 1\], found values from 0 to 2"),
        ([RAMP.where(RAMP < 0.5, torch.nan)] * COUNT, r"a depth map must lie in \[0, 1\], found values from nan"),
        ([RAMP[0]] * COUNT, r"float tensor \(1, 96, 96\) with values in \[0, 1\], got torch.float32 \(96, 96\)"),
        ([RAMP.long()] * COUNT, "got torch.int64"),
        ([RAMP.numpy()] * COUNT, "got ndarray"),
    ],
)
def test_what_is_no_depth_map_is_refused(depth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        degrade(CLEAN, load_recipe("all_in_one_3"), seed=0, epoch=0, keys=KEYS, depth=depth)


def test_a_meta_of_a_picture_of_another_size_is_refused() -> None:
    _, metas = degrade(CLEAN, load_recipe("all_in_one_3"), seed=0, epoch=0, keys=KEYS)
    with pytest.raises(ValueError, match=r"that of a picture of 96x96 pixels \(height x width\), not 96x90"):
        replay(CLEAN[..., :90], metas)


@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    draw=st.integers(0, 64),
    keys=st.lists(st.text(max_size=12), min_size=1, max_size=6, unique=True),
)
@settings(max_examples=40, deadline=None)
def test_plans_depend_on_all_four_coordinates_and_on_nothing_else(
    seed: int, epoch: int, draw: int, keys: list[str]
) -> None:
    def steps(**changes: object) -> list[object]:
        where = {"seed": seed, "epoch": epoch, "draw": draw, "key": keys[0]} | changes
        return plan(REAL_ESRGAN, height=64, width=64, **where)["steps"]  # type: ignore[arg-type]

    assert steps() == steps()
    others = [steps(seed=seed + 1), steps(epoch=epoch + 1), steps(draw=draw + 1), steps(key=keys[0] + "x")]
    others += [steps(key=key) for key in keys[1:]]
    assert steps() not in others


def test_coordinates_do_not_run_into_each_other() -> None:
    recipe = load_recipe("dynet_pretrain")
    a = plan(recipe, seed=1, epoch=11, key="k", height=64, width=64)
    b = plan(recipe, seed=11, epoch=1, key="k", height=64, width=64)
    c = plan(recipe, seed=1, epoch=1, draw=1, key="k", height=64, width=64)
    assert a["steps"] != b["steps"] and b["steps"] != c["steps"]


def test_chains_are_drawn_by_weight_and_steps_by_probability() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "weights",
            "output": "float",
            "chains": [
                {"label": "a", "weight": 3, "steps": [{"name": "quantise", "p": 0.25}]},
                {"label": "b", "weight": 1, "steps": []},
            ],
        }
    )
    metas = [plan(recipe, seed=0, epoch=0, key=str(i), height=8, width=8) for i in range(4000)]
    labels = Counter(meta["chain"] for meta in metas)
    assert labels["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    happened = sum(bool(meta["steps"]) for meta in metas) / labels["a"]
    assert happened == pytest.approx(0.25, abs=0.03)


def test_shuffles_reach_every_order_but_keep_resizes_in_theirs() -> None:
    shuffle = [
        {"name": "resize", "factor": 0.5},
        {"name": "quantise"},
        {"name": "resize_to_output"},
        {"name": "low_light", "gamma": 2},
    ]
    recipe = recipe_of({"shuffle": shuffle}, output="float")
    orders = Counter()
    for i in range(1200):
        steps = plan(recipe, seed=0, epoch=0, key=str(i), height=64, width=64)["steps"]
        assert [step["height"] for step in steps if step["name"] == "resize"] == [32, 64]
        orders[tuple(step["name"] for step in steps)] += 1
    assert len(orders) == 12 and min(orders.values()) > 60


def test_a_default_may_follow_another_parameter() -> None:
    steps = plan(
        recipe_of({"name": "gaussian_blur", "sigma1": {"uniform": [1, 2]}}),
        seed=0,
        epoch=0,
        key="k",
        height=64,
        width=64,
    )["steps"]
    assert steps[0]["sigma2"] == steps[0]["sigma1"]


def test_the_mzsr_recipe_records_a_plain_gaussian_and_halves_the_size() -> None:
    steps = plan(load_recipe("mzsr_kernels"), seed=0, epoch=0, key="k", height=64, width=64)["steps"]
    assert [step["name"] for step in steps] == ["gaussian_blur", "downsample_direct", "clip"]
    assert steps[0]["size"] == 15 and 1 <= steps[0]["sigma2"] ** 2 <= steps[0]["sigma1"] ** 2 <= 5


def test_a_chain_that_misses_the_output_size_is_named() -> None:
    recipe = recipe_of({"name": "resize", "factor": 0.5})
    with pytest.raises(
        ValueError, match=r"recipe test, chain '': ends at 48x48 instead of 96x96; add resize_to_output"
    ):
        degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS)
    with pytest.raises(ValueError, match="recipe bsrgan: 95x96 is no multiple of its scale 4"):
        degrade(CLEAN[..., 1:, :], load_recipe("bsrgan"), seed=0, epoch=0, keys=KEYS)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (CLEAN * 255, ValueError, r"must lie in \[0, 1\], found values from 0 to 2\d+; divide 8-bit images by 255"),
        (CLEAN - 0.01, ValueError, r"must lie in \[0, 1\], found values from -0.01 to 0.9\d+$"),
        (CLEAN.where(CLEAN < 0.9, torch.nan), ValueError, "NaN or infinite"),
        (CLEAN[0], ValueError, r"shape \(N, 3, H, W\), got \(3, 96, 96\)"),
        (CLEAN[:, :1], ValueError, r"shape \(N, 3, H, W\), got \(12, 1, 96, 96\)"),
        (CLEAN[:, :, :0], ValueError, "images are empty"),
        (
            (CLEAN * 255).to(torch.uint8),
            TypeError,
            r"float32 or float64 tensor with values in \[0, 1\], got torch.uint8",
        ),
        (CLEAN.numpy(), TypeError, "got ndarray"),
        (CLEAN[:5], ValueError, "12 keys for a batch of 5"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        degrade(images, load_recipe("dynet_pretrain"), seed=0, epoch=0, keys=KEYS)


def test_values_within_the_tolerance_pass() -> None:
    nearly = CLEAN + torch.where(CLEAN.max() == CLEAN, 5e-5, 0.0)
    degraded, _ = degrade(nearly, load_recipe("all_in_one_3"), seed=0, epoch=0, keys=KEYS)
    assert degraded.max() <= 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"name": "frost"}, "meta names an unknown step 'frost'"),
        ({"name": "resize_to_output"}, "meta names an unknown step 'resize_to_output'"),
        ({"name": "jpeg", "quality": 500}, r"step jpeg: quality = 500: outside the allowed \[1, 100\]"),
        ({"name": "jpeg", "quality": 50, "colour": 1}, "step jpeg: .*unexpected keyword argument 'colour'"),
    ],
)
def test_a_meta_that_cannot_be_replayed_is_refused(step: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(CLEAN[0], {"key": "k", "recipe": "r", "steps": [step]})


def test_a_record_that_is_no_meta_is_refused() -> None:
    with pytest.raises(ValueError, match="a meta holds no 'steps'"):
        replay(CLEAN[0], {"key": "k"})
    with pytest.raises(ValueError, match="2 metas for a batch of 12"):
        replay(CLEAN, [{"steps": []}] * 2)


@pytest.mark.parametrize("size", [16, 20, 36])
@pytest.mark.parametrize("name", NAMES)
def test_small_patches_survive_every_recipe(name: str, size: int) -> None:
    keys = [str(i) for i in range(60)]
    small = CLEAN[:1, :, :size, :size].expand(60, -1, -1, -1)
    degraded, _ = degrade(small, load_recipe(name), seed=0, epoch=0, keys=keys)
    assert torch.isfinite(degraded).all()


def test_a_recipe_may_come_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "chains": [{"steps": [{"name": "gaussian_noise", "sigma": 30}]}]}))
    degraded, metas = degrade(CLEAN, load_recipe(path), seed=0, epoch=0, keys=KEYS)
    assert metas[0]["recipe"] == "own" and metas[0]["steps"][0]["sigma"] == 30.0
    assert float((degraded - CLEAN).std()) == pytest.approx(30 / 255, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_agrees_with_the_cpu(name: str) -> None:
    """Random fields come from the CPU; rounding to 8 bits may fall to either side, and JPEG may amplify that."""
    recipe = load_recipe(name)
    on_cpu, metas = degrade(CLEAN, recipe, seed=0, epoch=0, keys=KEYS)
    on_gpu, gpu_metas = degrade(CLEAN.cuda(), recipe, seed=0, epoch=0, keys=KEYS)
    assert gpu_metas == metas
    assert float((on_gpu.cpu() - on_cpu).abs().mean()) < 1e-3
