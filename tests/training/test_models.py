import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from infra.config import Config, ConfigError, load_config
from tests.training import plain
from training.models import (
    DyNetConfig,
    EDSRConfig,
    MDSRConfig,
    ModelConfig,
    MZSRConfig,
    PromptIRConfig,
    build_model,
    scale_of,
    variants_of,
)
from training.models.blocks import GDFN, MDTA, LayerNorm, PromptBlock, TransformerBlock
from training.models.cost import count_cost, saved_bytes

SMALL_DYNET = {"dim": 8, "prompt_sizes": (16, 8, 4, 2), "variants": {"small": (1, 1, 1, 2), "large": (2, 2, 2, 3)}}
CONFIGS = {
    "dynet": DyNetConfig(**SMALL_DYNET),
    "dynet-figure": DyNetConfig(**SMALL_DYNET, prompts="figure"),
    "dynet-no-prompts": DyNetConfig(**SMALL_DYNET, prompts="none"),
    "dynet-grey": DyNetConfig(**SMALL_DYNET, channels=1, refinement_blocks=0),
    "promptir": PromptIRConfig(dim=8, blocks=(1, 2, 1, 2), prompt_channels=(8, 12, 16), prompt_sizes=(8, 4, 2)),
    "edsr-x2": EDSRConfig(blocks=2, features=8),
    "edsr-x3": EDSRConfig(blocks=2, features=8, scale=3, residual_scale=0.1),
    "edsr-x4": EDSRConfig(blocks=2, features=8, scale=4),
    "edsr-grey": EDSRConfig(blocks=2, features=8, channels=1, mean=(0.5,)),
    "mdsr": MDSRConfig(blocks=2, features=8),
    "mzsr": MZSRConfig(),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def built(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config)


def depths_of(config: ModelConfig) -> tuple[str | list[int], ...]:
    """Every variant, and for DyNet a vector that none of them has."""
    return (*variants_of(config), *([[1, 3, 1, 2]] if isinstance(config, DyNetConfig) else []))


def picture(config: ModelConfig, height: int = 24, width: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, config.channels, height, width, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Largest difference at most ``bound`` of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


# Every model


@every_model
@pytest.mark.parametrize(("height", "width"), [(16, 24), (13, 21), (1, 1), (3, 9)])
def test_any_size_comes_back_at_scale(config: ModelConfig, height: int, width: int) -> None:
    model, image = built(config).eval(), picture(config, height, width)
    for variant in depths_of(config):
        scale = scale_of(config, str(variant))
        with torch.no_grad():
            out = model(image, variant)
        assert out.shape == (2, config.channels, scale * height, scale * width)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@every_model
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model, image = built(config), picture(config)
    for variant in variants_of(config):
        model(image, variant).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


@every_model
def test_variants_differ_and_switch_between_calls(config: ModelConfig) -> None:
    model, image = built(config).eval(), picture(config)
    with torch.no_grad():
        first = [model(image, variant) for variant in variants_of(config)]
        again = [model(image, variant) for variant in reversed(variants_of(config))][::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    for i, one in enumerate(first):
        for other in first[i + 1 :]:
            assert one.shape != other.shape or (one - other).abs().max() > 1e-4


@every_model
def test_a_picture_does_not_depend_on_its_batch(config: ModelConfig) -> None:
    model, image = built(config).eval(), picture(config, batch=3)
    with torch.no_grad():
        together = model(image, variants_of(config)[0])
        alone = model(image[1:2], variants_of(config)[0])
    assert_close(together[1:2], alone, 1e-5)


@every_model
def test_memory_layout_does_not_matter(config: ModelConfig) -> None:
    model, image = built(config).eval(), picture(config)
    strided = torch.stack([image, -image], dim=-1)[..., 0]
    with torch.no_grad():
        expected = model(image, variants_of(config)[0])
        for layout in (image.to(memory_format=torch.channels_last), strided):
            assert_close(model(layout, variants_of(config)[0]), expected, 1e-5)
        assert_close(model.to(memory_format=torch.channels_last)(image, variants_of(config)[0]), expected, 1e-5)


@every_model
def test_bfloat16_autocast_stays_near_float32(config: ModelConfig) -> None:
    model, image = built(config), picture(config)
    for variant in depths_of(config):
        with torch.no_grad():
            expected = model(image, variant)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(image, variant).float()
        out.square().mean().backward()
        assert_close(out.detach(), expected, 0.02)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def outputs_and_gradients(config: ModelConfig, autocast: bool) -> list[Tensor]:
    """Of every variant, through one backward pass over their sum."""
    model, image = built(config), picture(config, 13, 9).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(image, variant) for variant in depths_of(config)]
    torch.stack([weight * out.float().square().mean() for weight, out in enumerate(outputs, start=1)]).sum().backward()
    return [*(out.detach() for out in outputs), image.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", ["dynet", "dynet-figure", "dynet-no-prompts", "promptir"])
@pytest.mark.parametrize(("levels", "autocast"), [((1, 2, 3, 4), False), ((1, 3), True)])
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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_kept_bytes_count_each_storage_once_and_no_weights(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1))
        called = _Called(model)
        # The input, and the ReLU's result, which both it and the convolution behind it keep.
        assert saved_bytes(called, torch.empty(1, 3, 8, 8), "") == 4 * (3 + 5) * 64


class _Called(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, image: Tensor, variant: str) -> Tensor:
        return self.layers(image)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynet", "promptir", "edsr-x2", "mdsr", "mzsr"])
def test_traces_as_one_graph(name: str) -> None:
    """Dynamo sees each variant as one graph without a break; what it captured equals eager."""
    shallow = {
        # Prompts are traced in PromptIR.
        "dynet": {
            "variants": {"small": (1, 1, 1, 1), "large": (1, 1, 1, 2)},
            "refinement_blocks": 0,
            "prompts": "none",
        },
        "promptir": {"blocks": (1, 1, 1, 1), "refinement_blocks": 0},
    }
    config = CONFIGS[name].model_copy(update=shallow.get(name, {}))
    model, image = built(config), picture(config)
    captured = torch.compile(model, backend="eager", fullgraph=True)
    for variant in variants_of(config):
        assert_close(captured(image, variant).detach(), model(image, variant).detach(), 1e-6)
    torch._dynamo.reset()


@every_model
def test_wrong_input_is_refused_with_what_is_allowed(config: ModelConfig) -> None:
    model, variant = build_model(config), variants_of(config)[0]
    other = config.channels + 1
    with pytest.raises(ValueError, match=rf"built for {config.channels} channel\(s\), got {other}"):
        model(torch.rand(1, other, 16, 16), variant)
    with pytest.raises(ValueError, match="expected a batch of pictures"):
        model(torch.rand(config.channels, 16, 16), variant)
    with pytest.raises(ValueError, match=r"torch.uint8; divide 8-bit pictures by 255"):
        model(torch.zeros(1, config.channels, 16, 16, dtype=torch.uint8), variant)
    with pytest.raises(ValueError, match=f"'huge'; allowed: {variant}"):
        model(picture(config), "huge")


# Against the plain equations


def blocks() -> dict[str, tuple[nn.Module, object, int]]:
    torch.manual_seed(0)
    prompt = {"prompt_channels": 12, "length": 5, "size": 5, "heads": 4, "expansion": 2.66}
    return {
        "layer-norm": (LayerNorm(12), plain.layer_norm, 12),
        "mdta-1-head": (MDTA(12, 1), plain.mdta, 12),
        "mdta-4-heads": (MDTA(24, 4), plain.mdta, 24),
        "gdfn": (GDFN(12, 2.66), plain.gdfn, 12),
        "block": (TransformerBlock(24, 2, 2.66), plain.transformer_block, 24),
        "prompt-block": (PromptBlock(12, 6, **prompt), plain.prompt_block, 12),
        "smoothed-prompt-block": (PromptBlock(12, 6, **prompt, smooth=True), plain.prompt_block, 12),
    }


def assert_equals_plain(model: nn.Module, x: Tensor, found: Tensor, expected_of: object, bound: float = 1e-5) -> None:
    """Output and every gradient, each relative to its largest value."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = expected_of(weights, reference)
    assert_close(found.detach(), expected.detach(), bound)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad}
    for name, gradient in gradients.items():
        target = reference.grad if name == "input" else weights[name].grad
        assert (gradient - target).abs().max() <= bound * target.abs().max(), name


@pytest.mark.parametrize("name", blocks())
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("size", [(8, 6), (5, 7), (1, 1)], ids=str)
def test_block_equals_its_equations(name: str, layout: torch.memory_format, size: tuple[int, int]) -> None:
    block, reference, channels = blocks()[name]
    with torch.no_grad():
        for p in block.parameters():
            p += 0.2 * torch.randn_like(p)  # temperatures and norms start at 1 and 0, which hides mistakes
    x = torch.randn(2, channels, *size).to(memory_format=layout)
    if size == (1, 1):
        # At a single pixel every cosine is 1 or -1 whatever the query, and float32 leaves of its slope only rounding.
        x, block = x.double(), block.double()
    x.requires_grad_()
    assert_equals_plain(block, x, block(x), reference, 1e-9 if size == (1, 1) else 1e-5)


def test_a_block_compiles_as_one_graph_forward_and_backward() -> None:
    """The block is the unit to compile: every variant repeats it. aot_eager leaves out only the code generation."""
    block, reference, channels = blocks()["block"]
    x = torch.randn(2, channels, 8, 6, requires_grad=True)
    assert_equals_plain(block, x, torch.compile(block, backend="aot_eager", fullgraph=True)(x), reference)


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


@pytest.mark.parametrize(("name", "factors"), [("edsr-x2", [2]), ("edsr-x3", [3]), ("edsr-x4", [2, 2])])
def test_edsr_equals_its_equations(name: str, factors: list[int]) -> None:
    config = CONFIGS[name]
    model, x = built(config), picture(config).requires_grad_()
    assert_equals_plain(model, x, model(x), lambda w, image: plain.edsr(w, image, factors, config.residual_scale))


def test_published_promptir_is_dynet_large_with_unshared_blocks() -> None:
    """Made to share, and with prompts that stand elsewhere taken out of the comparison, its trunk is DyNet's."""
    dynet = CONFIGS["dynet"]
    config = PromptIRConfig(
        dim=8,
        blocks=dynet.variants["large"],
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


# Published counts


@pytest.mark.parametrize(
    ("config", "variant", "parameters", "convolution_gflops", "gflops"),
    [
        # 16.726 M and 35.592 M in the released codes, of which 0.113 M and 0.215 M are never used.
        (DyNetConfig(), "large", 16_726_031 - 112_896, 242.15, 264.46),
        (DyNetConfig(), "small", 16_726_031 - 112_896, 166.25, 181.61),
        (PromptIRConfig(), "default", 35_592_263 - 215_296, 242.15, 264.46),
    ],
    ids=["dynet-large", "dynet-small", "promptir"],
)
def test_restoration_costs_are_the_published_ones(
    config: ModelConfig, variant: str, parameters: int, convolution_gflops: float, gflops: float
) -> None:
    cost = count_cost(config, variant, 224, 224)
    assert cost.parameters == parameters
    assert round(2 * cost.convolution_macs / 1e9, 2) == convolution_gflops
    assert round(2 * cost.macs / 1e9, 2) == gflops


@pytest.mark.parametrize(
    ("config", "parameters", "gmacs"),
    [
        (EDSRConfig(scale=2), 1_369_859, 3.16),
        (EDSRConfig(scale=3), 1_554_499, 3.61),
        (EDSRConfig(scale=4), 1_517_571, 4.57),
        (EDSRConfig(scale=2, blocks=32, features=256, residual_scale=0.1), 40_729_603, 93.8),
        (EDSRConfig(scale=3, blocks=32, features=256, residual_scale=0.1), 43_680_003, 100.7),
        (EDSRConfig(scale=4, blocks=32, features=256, residual_scale=0.1), 43_089_923, 115.8),
        (MDSRConfig(), 3_227_203, None),
        (MDSRConfig(blocks=80), 7_953_987, None),
        (MZSRConfig(), 225_091, None),
    ],
)
def test_super_resolution_costs_are_the_published_ones(
    config: ModelConfig, parameters: int, gmacs: float | None
) -> None:
    cost = count_cost(config, variants_of(config)[0], 48, 48)
    assert cost.parameters == parameters
    assert cost.attention_macs == 0
    if gmacs is not None:
        assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.051 if gmacs > 10 else 0.0051)


def test_mzsr_costs_what_its_paper_says() -> None:
    assert count_cost(MZSRConfig(), "default", 512, 512).macs / 1e9 == pytest.approx(58.9, abs=0.05)


# DyNet's variants and configuration


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
    with pytest.raises(ValueError, match=r"small = \[1, 1, 1, 2\], large = \[2, 2, 2, 3\], or four whole numbers"):
        model(picture(CONFIGS["dynet"]), depth)


class Stage(Config):
    model: ModelConfig


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


def test_mdsr_and_edsr_configurations_are_checked() -> None:
    with pytest.raises(ValidationError, match="expected 1 value"):
        EDSRConfig(channels=1)
    with pytest.raises(ValidationError, match="each at most once"):
        MDSRConfig(scales=(2, 2))
    with pytest.raises(ValueError, match="'x5'; allowed: x2, x3, x4"):
        scale_of(MDSRConfig(), "x5")


# Super-resolution networks


def test_mdsr_leaves_idle_scales_alone() -> None:
    config = CONFIGS["mdsr"]
    model = built(config)
    model(picture(config), "x3").mean().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    own = {name for name, _ in model.named_parameters() if ".x" not in name or ".x3." in name}
    assert touched == own


def test_edsr_with_silent_convolutions_gives_the_mean_colour() -> None:
    model = built(CONFIGS["edsr-x2"])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        out = model(picture(CONFIGS["edsr-x2"]))
    for channel, mean in enumerate((0.4488, 0.4371, 0.4040)):
        assert torch.allclose(out[:, channel], torch.tensor(mean))


def test_mzsr_meta_gradient_equals_finite_differences() -> None:
    """The gradient through an inner gradient step, which first-order code gets wrong."""
    config = MZSRConfig(layers=3, features=6)
    model = built(config).double()
    support, query = picture(config).double(), picture(config, 16, 24).double()

    def outer(weights: dict[str, Tensor], second_order: bool = True) -> Tensor:
        inner = (functional_call(model, weights, (support,)) - support.flip(0)).square().mean()
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=second_order)
        stepped = {name: w - 0.5 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
        return (functional_call(model, stepped, (query,)) - query.flip(0)).square().mean()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    meta = torch.autograd.grad(outer(weights), list(weights.values()))
    first_order = torch.autograd.grad(outer(weights, second_order=False), list(weights.values()))
    name, index, step = "layers.1.weight", (2, 3, 1, 1), 1e-5
    position = list(weights).index(name)
    ends = []
    for sign in (1, -1):
        moved = {n: w.detach().clone() for n, w in weights.items()}
        moved[name][index] += sign * step
        ends.append(outer({n: w.requires_grad_() for n, w in moved.items()}).item())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert meta[position][index].item() == pytest.approx(slope, rel=1e-5)
    assert first_order[position][index].item() != pytest.approx(slope, rel=1e-3)


def test_mzsr_adapts_many_pictures_at_once() -> None:
    """vmap over one set of weights a picture, as batched adaptation does."""
    config = MZSRConfig(layers=3, features=6)
    model, images = built(config), picture(config, batch=3)

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return (functional_call(model, weights, (image[None],)) - 0.5).abs().mean()

    weights = {n: torch.stack([p.detach() * k for k in (1, 2, 3)]) for n, p in model.named_parameters()}
    together = vmap(grad(loss))(weights, images)
    alone = grad(loss)({n: w[2] for n, w in weights.items()}, images[2])
    for name, gradient in alone.items():
        assert torch.allclose(together[name][2], gradient, atol=1e-6), name


def test_models_can_be_copied_for_an_average() -> None:
    """Weight averaging deep-copies a network; the copy must not share weights with it."""
    model = built(CONFIGS["dynet"])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("weight"))
