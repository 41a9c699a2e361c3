"""Block masks cover exactly the fraction they are asked for."""

import pytest
import torch

from datagen.degradations.mask import block_mask


def test_fractions_of_area_are_exact_and_disjoint() -> None:
    clean, degraded = torch.full((2, 3, 160, 160), 0.25), torch.full((2, 3, 160, 160), 0.75)
    result = block_mask(degraded, clean, [0.3, 0.6], [1, 2], restored=[0.2, 0.4], block=16, fill=0.5)
    shares = [[float((sample == value).float().mean()) for value in (0.5, 0.25, 0.75)] for sample in result]
    assert shares[0] == pytest.approx([0.3, 0.2, 0.5], abs=1e-6)
    assert shares[1] == pytest.approx([0.6, 0.4, 0.0], abs=1e-6)


def test_masks_are_whole_blocks_common_to_all_channels() -> None:
    x = torch.rand(1, 3, 64, 64) * 0.5 + 0.25
    masked = block_mask(x, x, 0.5, [5], block=8) == 0
    assert torch.equal(masked[:, 0], masked[:, 2])
    blocks = masked[0, 0].reshape(8, 8, 8, 8).float().mean(dim=(1, 3))
    assert set(blocks.unique().tolist()) == {0.0, 1.0} and float(blocks.mean()) == 0.5


def test_every_block_is_as_likely_as_any_other() -> None:
    x = torch.ones(400, 1, 32, 32)
    hidden = (block_mask(x, x, 0.25, range(400), block=8) == 0).float().mean(dim=0)[0, ::8, ::8]
    assert (hidden - 0.25).abs().max() < 0.1


def test_cut_blocks_and_limits() -> None:
    x = torch.rand(1, 3, 50, 30)
    assert block_mask(x, x, 0.4, [1], block=16).shape == x.shape
    assert torch.equal(block_mask(x, x, 0.0, [1]), x)
    assert (block_mask(x, x, 1.0, [1]) == 0).all()


def test_refusals() -> None:
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"masked \+ restored = 1.2: outside the allowed \[0, 1\]"):
        block_mask(x, x, 0.7, [1], restored=0.5)
    with pytest.raises(ValueError, match=r"masked = 1.5: outside the allowed \[0, 1\] \(fraction of the blocks"):
        block_mask(x, x, 1.5, [1])
    with pytest.raises(ValueError, match=r"clean is \(1, 3, 16, 16\)"):
        block_mask(x, x[..., :16, :16], 0.5, [1])
