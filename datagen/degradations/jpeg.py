"""JPEG compression by the real codec (libjpeg-turbo), not by a model of it."""

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor

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

    ``subsampling`` is that of chroma. The codec runs on the CPU, whatever the device of ``x``, so that the result
    is the same on all. Not differentiable.
    """
    check_images(x, channels=3)
    factor = _SAMPLING_FACTORS[str(SUBSAMPLING.check(subsampling))]
    levels = (x.detach().flip(1).clamp(0, 1) * 255).round().to(torch.uint8)
    images = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    decoded = []
    for image, one in zip(images, QUALITY.check_all(quality, x.shape[0]), strict=True):
        # simplejpeg's encoder takes the fast, less exact DCT below quality 96; OpenCV's, like Pillow's, never does.
        flags = [cv2.IMWRITE_JPEG_QUALITY, int(one), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
        decoded.append(simplejpeg.decode_jpeg(cv2.imencode(".jpg", image, flags)[1]))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(device=x.device, dtype=x.dtype).div_(255)
