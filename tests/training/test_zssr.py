"""ZSSR on one small picture."""

import pytest
import torch

from datagen.degradations.kernels import gaussian_kernel
from datagen.degradations.resample import imresize
from tests.training.test_mzsr import texture
from training.adaptation import RELEASED, Assumption, network_input, shrink_blurred
from training.models import MZSRConfig
from training.zssr import ZSSROptions, _is_flat, zssr

SMALL = MZSRConfig(layers=4, features=16)


def test_one_picture_is_learnt_and_enlarged_beyond_cubic_interpolation() -> None:
    clean = imresize(texture(1, 32), 2).clamp(0, 1)
    kernel = gaussian_kernel(15, 2.0, 2.0).float()
    low = shrink_blurred(clean, kernel, 2)
    options = ZSSROptions(steps=150, crop=32)
    trained = zssr(low, kernel, 2, options, network=SMALL)
    assert trained.picture.shape == clean.shape and trained.steps == 150

    def error(picture: torch.Tensor) -> float:
        return float((picture - clean)[..., 4:-4, 4:-4].abs().mean())

    assert error(trained.picture) < 0.8 * error(network_input(low, 2, Assumption()))
    again = zssr(low, kernel, 2, options, network=SMALL)
    assert torch.equal(again.picture, trained.picture)
    assert again.losses == trained.losses


def test_the_released_alignment_and_bicubic_run_too() -> None:
    low, kernel = texture(1, 16), gaussian_kernel(15, 2.0, 1.0, 0.4).float()
    for assume in (RELEASED, Assumption("bicubic")):
        trained = zssr(low, kernel, 2, ZSSROptions(steps=2), assume, SMALL)
        assert trained.picture.shape == (1, 3, 32, 32)


def test_the_rate_falls_when_progress_is_lost_in_noise() -> None:
    noise = torch.rand(256, generator=torch.Generator().manual_seed(0)).tolist()
    assert _is_flat(noise)
    assert not _is_flat([value * 0.1 + (256 - step) / 256 for step, value in enumerate(noise)])
    assert _is_flat([step / 256 + value for step, value in enumerate(noise)])
    with pytest.raises(ValueError, match="greater than 0"):
        ZSSROptions(steps=0)
