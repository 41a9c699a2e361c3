"""One call for a picture: which blur it takes, and what it does when adaptation goes wrong."""

import pytest
import torch

from datagen.degradations.kernels import EVALUATION_KERNELS, gaussian_kernel
from datagen.degradations.resample import imresize
from tests.training.test_mzsr import texture
from training.adaptation import RELEASED, Assumption, adapt, enlarge, network_input, shrink_blurred
from training.models import MZSR, MZSRConfig
from training.zero_shot import ZeroShotOptions, blur_of, enlarge_zero_shot, trained_for


@pytest.fixture(scope="module")
def model() -> MZSR:
    torch.manual_seed(0)
    return MZSR(MZSRConfig(layers=3, features=8)).eval()


def quiet(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("subsample", ["direct", "bicubic"])
def test_it_is_adapt_and_enlarge(model: MZSR, scale: int, subsample: str) -> None:
    low = texture(1, 64)
    options = ZeroShotOptions(scale=scale, steps=2, kernel="g_2.0", subsample=subsample)  # type: ignore[arg-type]
    made = enlarge_zero_shot(model, low, options, notify=quiet)
    rates = {"direct": {4: (0.01, 0.005)}, "bicubic": {4: (0.01, 0.01), 3: (0.01, 0.01), 2: (0.01, 0.01)}}
    lrs = rates[subsample].get(scale, (0.02, 0.01))
    kernel, assume = EVALUATION_KERNELS["g_2.0"].float(), Assumption(subsample)  # type: ignore[arg-type]
    expected = enlarge(model, adapt(model, low, kernel, scale, lrs, assume).weights, low, scale, assume)
    assert made.shape == (1, 3, 64 * scale, 64 * scale)
    assert torch.equal(made, expected.clamp(0, 1))


def test_which_blur(model: MZSR) -> None:
    low = shrink_blurred(imresize(texture(1, 64), 2).clamp(0, 1), gaussian_kernel(15, 4.0, 4.0).float(), 2)
    assert torch.equal(blur_of(low, ZeroShotOptions()), gaussian_kernel(15, 2.0, 2.0).float())
    assert torch.equal(blur_of(low, ZeroShotOptions(scale=3)), gaussian_kernel(15, 3.0, 3.0).float())
    assert torch.equal(blur_of(low, ZeroShotOptions(kernel="4,1,-0.5")), gaussian_kernel(21, 4.0, 1.0, -0.5).float())
    chosen = blur_of(low, ZeroShotOptions(kernel="0.3; 4.0"))
    assert torch.equal(chosen, gaussian_kernel(21, 4.0, 4.0).float())
    estimated = blur_of(low, ZeroShotOptions(kernel="estimate"))
    assert estimated.shape == (15, 15)
    with pytest.raises(ValueError, match=r"expected g_0\.2"):
        blur_of(low, ZeroShotOptions(kernel="round"))


def test_options_change_the_result(model: MZSR) -> None:
    low = texture(1, 64)
    plain = enlarge_zero_shot(model, low, ZeroShotOptions(steps=1), notify=quiet)
    for more in ({"back_projections": 2}, {"ensemble": True}, {"noise": 10.0}, {"alignment": "released"}):
        other = enlarge_zero_shot(model, low, ZeroShotOptions(steps=1, **more), notify=quiet)  # type: ignore[arg-type]
        assert (other - plain).abs().max() > 1e-4, more


def test_divergence_falls_back_to_the_large_scale_weights_and_then_to_bicubic(model: MZSR) -> None:
    low, said = texture(1, 64), []
    wild = ZeroShotOptions(steps=2, rates=(1e6, 1e6))
    kept_where_they_were = network_input(low, 2, Assumption()).clamp(0, 1)
    assert torch.equal(enlarge_zero_shot(model, low, wild, notify=said.append), kept_where_they_were)
    torch.manual_seed(1)
    other = MZSR(MZSRConfig(layers=3, features=8)).eval()
    made = enlarge_zero_shot(model, low, wild, fallback=other, notify=said.append)
    assert torch.equal(made, enlarge(other, dict(other.named_parameters()), low, 2, Assumption()).clamp(0, 1))
    assert "enlarged by bicubic" in said[0] and "large-scale weights" in said[1]
    assert enlarge_zero_shot(model, low[..., :20, :], wild, notify=said.append).shape == (1, 3, 40, 128)
    assert "too small" in said[2]


def test_what_an_export_was_trained_for() -> None:
    released = {"scale": 2, "subsample": "direct", "alignment": RELEASED.alignment, "inner_lr": 0.01}
    assert trained_for({}) == released
    facts = {"scale": 4, "subsample": "bicubic", "alignment": "aligned", "inner_lr": 0.05}
    assert trained_for({**facts, "stage": "mzsr_meta"}) == facts


def test_rates_are_in_proportion_to_the_meta_training_or_given() -> None:
    assert ZeroShotOptions(steps=2).all_rates == (0.02, 0.01)
    assert ZeroShotOptions(steps=2, inner_lr=0.05).all_rates == pytest.approx((0.1, 0.05))
    assert ZeroShotOptions(steps=2, inner_lr=0.05, rates=(0.3,)).all_rates == (0.3,)
