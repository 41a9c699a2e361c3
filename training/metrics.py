"""PSNR and SSIM as the field reports them, under protocols that have names."""

from dataclasses import dataclass

import numpy as np
from skimage.metrics import structural_similarity

# Y of ITU-R BT.601 as MATLAB's rgb2ycbcr has it, for 8-bit RGB; Y runs from 16 to 235.
_Y_WEIGHTS = np.array([65.481, 128.553, 24.966]) / 255
_Y_OFFSET = 16.0


@dataclass(frozen=True)
class Protocol:
    """What is compared of two pictures: ``about`` says so to people, ``compare`` has the meaning of the rest."""

    about: str
    enlarges: bool = True  # of super-resolution; the others compare pictures that kept their size
    y_only: bool = False
    round_y: bool = True
    scales: int = 0  # border that is left out: as many times the scale …
    more: int = 0  # … and so many pixels

    def compare(self, restored: np.ndarray, clean: np.ndarray, scale: int) -> dict[str, float]:
        """``compare`` under this protocol."""
        shave = self.scales * scale + self.more
        return compare(restored, clean, shave=shave, y_only=self.y_only, round_y=self.round_y)


PROTOCOLS = {
    "sr-y": Protocol("luma as MATLAB rounds it, border of the scale left out (EDSR, MZSR, …)", y_only=True, scales=1),
    "sr-y-unrounded": Protocol(
        "luma not rounded, border of the scale left out (EDSR's PyTorch code)", y_only=True, round_y=False, scales=1
    ),
    "sr-y-whole": Protocol("luma as MATLAB rounds it, the whole picture", y_only=True),
    "sr-rgb": Protocol("RGB, border of the scale left out (BasicSR's model zoo; 2 dB below sr-y on Set5)", scales=1),
    "sr-div2k": Protocol("RGB, border of the scale + 6 left out (EDSR on DIV2K's validation set)", scales=1, more=6),
    "rgb": Protocol("RGB, the whole picture (denoising, dehazing, all-in-one)", enlarges=False),
    "y": Protocol("luma as MATLAB rounds it, the whole picture (deraining)", enlarges=False, y_only=True),
}
"""The first that suits is the default; another has to be asked for by its name."""


def luma(picture: np.ndarray) -> np.ndarray:
    """Y in float64 [H,W], range 16-235, of RGB uint8 [H,W,3] (MATLAB's rgb2ycbcr, without its final rounding)."""
    return picture.astype(np.float64) @ _Y_WEIGHTS + _Y_OFFSET


def compare(
    restored: np.ndarray, clean: np.ndarray, *, shave: int = 0, y_only: bool = False, round_y: bool = True
) -> dict[str, float]:
    """PSNR in dB and SSIM between two RGB uint8 pictures [H,W,3].

    Args:
        shave: border in pixels that is left out; super-resolution uses the scale.
        y_only: compare luma only, the protocol of super-resolution; restoration compares RGB.
        round_y: round luma to whole levels, as MATLAB's rgb2ycbcr does with 8-bit pictures. EDSR's PyTorch code does
            not, which is worth 0.01 to 0.04 dB.

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
    if y_only and round_y:
        a, b = (np.floor(y + 0.5) for y in (a, b))
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
