"""The eight orientations and the mean over them."""

import pytest
import torch

from datagen.degradations.kernels import gaussian_kernel
from training.ensemble import ORIENTATIONS, orient, orient_back, self_ensemble, symmetries
from training.models import EDSRConfig, build_model


def test_orientations_are_eight_and_undone() -> None:
    image = torch.rand(1, 3, 4, 6)
    seen = {tuple(orient(image, which).flatten().tolist()) for which in ORIENTATIONS}
    assert len(seen) == 8
    assert all(torch.equal(orient_back(orient(image, which), which), image) for which in ORIENTATIONS)


def test_symmetries_of_blurs() -> None:
    assert symmetries(gaussian_kernel(15, 2.0, 2.0)) == list(range(8))
    assert len(symmetries(gaussian_kernel(15, 4.0, 1.0))) == 4
    assert symmetries(gaussian_kernel(15, 4.0, 1.0, 0.4)) == [0, 2]


@torch.no_grad()
def test_an_ensemble_treats_all_orientations_alike() -> None:
    torch.manual_seed(0)
    model = build_model(EDSRConfig(blocks=1, features=8))
    image = torch.rand(1, 3, 9, 7)
    together = self_ensemble(model, image)
    expected = torch.stack([orient_back(model(orient(image, w)), w) for w in ORIENTATIONS]).mean(0)
    assert torch.allclose(together, expected, atol=1e-6)
    for which in ORIENTATIONS:
        turned = self_ensemble(model, orient(image, which))
        assert torch.allclose(turned, orient(together, which), atol=1e-6)
    assert not torch.allclose(model(orient(image, 1)), orient(model(image), 1), atol=1e-3)


@pytest.mark.parametrize("which", ORIENTATIONS)
def test_any_leading_dimensions(which: int) -> None:
    assert torch.equal(
        orient(torch.arange(6.0).reshape(2, 3), which), orient(torch.arange(6.0).reshape(1, 2, 3), which)[0]
    )
