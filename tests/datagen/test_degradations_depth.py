"""The made-up depth is that of a scene: far at the horizon, and its objects end where those of the picture do."""

import pytest
import torch
from skimage import data

from datagen.degradations.depth import procedural_depth

PHOTO = torch.from_numpy(data.astronaut()[:96, 150:278].copy()).permute(2, 0, 1)[None].float() / 255


def depth_of(x: torch.Tensor, seed: int, **changes: float) -> torch.Tensor:
    settings = {"near": 2.0, "far": 20.0, "horizon": 0.2, "relief": 0.3} | changes
    return procedural_depth(x, [seed], **{name: [value] for name, value in settings.items()})


@pytest.mark.parametrize("seed", range(8))
def test_depth_grows_towards_the_horizon(seed: int) -> None:
    depth = depth_of(PHOTO, seed)
    assert depth.shape == (1, 1, 96, 128) and depth.dtype == torch.float32
    assert depth.min() >= 2 and depth.max() <= 20
    rows = depth.mean(dim=(0, 1, 3))
    assert rows[:15].mean() > rows[40:55].mean() > rows[-15:].mean()
    flat = depth_of(PHOTO, seed, relief=0.0)[0, 0]
    assert flat.diff(n=2, dim=0).abs().max() < 0.6, "no edge at the horizon"


def test_objects_end_where_those_of_the_picture_do() -> None:
    """A picture of two halves: depth changes at their border, and more there than anywhere beside it."""
    halves = torch.full((1, 3, 128, 128), 0.2)
    halves[..., 64:] = 0.8
    steps = [depth_of(halves, seed, relief=1.0)[0, 0].diff(dim=1).abs().mean(dim=0) for seed in range(12)]
    across = torch.stack(steps).mean(dim=0)
    assert across[63] > 3 * across[[*range(40, 60), *range(68, 88)]].max()


def test_a_picture_without_contrast_gets_depth_too() -> None:
    depth = depth_of(torch.full((1, 3, 40, 57), 0.5), 3, relief=1.0)
    assert torch.isfinite(depth).all() and depth.std() > 1


@pytest.mark.parametrize("size", [(16, 16), (8, 300), (301, 9)])
def test_any_size_has_depth(size: tuple[int, int]) -> None:
    depth = depth_of(torch.rand(1, 3, *size), 0)
    assert depth.shape[-2:] == size and torch.isfinite(depth).all()


def test_far_before_near_is_refused() -> None:
    with pytest.raises(ValueError, match="far = 1: must not be smaller than near = 2"):
        depth_of(PHOTO, 0, near=2.0, far=1.0)
