"""PSNR and SSIM as the field reports them."""

import numpy as np
from skimage.metrics import structural_similarity

# Y of ITU-R BT.601 as MATLAB's rgb2ycbcr has it, for 8-bit RGB; Y runs from 16 to 235.
_Y_WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255
_Y_OFFSET = 16.0


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """Round float [0, 1] to the 8 bits in which papers compare pictures."""
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def luma(picture: np.ndarray) -> np.ndarray:
    """Y in float64 [H,W], range 16-235, of RGB uint8 [H,W,3] (MATLAB's rgb2ycbcr, without its final rounding)."""
    return picture.astype(np.float64) @ _Y_WEIGHTS + _Y_OFFSET


def compare(restored: np.ndarray, clean: np.ndarray, *, shave: int = 0, y_only: bool = False) -> dict[str, float]:
    """PSNR in dB and SSIM between two RGB uint8 pictures [H,W,3].

    Args:
        shave: border in pixels that is left out; super-resolution uses the scale.
        y_only: compare luma only, the protocol of super-resolution; restoration compares RGB.

    Returns:
        ``{"psnr": dB, "ssim": …}``. PSNR of equal pictures is infinite. SSIM has the Gaussian window
        (11x11, sigma 1.5) and population covariance of Wang et al. 2004, the mean over channels for RGB.

    Raises:
        ValueError: the sizes differ, or they are not uint8.
    """
    if restored.shape != clean.shape or restored.dtype != np.uint8 or clean.dtype != np.uint8:
        raise ValueError(
            "expected two uint8 pictures of one size, "
            f"got {restored.shape} {restored.dtype} and {clean.shape} {clean.dtype}"
        )
    if shave:
        restored, clean = (p[shave:-shave, shave:-shave] for p in (restored, clean))
    a, b = (luma(p) if y_only else p.astype(np.float64) for p in (restored, clean))
    error = float(np.mean((a - b) ** 2))
    psnr = float("inf") if error == 0 else 10 * np.log10(255**2 / error)
    ssim = structural_similarity(
        a,
        b,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=None if y_only else -1,
    )
    return {"psnr": float(psnr), "ssim": float(ssim)}
