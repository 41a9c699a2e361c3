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
from training.adaptation import adapt, enlarge, inner_step, shrink_blurred
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


def meta_gradient(second_order: bool) -> tuple[torch.Tensor, torch.nn.Module, MZSRStageConfig, torch.Tensor]:
    more = [
        "meta.tasks=1",
        "meta.patches_per_set=2",
        "data.batch=4",
        "meta.inner_steps=1",
        f"meta.second_order={second_order}",
    ]
    config = load_config(MZSRStageConfig, META, [s.lower() for s in more])
    torch.manual_seed(0)
    model = build_model(config.model).double()
    clean = texture(4, 16).double()
    objective = meta_objective(config)
    loss, metrics = objective(SimpleNamespace(module=model, global_rank=0), {"clean": clean}, 3)
    loss.backward()
    assert metrics.keys() == {"loss", "loss_before", "loss_adapted"}
    return loss.detach(), model, config, clean


def test_second_order_gradient_equals_finite_differences() -> None:
    """The derivative of (adapt one step, then query loss) along a direction, against central differences."""
    _, model, config, clean = meta_gradient(second_order=True)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    analytic = sum(float((p.grad * direction[n]).sum()) for n, p in model.named_parameters() if p.grad is not None)
    kernel = mzsr_kernel(generator(config.seed, 0, "task:0", 3), config.scale).double()
    enlarged = imresize(shrink_blurred(clean, kernel, 2), 2)

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
