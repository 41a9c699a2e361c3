"""DyNet's variants: what they share when they run together, and what each may have of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.config import ConfigError, config_hash, load_config
from tests.training.test_models import CONFIGS, Stage, assert_close, built, depths_of, picture
from training.export import load_export, save_export
from training.models import DyNetConfig, build_model
from training.models.cost import count_cost

DYNET = CONFIGS["dynet"]
GAINS_ON = {"variant_gains": True}
GAINS = DYNET.model_copy(update=GAINS_ON)
BRANCHES = ("attention", "feed_forward")


def with_gains(seed: int = 4) -> nn.Module:
    """The network of ``DYNET`` with gains that are no longer 1."""
    model = built(GAINS)
    torch.manual_seed(seed)
    with torch.no_grad():
        for gain in model.gains.parameters():
            gain += 0.3 * torch.randn_like(gain)
    return model.eval()


# Several variants at once


def losses_and_gradients(model: nn.Module, image: Tensor, outputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    image.grad = None
    torch.stack([n * out.float().square().mean() for n, out in enumerate(outputs, start=1)]).sum().backward()
    return {"image": image.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("levels", [(), (1, 2, 3, 4)], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [DYNET, GAINS, CONFIGS["dynet-figure"]], ids=["plain", "gains", "figure"])
def test_variants_together_equal_each_alone(config: DyNetConfig, levels: tuple[int, ...], autocast: bool) -> None:
    model = built(config.model_copy(update={"checkpoint_levels": levels}))
    image = picture(config, 13, 9).requires_grad_()
    # A vector before the variants, one that stops where another does at level 1, and one twice.
    wanted = [[1, 3, 1, 2], "large", "small", [2, 1, 1, 1], "small"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together, alone = model(image, variants=wanted), [model(image, variant) for variant in wanted]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    expected = losses_and_gradients(model, image, alone)
    for name, found in losses_and_gradients(model, image, together).items():
        assert_close(found, expected[name], 1e-2 if autocast else 1e-6)


def test_the_first_level_runs_once_for_all_variants() -> None:
    model, calls = built(DYNET).eval(), dict.fromkeys(("embed", "encoder1", "encoder2", "decoder1"), 0)

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        getattr(model, name).register_forward_hook(count(name))
    with torch.no_grad():
        model(picture(DYNET), variants=["small", "large", [3, 1, 1, 1]])
    assert calls == {"embed": 1, "encoder1": 3, "encoder2": 1 + 2 + 1, "decoder1": 1 + 2 + 3}


def test_variants_are_checked_before_anything_runs() -> None:
    model, image = build_model(DYNET), picture(DYNET)
    with pytest.raises(ValueError, match="variants is empty"):
        model(image, variants=[])
    with pytest.raises(ValueError, match="no variant 'huge'; allowed: small"):
        model(image, variants=["small", "huge"])


# Gains


def test_gains_of_one_change_nothing_and_are_few() -> None:
    plain, gained = built(DYNET).eval(), built(GAINS).eval()
    gained.load_state_dict(plain.state_dict() | {n: w for n, w in gained.state_dict().items() if n.startswith("gains")})
    for variant in depths_of(DYNET):
        with torch.no_grad():
            assert torch.equal(gained(picture(DYNET), variant), plain(picture(DYNET), variant))
    for config in (DyNetConfig(), DyNetConfig(prompts="figure")):
        before, after = (count_cost(c, "large", 64, 64) for c in (config, config.model_copy(update=GAINS_ON)))
        assert after.parameters - before.parameters < 0.001 * before.parameters
        assert (after.convolution_macs, after.attention_macs) == (before.convolution_macs, before.attention_macs)


@pytest.mark.parametrize("variant", ["small", "large"])
def test_gains_scale_what_each_branch_adds(variant: str) -> None:
    """Equal to the network without gains whose two projections are scaled; the other variant's have no say."""
    gained, plain = with_gains(), built(DYNET).eval()
    weights = {name: w.clone() for name, w in gained.state_dict().items() if not name.startswith("gains")}
    for name, own in gained.gains.items():
        for branch in BRANCHES:
            weights[f"{name}.{branch}.project_out.weight"] *= own[f"{variant}_{branch}"].detach().view(-1, 1, 1, 1)
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert_close(gained(picture(DYNET), variant), plain(picture(DYNET), variant), 1e-6)


def test_each_variant_trains_its_own_gains() -> None:
    model = with_gains()
    model(picture(DYNET), "small").square().mean().backward()
    for name, gain in model.gains.named_parameters():
        assert (gain.grad is not None and bool(gain.grad.abs().max() > 0)) == (".small_" in name), name


def test_a_depth_vector_takes_the_gains_of_the_nearest_variant() -> None:
    variants = {"shallow": (1, 1, 1, 1), "wide": (3, 1, 1, 1), "deep": (1, 3, 1, 1), "deepest": (3, 3, 3, 3)}
    model = build_model(GAINS.model_copy(update={"variants": variants}))
    applications = {name: 2 * sum(depth[:3]) + depth[3] for name, depth in variants.items()}
    assert applications == {"shallow": 7, "wide": 11, "deep": 11, "deepest": 21}
    for depth, nearest in {
        (1, 1, 1, 2): "shallow",
        (1, 1, 1, 3): "wide",  # 9, as near to 7 as to 11: the deeper
        (1, 3, 1, 1): "deep",  # 11 as "wide" is, but these very depths
        (1, 1, 3, 1): "wide",
        (3, 2, 2, 2): "deepest",
        (9, 9, 9, 9): "deepest",
    }.items():
        assert model.gains_of(depth) == nearest, depth
    model, image = with_gains().eval(), picture(DYNET)
    with torch.no_grad():
        assert torch.equal(model(image, DYNET.variants["small"]), model(image, "small"))


def test_gains_come_along_in_an_export(tmp_path: Path) -> None:
    model = with_gains()
    save_export(model, GAINS, tmp_path, {})
    loaded, config, _ = load_export(tmp_path)
    assert config == GAINS
    with torch.no_grad():
        assert torch.equal(model(picture(DYNET), "small"), loaded(picture(DYNET), "small"))


def test_a_config_without_gains_reads_as_before_they_were_an_option() -> None:
    assert "variant_gains" not in DyNetConfig().model_dump(mode="json")
    assert config_hash(DyNetConfig()) != config_hash(DyNetConfig(variant_gains=True))
    assert DyNetConfig.model_validate_json(GAINS.model_dump_json(), strict=True) == GAINS
    with pytest.raises(ConfigError, match=r"a name holds no dot, got a\.b"):
        load_config(Stage, None, ["model.name=dynet", "model.variant_gains=true", "model.variants={a.b: [1,1,1,1]}"])
