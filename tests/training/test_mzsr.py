"""Meta-transfer learning and adaptation, against derivatives written out by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from datagen.degradations.kernels import gaussian_kernel, mzsr_kernel
from datagen.degradations.random import generator
from datagen.degradations.resample import imresize
from infra.config import ConfigError, load_config
from tests.support.dataset import REPOSITORY
from training.adaptation import (
    RELEASED,
    Adapted,
    Assumption,
    adapt,
    adapt_many,
    back_project,
    enlarge,
    enlarge_as_ensemble,
    inner_step,
    network_input,
    published_rates,
    shrink_blurred,
)
from training.models import MZSRConfig, build_model
from training.mzsr import MetaConfig, MZSRStageConfig, meta_objective, query_weights

META = REPOSITORY / "configs/training/mzsr_meta_demo.yaml"


def texture(count: int, side: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return imresize(noise, 4).clamp(0, 1)


def test_query_weights_move_to_the_last_step_and_sum_to_one() -> None:
    meta = MetaConfig(inner_steps=5, anneal_steps=100)
    assert query_weights(0, meta) == pytest.approx([0.2] * 5)
    assert query_weights(10_000, meta) == pytest.approx([0.006] * 4 + [0.976])
    lasts = [query_weights(step, meta)[-1] for step in range(120)]
    assert lasts == sorted(lasts) and all(sum(query_weights(s, meta)) == pytest.approx(1) for s in range(120))


def meta_gradient(
    second_order: bool, first_order_steps: int = 0
) -> tuple[torch.Tensor, torch.nn.Module, MZSRStageConfig, torch.Tensor]:
    more = [
        "meta.tasks=1",
        "meta.patches_per_set=2",
        "data.batch=4",
        "meta.inner_steps=1",
        f"meta.second_order={second_order}",
        f"meta.first_order_steps={first_order_steps}",
    ]
    config = load_config(MZSRStageConfig, META, [s.lower() for s in more])
    torch.manual_seed(0)
    model = build_model(config.model).double()
    clean = texture(4, 16).double()
    objective = meta_objective(config)
    loss, metrics = objective(SimpleNamespace(module=model, rank=0), {"clean": clean}, 3)
    loss.backward()
    assert metrics.keys() == {"loss", "loss_before", "loss_adapted"}
    return loss.detach(), model, config, clean


def test_second_order_gradient_equals_finite_differences() -> None:
    """The derivative of (adapt one step, then query loss) along a direction, against central differences."""
    _, model, config, clean = meta_gradient(second_order=True)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    analytic = sum(float((p.grad * direction[n]).sum()) for n, p in model.named_parameters() if p.grad is not None)
    kernel = mzsr_kernel(generator(config.seed, 0, "task:0", 3), config.scale).double()
    enlarged = network_input(shrink_blurred(clean, kernel, 2), 2, Assumption())

    def query_loss(shift: float) -> float:
        weights = {n: (p.detach() + shift * direction[n]).requires_grad_() for n, p in model.named_parameters()}
        adapted, _ = inner_step(model, weights, enlarged[:2], clean[:2], config.meta.inner_lr)
        restored = torch.func.functional_call(model, adapted, (enlarged[2:],))
        return float(functional.l1_loss(restored, clean[2:]).detach())

    # Small enough that no residual of the L1 losses and no ReLU changes its sign in between.
    step = 1e-10
    numeric = (query_loss(step) - query_loss(-step)) / (2 * step)
    assert analytic == pytest.approx(numeric, rel=1e-3)


def test_first_order_is_the_cheaper_other_gradient() -> None:
    second = meta_gradient(second_order=True)
    first = meta_gradient(second_order=False)
    assert first[0] == second[0]
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (first[1], second[1]))
    assert not torch.allclose(a, b) and functional.cosine_similarity(a, b, dim=0) > 0.5


def test_derivative_order_annealing_goes_from_first_to_second_order() -> None:
    """The gradient is taken at step 3."""

    def gradient(second_order: bool, first_order_steps: int = 0) -> torch.Tensor:
        model = meta_gradient(second_order, first_order_steps)[1]
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(True, 4), gradient(False))
    assert torch.equal(gradient(True, 3), gradient(True))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_aligned_input_lies_where_its_pixels_were_kept(scale: int) -> None:
    """Of a ramp, which cubic interpolation keeps: the released alignment is off by (scale - 1) / 2 px."""
    ramp = torch.arange(24.0).expand(1, 3, 24, 24) / 24
    still = torch.zeros(15, 15)
    still[7, 7] = 1
    low = shrink_blurred(ramp, still, scale)
    inner = slice(2 * scale, -3 * scale)
    aligned = (network_input(low, scale, Assumption()) - ramp)[..., inner]
    released = (network_input(low, scale, RELEASED) - ramp)[..., inner]
    assert aligned.abs().max() < 1e-5
    assert torch.allclose(released, torch.tensor(-(scale - 1) / 2 / 24), atol=1e-5)
    bicubic = Assumption("bicubic")
    assert torch.equal(network_input(low, scale, bicubic), imresize(low, scale))


def test_published_rates() -> None:
    assert published_rates(1) == (0.02,)
    assert published_rates(10) == (0.02, 0.01, 0.01, 0.01, *[0.005] * 6)
    assert published_rates(10, scale=4) == (0.01, *[0.005] * 4, *[0.001] * 5)
    assert published_rates(5, subsample="bicubic") == (0.01, 0.01, 0.01, 0.001, 0.001)
    assert published_rates(2, inner_lr=0.05) == pytest.approx((0.1, 0.05))
    for steps in (0, 11):
        with pytest.raises(ValueError, match="1 to 10"):
            published_rates(steps)


@pytest.mark.parametrize("assume", [RELEASED, Assumption(), Assumption("bicubic", noise=5.0)], ids=str)
def test_many_pictures_adapt_as_one_by_one(assume: Assumption) -> None:
    torch.manual_seed(0)
    model = build_model(MZSRConfig(layers=3, features=8))
    pictures = texture(3, 32)
    kernels = torch.stack([gaussian_kernel(15, v, 1.0, 0.3).float() for v in (1.0, 2.0, 4.0)])
    together = adapt_many(model, pictures, kernels, 2, (0.02, 0.01), assume)
    for number, adapted in enumerate(together):
        alone = adapt(model, pictures[number : number + 1], kernels[number], 2, (0.02, 0.01), assume)
        assert adapted.losses == pytest.approx(alone.losses, rel=1e-4)
        assert all(torch.allclose(adapted.weights[n], alone.weights[n], atol=1e-6) for n in alone.weights)


def test_an_adaptation_that_diverged_did_not_help() -> None:
    assert Adapted({}, (0.2, 0.1)).helped
    assert not Adapted({}, (0.2, 0.3)).helped
    assert not Adapted({}, (0.2, float("nan"))).helped
    torch.manual_seed(0)
    model = build_model(MZSRConfig(layers=3, features=8))
    assert not adapt(model, texture(1, 32), gaussian_kernel(15, 2.0, 2.0).float(), 2, [1e6, 1e6]).helped


def test_back_projection_makes_the_shrunken_result_more_like_the_picture() -> None:
    kernel, assume = gaussian_kernel(15, 2.0, 2.0).float(), Assumption()
    low = shrink_blurred(texture(1, 64), kernel, 2)
    restored = network_input(low, 2, assume)

    def off(picture: torch.Tensor) -> float:
        return float((shrink_blurred(picture, kernel, 2) - low).abs().mean())

    errors = [off(back_project(restored, low, kernel, 2, assume, times)) for times in (0, 1, 4)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]


def test_an_ensemble_uses_the_turns_that_its_blur_allows() -> None:
    torch.manual_seed(0)
    model = build_model(MZSRConfig(layers=3, features=8))
    weights, low = dict(model.named_parameters()), texture(1, 32)
    given = network_input(low, 2, Assumption())
    tilted, round_blur = gaussian_kernel(15, 4.0, 1.0, -0.5).float(), gaussian_kernel(15, 2.0, 2.0).float()
    half_turn = model(given.flip(-1, -2)).flip(-1, -2)
    of_two = enlarge_as_ensemble(model, weights, low, tilted, 2, Assumption())
    assert torch.allclose(of_two, ((model(given) + half_turn) / 2).detach(), atol=1e-6)
    of_eight = enlarge_as_ensemble(model, weights, low, round_blur, 2, Assumption())
    turned = enlarge_as_ensemble(model, weights, low.transpose(-1, -2), round_blur, 2, Assumption())
    assert torch.allclose(turned.transpose(-1, -2), of_eight, atol=1e-6)
    with pytest.raises(ValueError, match="alignment=aligned"):
        enlarge_as_ensemble(model, weights, low, round_blur, 2, RELEASED)


def test_adaptation_lowers_its_own_loss_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = build_model(MZSRConfig())
    before = {n: p.clone() for n, p in model.named_parameters()}
    low = texture(1, 32)
    adapted = adapt(model, low, gaussian_kernel(15, 2.0, 2.0).float(), 2, [0.01, 0.01, 0.005])
    assert enlarge(model, adapted.weights, low, 2).shape == (1, 3, 64, 64)
    assert len(adapted.losses) == 4 and adapted.helped
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.batch=12", "meta.tasks x 2 x meta.patches_per_set = 16"),
        ("init_from=''", "init_from"),
        ("data.patch=33", "multiple"),
    ],
)
def test_inconsistent_settings_are_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(MZSRStageConfig, META, [override])
