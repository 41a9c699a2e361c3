"""DyNet against its equations, its configuration, and its variants: together, with gains, checkpointed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infra.config import ConfigError, config_hash, load_config
from tests.training import plain
from tests.training.networks import CONFIGS, Stage, assert_close, assert_equals_plain, built, depths_of, picture
from training.export import load_export, save_export
from training.models import DyNetConfig, ModelConfig, PromptIRConfig, build_model, variants_of
from training.models.cost import count_cost, saved_bytes

DYNET = CONFIGS["dynet"]
GAINS_ON = {"variant_gains": True}
GAINS = CONFIGS["dynet-gains"]
BRANCHES = ("attention", "feed_forward")


# Several variants at once


def losses_and_gradients(model: nn.Module, image: Tensor, outputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    image.grad = None
    torch.stack([n * out.square().mean() for n, out in enumerate(outputs, start=1)]).sum().backward()
    return {"image": image.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "levels", "dtype"),
    [
        (DYNET, (), torch.float64),
        (DYNET, (), torch.float32),
        (DYNET, (), torch.bfloat16),
        (DYNET, (1, 2, 3, 4), torch.float64),
        (GAINS, (1, 3), torch.bfloat16),
        (CONFIGS["dynet-figure"], (), torch.float64),
    ],
    ids=["float64", "float32", "bfloat16", "checkpointed", "gains-checkpointed-bfloat16", "figure"],
)
def test_variants_together_equal_each_alone(config: DyNetConfig, levels: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs bit for bit; gradients of the summed loss but for the order of the sum, hence float64."""
    autocast, bound = dtype == torch.bfloat16, {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
    precision = torch.float32 if autocast else dtype
    model = built(config.model_copy(update={"checkpoint_levels": levels})).to(precision)
    image = picture(config, 13, 9).to(precision).requires_grad_()
    # A vector before the variants, one that stops where another does at level 1, and one twice.
    wanted = [[1, 3, 1, 2], "large", "small", [2, 1, 1, 1], "small"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together, alone = model(image, variants=wanted), [model(image, variant) for variant in wanted]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    expected = losses_and_gradients(model, image, alone)
    for name, found in losses_and_gradients(model, image, together).items():
        assert_close(found, expected[name], bound)


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
    plain, gained = built(DYNET).eval(), build_model(GAINS).eval()
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
    gained, plain = built(GAINS).eval(), built(DYNET).eval()
    weights = {name: w.clone() for name, w in gained.state_dict().items() if not name.startswith("gains")}
    for name, own in gained.gains.items():
        for branch in BRANCHES:
            weights[f"{name}.{branch}.project_out.weight"] *= own[f"{variant}_{branch}"].detach().view(-1, 1, 1, 1)
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert_close(gained(picture(DYNET), variant), plain(picture(DYNET), variant), 1e-6)


def test_each_variant_trains_its_own_gains() -> None:
    model = built(GAINS)
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
    model, image = built(GAINS).eval(), picture(DYNET)
    with torch.no_grad():
        assert torch.equal(model(image, DYNET.variants["small"]), model(image, "small"))


def test_gains_come_along_in_an_export(tmp_path: Path) -> None:
    model = built(GAINS)
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


@pytest.mark.parametrize("name", ["dynet", "dynet-figure", "dynet-no-prompts", "dynet-grey"])
@pytest.mark.parametrize("variant", ["small", "large", [1, 3, 1, 2]], ids=str)
def test_dynet_equals_its_equations(name: str, variant: str | list[int]) -> None:
    """In float64 output and gradients to rounding, so that no difference hides behind it; in float32 the output."""
    config = CONFIGS[name]
    model, image = built(config), picture(config)
    depth = config.variants[variant] if isinstance(variant, str) else variant
    with torch.no_grad():
        assert_close(model(image, variant), plain.dynet(dict(model.named_parameters()), image, depth), 1e-5)
    model, x = model.double(), image.double().requires_grad_()
    assert_equals_plain(model, x, model(x, variant), lambda weights, image: plain.dynet(weights, image, depth), 1e-9)


def test_published_promptir_is_dynet_large_with_unshared_blocks() -> None:
    """Made to share, and with prompts that stand elsewhere taken out of the comparison, its trunk is DyNet's."""
    dynet = CONFIGS["dynet"]
    config = PromptIRConfig(
        dim=8,
        blocks=dynet.variants["large"],
        refinement_blocks=dynet.refinement_blocks,
        prompt_channels=dynet.resolved_prompt_channels[1:],
        prompt_sizes=dynet.prompt_sizes[1:],
    )
    one, other = built(dynet), build_model(config)
    weights = {}
    for name in other.state_dict():
        level, _, rest = name.partition(".")
        shared = level.startswith(("encoder", "decoder", "latent")) and rest
        source = f"{level}.{rest.partition('.')[2]}" if shared else name
        weights[name] = one.state_dict()[source.replace("prompt_decoder", "prompt_skip")]
    other.load_state_dict(weights)
    # Where prompt blocks pass on what comes in, their place makes no difference.
    for model, places in ((one, ("skip3", "skip2")), (other, ("decoder3", "decoder2"))):
        for place in places:
            setattr(model, f"prompt_{place}", nn.Identity())
    image = picture(dynet)
    with torch.no_grad():
        assert_close(other(image), one(image, "large"), 1e-5)


def test_odd_sizes_are_reflected_and_cropped() -> None:
    config = CONFIGS["dynet"]
    model, image = built(config).eval(), picture(config, 13, 21)
    padded = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 3), (0, 3)), mode="reflect"))
    with torch.no_grad():
        assert torch.equal(model(image), model(padded)[..., :13, :21])


