"""What every network must do, over one table of them. What is a network's own is tested in a file of its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.networks import CONFIGS, assert_close, built, depths_of, every_model, picture
from training.export import load_export, save_export
from training.models import ModelConfig, build_model, compile_blocks, scale_of, variants_of

# How many shapes the repeated blocks have. DyNet, PromptIR: levels 1 to 3 and the latent, level 1 of the decoder (the
# refinement's too, which has no gains), and the prompt blocks.
GRAPHS = {"dynet": 8, "dynet-no-prompts": 5, "dynet-gains": 9, "promptir": 8}
GRAPHS |= {"edsr-x2": 1, "mdsr": 2, "mzsr": 0}


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
    """Outputs within 2 % of the largest value; gradients of all weights together within 20 % of their length.

    Random networks this narrow have gradients that nearly cancel; ``test_blocks.py`` has the bound of a block.
    """
    model, image = built(config), picture(config)
    for variant in depths_of(config):
        slopes, outputs = [], []
        for autocast in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(image, variant).float()
            (out - image.mean()).square().mean().backward()
            outputs.append(out.detach())
            given = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(slope.dtype == torch.float32 for slope in given)
            slopes.append(torch.cat([slope.flatten() for slope in given]))
        assert_close(outputs[1], outputs[0], 0.02)
        assert (slopes[1] - slopes[0]).norm() <= 0.2 * slopes[0].norm()


@pytest.mark.parametrize("name", GRAPHS)
def test_compiled_blocks_compute_the_same_and_no_variant_compiles_anew(name: str) -> None:
    """A network has one graph for each shape of its blocks, made by the first variant that is called."""
    config = CONFIGS[name]
    torch._dynamo.reset()
    model, image, counted = built(config), picture(config), Counting()
    names, steps = list(model.state_dict()), {}
    for variant in depths_of(config):
        steps[str(variant)] = outputs_and_gradients(model, image, variant)
    compile_blocks(model, backend=counted)
    assert list(model.state_dict()) == names
    for variant in depths_of(config):
        for found, expected in zip(outputs_and_gradients(model, image, variant), steps[str(variant)], strict=True):
            assert_close(found, expected, 1e-5)
        assert counted.graphs == GRAPHS[name]
    torch._dynamo.reset()


def outputs_and_gradients(model: nn.Module, image: Tensor, variant: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(image, variant)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Counting:
    """A backend that runs a graph as it was captured, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        self.graphs += 1
        return module.forward


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


@every_model
def test_an_export_is_bit_equal(config: ModelConfig, tmp_path: Path) -> None:
    model = built(config).eval()
    facts = {"run_id": "a1", "step": 7, "nested": {"psnr": 31.5, "none": None}}
    save_export(model, config, tmp_path / "export", facts)
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == ["config.json", "model.safetensors"]

    loaded, loaded_config, metadata = load_export(tmp_path / "export")
    assert (loaded_config, metadata, loaded.training) == (config, facts, False)
    for (name, w), (loaded_name, loaded_w) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == loaded_name
        assert torch.equal(w, loaded_w)
    with torch.no_grad():
        for variant in variants_of(config):
            assert torch.equal(model(picture(config), variant), loaded(picture(config), variant))


@every_model
def test_training_goes_on_from_a_checkpoint_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    """Each variant is trained a step before and a step after; the resumed twin begins with other weights."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for variant in variants_of(config):
            optimizer.zero_grad()
            model(picture(config), variant).square().mean().backward()
            optimizer.step()

    model = built(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(model, optimizer)

    torch.manual_seed(7)
    twin = build_model(config)
    its_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    twin.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    steps(twin, its_optimizer)
    for (name, expected), found in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected), name


@every_model
def test_a_copy_shares_no_weights(config: ModelConfig) -> None:
    """Weight averaging deep-copies a network."""
    model = built(config)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("weight"))
