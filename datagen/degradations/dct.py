"""JPEG as arithmetic on whole batches, on any device: what libjpeg does to pixels, without the file in between.

The lossy steps of ITU-T T.81: colour conversion, subsampling, DCT, rounding by the quantisation tables, and all of it
backwards. Entropy coding loses nothing and is left out. libjpeg computes with fixed-point integers; they stand here as
float64, which holds every one of them exactly, on every device, and which neither autocast nor TF32 touches.
Constants and rounding are those of libjpeg's accurate integer DCT (Loeffler, Ligtenberg and Moschytz, ICASSP 1989).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datagen.picture.jpeg import LUMA_TABLE, scaled_tables

SUBSAMPLINGS = {"4:2:0": (2, 2), "4:2:2": (1, 2), "4:4:4": (1, 1)}
"""How many rows and columns of luma share one of chroma."""

_CHROMA_TABLE = np.array(
    (
        (17, 18, 24, 47, 99, 99, 99, 99),
        (18, 21, 26, 66, 99, 99, 99, 99),
        (24, 26, 56, 99, 99, 99, 99, 99),
        (47, 66, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
        (99, 99, 99, 99, 99, 99, 99, 99),
    )
)
"""ITU-T T.81 (1992), table K.2."""
_DCT = (
    (8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363),
    (10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703),
    (9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633),
    (8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437),
    (4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433),
    (2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260),
)
"""One row a frequency, in units of 2^-13; a one-dimensional transform is too large by sqrt(8)."""


def code(levels: Tensor, quality: Sequence[int], subsampling: str) -> Tensor:
    """Round, encode and decode: (N, 3, H, W) in [0, 255], one quality in 1-100 a sample; returns whole levels, float64.

    Rounding, here and inside, passes gradients on as if it were not there.
    """
    levels = _through(levels, levels.round()).double()
    height, width = levels.shape[-2:]
    rows, columns = SUBSAMPLINGS[subsampling]
    luma, chroma = _to_ycc(levels)
    chroma = _code_blocks(_downsample(chroma, rows, columns), quality, _CHROMA_TABLE)
    chroma = _upsample(chroma[..., : -(-width // columns)], rows, columns)
    return _to_rgb(_code_blocks(luma, quality, LUMA_TABLE), chroma[..., :height, :width])


def _to_ycc(levels: Tensor) -> tuple[Tensor, Tensor]:
    red, green, blue = levels.split(1, dim=1)
    offset = 128 * 65536 + 32767
    luma = _floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)
    blueness = _floor((-11059 * red - 21709 * green + 32768 * blue + offset) / 65536)
    redness = _floor((32768 * red - 27439 * green - 5329 * blue + offset) / 65536)
    return luma, torch.cat((blueness, redness), dim=1)


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    blueness, redness = (chroma - 128).split(1, dim=1)
    red = luma + _floor((91881 * redness + 32768) / 65536)
    green = luma + _floor((-22554 * blueness - 46802 * redness + 32768) / 65536)
    blue = luma + _floor((116130 * blueness + 32768) / 65536)
    return torch.cat((red, green, blue), dim=1).clamp(0, 255)


def _downsample(chroma: Tensor, rows: int, columns: int) -> Tensor:
    if columns == 1:
        return chroma
    # libjpeg widens to whole blocks before, and lengthens to them after: rounding below tells the two apart.
    padded = _extend(chroma, rows, 8 * columns)
    sums = padded[..., ::2] + padded[..., 1::2]
    if rows == 2:
        sums = sums[..., ::2, :] + sums[..., 1::2, :]
    # Halves are rounded down and up in turn from column to column, so that no shade is favoured.
    turn = torch.arange(sums.shape[-1], device=sums.device) % 2 + (rows - 1)
    return _floor((sums + turn) / (rows * columns))


def _upsample(chroma: Tensor, rows: int, columns: int) -> Tensor:
    if columns == 1:
        return chroma
    if chroma.shape[-1] <= 2:  # libjpeg does not interpolate so few
        return chroma.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    rounding = (1, 2)
    if rows == 2:
        above, below = _neighbours(chroma, dim=-2)
        chroma = torch.stack((3 * chroma + above, 3 * chroma + below), dim=-2).flatten(-3, -2)
        rounding = (8, 7)
    left, right = _neighbours(chroma, dim=-1)
    weighed = torch.stack((3 * chroma + left + rounding[0], 3 * chroma + right + rounding[1]), dim=-1).flatten(-2)
    return _floor(weighed / 4**rows)


def _neighbours(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    size = x.shape[dim]
    before = torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)), dim)
    after = torch.cat((x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)), dim)
    return before, after


def _code_blocks(planes: Tensor, quality: Sequence[int], table: np.ndarray) -> Tensor:
    """Through the DCT and back: (N, C, H, W) levels; pads to whole blocks and cuts off again."""
    height, width = planes.shape[-2:]
    padded = _extend(planes, 8, 8)
    count, channels, tall, wide = padded.shape
    blocks = padded.reshape(count, channels, tall // 8, 8, wide // 8, 8).transpose(3, 4) - 128
    dct = planes.new_tensor(_DCT)
    # Frequencies come out transposed, and so are the tables: one transposition serves both directions.
    steps = planes.new_tensor(scaled_tables(table, quality)).mT[:, None, None, None]
    frequencies = _transform(_transform(blocks, dct.T, 11).mT, dct.T, 15)
    scaled = frequencies / (8 * steps)
    quantised = _through(scaled, (scaled + 0.5 * scaled.sign()).trunc())
    restored = _transform(_transform(quantised * steps, dct, 11).mT, dct, 18)
    pixels = (restored + 128).clamp(0, 255).transpose(3, 4).reshape(padded.shape)
    return pixels[..., :height, :width]


def _transform(blocks: Tensor, matrix: Tensor, bits: int) -> Tensor:
    return _floor((blocks.reshape(-1, 8) @ matrix + 2 ** (bits - 1)) / 2**bits).reshape(blocks.shape)


def _extend(x: Tensor, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column until there are multiples of ``rows`` and ``columns``."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


def _floor(x: Tensor) -> Tensor:
    return _through(x, x.floor())


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach() if x.requires_grad else rounded