def test_every_variant_shares_one_state_dict() -> None:
    one = built(CONFIGS["dynet"]).eval()
    other = build_model(CONFIGS["dynet"].model_copy(update={"variants": {"deep": (3, 3, 3, 3)}})).eval()
    other.load_state_dict(one.state_dict(), strict=True)
    image = picture(CONFIGS["dynet"])
    with torch.no_grad():
        assert torch.equal(other(image, "deep"), one(image, [3, 3, 3, 3]))
        assert torch.equal(one(image, (1, 1, 1, 2)), one(image, "small"))


@pytest.mark.parametrize(
    "depth", [[1, 2, 3], [1, 2, 3, 0], [1, 2, 3, 4, 5], [1.0, 2, 3, 4], [True, 1, 1, 1], []], ids=str
)
def test_bad_depth_vectors_are_refused(depth: list[int]) -> None:
    model = build_model(CONFIGS["dynet"])
    with pytest.raises(ValueError, match=r"small = \[1, 1, 1, 2\], large = \[2, 2, 1, 3\], or four whole numbers"):
        model(picture(CONFIGS["dynet"]), depth)


def outputs_and_gradients(config: ModelConfig, autocast: bool) -> list[Tensor]:
    """Of every variant, through one backward pass over their sum."""
    model, image = built(config), picture(config, 13, 9).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(image, variant) for variant in depths_of(config)]
    torch.stack([weight * out.float().square().mean() for weight, out in enumerate(outputs, start=1)]).sum().backward()
    return [*(out.detach() for out in outputs), image.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("name", "levels", "autocast"),
    [
        ("dynet", (1, 2, 3, 4), False),
        ("dynet-figure", (1, 2, 3), True),
        ("dynet-no-prompts", (1, 3), False),
        ("promptir", (1, 2, 3, 4), True),
    ],
)
def test_checkpointing_keeps_less_and_changes_nothing(name: str, levels: tuple[int, ...], autocast: bool) -> None:
    config = CONFIGS[name]
    checkpointed = type(config)(**config.model_dump(exclude={"checkpoint_levels"}), checkpoint_levels=levels)
    expected = outputs_and_gradients(config, autocast)
    for found, same in zip(outputs_and_gradients(checkpointed, autocast), expected, strict=True):
        assert_close(found, same, 1e-6)

    one, other, image = built(config), built(checkpointed), picture(config)
    variant = variants_of(config)[-1]
    assert saved_bytes(other, image, variant) < 0.6 * saved_bytes(one, image, variant)
    assert saved_bytes(other.eval(), image, variant) == saved_bytes(one.eval(), image, variant)
    other.load_state_dict(one.state_dict(), strict=True)


def test_a_config_without_checkpointing_reads_as_before_it_was_an_option() -> None:
    for config in (DyNetConfig(), PromptIRConfig()):
        assert "checkpoint_levels" not in config.model_dump(mode="json")
        some = config.model_copy(update={"checkpoint_levels": (1, 2)})
        assert type(config).model_validate_json(some.model_dump_json(), strict=True) == some
        assert type(config).model_validate_json(config.model_dump_json(), strict=True) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.dim=7"], "dim"),
        (["model.dim=12", "model.heads=[1,5,4,8]"], "level 2: 5 head"),
        (["model.prompt_channels=[32,63,128,320]"], "prompt at level 2: 4 head"),
        (["model.variants={small: [1,2,3]}"], "variants.small"),
        (["model.variants={small: [1,2,3,0]}"], "greater than 0"),
        (["model.variants={}"], "at least 1 item"),
        (["model.prompts=some"], "'released', 'figure' or 'none'"),
        (["model.checkpoint_levels=[5]"], "checkpoint_levels.0"),
        (["model.checkpoint_levels=[1, 1]"], "each level at most once"),
        (["model.channels=5"], "less than or equal to 4"),
        (["model.dims=12"], "did you mean 'dim'"),
        (["model.name=dinet"], "'dynet'"),
    ],
    ids=str,
)
def test_bad_configuration_is_refused_by_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Stage, None, ["model.name=dynet", *overrides])


@pytest.mark.parametrize("dim", [8, 10, 12, 16, 20, 24, 32, 48])
def test_prompt_sizes_follow_dim(dim: int) -> None:
    config = DyNetConfig(dim=dim, heads=(1, 2, 4, 8))
    for level, (channels, published) in enumerate(
        zip(config.resolved_prompt_channels, (32, 64, 128, 320), strict=True)
    ):
        assert ((dim << level) + channels) % 4 == 0
        assert abs(channels - published * dim / 48) <= 2
