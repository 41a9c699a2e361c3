"""JPEG compression: by the real codec (libjpeg-turbo) on the CPU, by its arithmetic in torch on any other device."""

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor

from datagen.degradations import dct
from datagen.degradations.checks import Option, Parameter, PerSample, check_images

QUALITY = Parameter("quality", 1, 100, "IJG quality factor", integer=True)
SUBSAMPLING = Option("subsampling", ("4:2:0", "4:2:2", "4:4:4"), default="4:2:0")

_SAMPLING_FACTORS = {
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
}


def jpeg(x: Tensor, quality: PerSample, *, subsampling: str = "4:2:0") -> Tensor:
    """Round to 8 bits, encode as baseline JPEG, decode: (N, 3, H, W) in [0, 1], one quality or one a sample.

    ``subsampling`` is that of chroma. Images on the CPU go through the codec itself, which has no gradient; on any
    other device ``jpeg_dct`` computes what it would give.
    """
    if x.device.type != "cpu":
        return jpeg_dct(x, quality, subsampling=subsampling)
    check_images(x, channels=3)
    factor = _SAMPLING_FACTORS[str(SUBSAMPLING.check(subsampling))]
    levels = x.detach().clamp(0, 1).mul_(255).round_().to(torch.uint8).numpy()
    decoded = np.empty(levels.shape, dtype=np.uint8)
    for result, (red, green, blue), one in zip(decoded, levels, QUALITY.check_all(quality, x.shape[0]), strict=True):
        # simplejpeg's encoder takes the fast, less exact DCT below quality 96; OpenCV's, like Pillow's, never does.
        flags = [cv2.IMWRITE_JPEG_QUALITY, int(one), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
        file = cv2.imencode(".jpg", cv2.merge((blue, green, red)), flags)[1]
        cv2.split(simplejpeg.decode_jpeg(file), list(result))
    return torch.from_numpy(decoded).to(x.dtype).div_(255)


def jpeg_dct(x: Tensor, quality: PerSample, *, subsampling: str = "4:2:0") -> Tensor:
    """What ``jpeg`` gives, without a codec: arithmetic in torch on any device, all qualities of a batch in one go.

    Equal to the codec in every bit where that was compared: photographs of many sizes, odd ones and single pixels among
    them, at qualities from 1 to 100, all subsamplings. Differentiable: rounding passes the gradient on.
    """
    check_images(x, channels=3)
    qualities = [int(one) for one in QUALITY.check_all(quality, x.shape[0])]
    return dct.code(x.clamp(0, 1) * 255, qualities, str(SUBSAMPLING.check(subsampling))).to(x.dtype) / 255
