"""Counts of parameters, operations and kept bytes: those of the published networks."""

import pytest
import torch
from torch import Tensor, nn

from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, MZSRConfig, PromptIRConfig, variants_of
from training.models.cost import count_cost, saved_bytes


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
