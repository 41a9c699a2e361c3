"""EDSR, MDSR and MZSR as networks: their equations, and what each alone must allow."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tests.training import plain
from tests.training.networks import CONFIGS, assert_equals_plain, built, picture
from training.models import EDSRConfig, MDSRConfig, MZSRConfig, scale_of


@pytest.mark.parametrize(("name", "factors"), [("edsr-x2", [2]), ("edsr-x3", [3]), ("edsr-x4", [2, 2])])
def test_edsr_equals_its_equations(name: str, factors: list[int]) -> None:
    config = CONFIGS[name]
    model, x = built(config), picture(config).requires_grad_()
    assert_equals_plain(model, x, model(x), lambda w, image: plain.edsr(w, image, factors, config.residual_scale))


def test_mdsr_and_edsr_configurations_are_checked() -> None:
    with pytest.raises(ValidationError, match="expected 1 value"):
        EDSRConfig(channels=1)
    with pytest.raises(ValidationError, match="each at most once"):
        MDSRConfig(scales=(2, 2))
    with pytest.raises(ValueError, match="'x5'; allowed: x2, x3, x4"):
        scale_of(MDSRConfig(), "x5")


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
