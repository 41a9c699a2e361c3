"""What a camera adds: noise, too little light, and eight bits.

Images are (N, C, H, W) float tensors in [0, 1]; each parameter is one number or one a sample. Noise levels
are standard deviations on the 0-255 scale, as in the literature.
"""

from collections.abc import Sequence

from torch import Tensor

from datagen.degradations.checks import Option, Parameter, PerSample, check_images
from datagen.degradations.random import normal_fields, poisson_counts

SIGMA = Parameter("sigma", 0, 255, "standard deviation in grey levels of 0-255")
SHOT = Parameter("shot", 0.1, 255, "standard deviation of the shot noise at white, in grey levels of 0-255")
READ = Parameter("read", 0, 255, "standard deviation of the read noise in grey levels of 0-255", default=0.0)
GREY = Option("grey", (False, True), default=False)
CLIP = Option("clip", (True, False), default=True)
GAIN = Parameter("gain", 0.05, 1, "factor of exposure, before gamma", default=1.0)
SCALE = Parameter("scale", 0.05, 1, "factor of brightness, after gamma", default=1.0)
GAMMA = Parameter("gamma", 1, 6, "exponent")


def gaussian_noise(
    x: Tensor, sigma: PerSample, seed: Sequence[int], *, grey: bool = False, clip: bool = True
) -> Tensor:
    """Additive white Gaussian noise: y = x + n, n ~ N(0, (sigma / 255)^2).

    ``grey``: one field for all channels (the 40 % grey noise of Real-ESRGAN). ``clip``: limit to [0, 1], as
    a sensor saturates; without it the noise has exactly its nominal statistics. One seed a sample.
    Levels 15, 25 and 50 are those of the denoising benchmarks (Zhang et al., DnCNN, TIP 2017).
    """
    check_images(x)
    channels = 1 if grey else x.shape[1]
    noise = normal_fields(seed, (channels, *x.shape[-2:]), like=x).mul_(SIGMA.column(sigma, x) / 255)
    return _limited_sum(x, noise, clip)


def poisson_gaussian_noise(
    x: Tensor, shot: PerSample, seed: Sequence[int], *, read: PerSample = 0.0, grey: bool = False, clip: bool = True
) -> Tensor:
    """Shot and read noise: y = P(x * k) / k + n, variance x / k + (read / 255)^2 (Foi et al., TIP 2008).

    k, the photons counted at white, is (255 / shot)^2, so that ``shot`` is the noise level at white. Real-ESRGAN
    scales a Poisson residual of 2^b levels by s; for 8-bit images (b = 8) the same variance is shot = 15.94 s.
    ``grey``: the shot noise of the mean of the channels is added to all of them. One seed a sample. The gradient of the
    result is that of x. Here and there a GPU counts one photon more or less than a CPU; ``poisson_counts`` says how
    counts are drawn and how close to the true distribution.
    """
    check_images(x)
    photons = (255 / SHOT.column(shot, x)) ** 2
    deviation = READ.column(read, x) / 255
    signal = x.detach().clamp(0, 1)
    if grey:
        signal = signal.mean(dim=1, keepdim=True)
    expected = (signal * photons).float().contiguous()
    counts = poisson_counts(expected, normal_fields(seed, signal.shape[1:], like=expected))
    noise = counts.to(x.dtype).div_(photons).sub_(signal)
    if bool((deviation > 0).any()):
        noise += normal_fields(seed, signal.shape[1:], like=x, stream=1).mul_(deviation)
    return _limited_sum(x, noise, clip)


def speckle_noise(x: Tensor, sigma: PerSample, seed: Sequence[int], *, clip: bool = True) -> Tensor:
    """Multiplicative noise: y = x + x n, n ~ N(0, (sigma / 255)^2); the noise level at white is sigma."""
    check_images(x)
    noise = normal_fields(seed, x.shape[1:], like=x).mul_(SIGMA.column(sigma, x) / 255)
    return _limited_sum(x, x * noise, clip)


def low_light(x: Tensor, gamma: PerSample, *, gain: PerSample = 1.0, scale: PerSample = 1.0) -> Tensor:
    """Too little light: y = scale * (gain * x)^gamma.

    Lv et al. (arXiv 1908.00682) draw gain from 0.9-1, scale from 0.5-1 and gamma from 1.5-5. The noise that comes
    with darkness is a step of its own (``poisson_gaussian_noise``).
    """
    check_images(x)
    exposed = (x.clamp(0, 1) * GAIN.column(gain, x)) ** GAMMA.column(gamma, x)
    return exposed * SCALE.column(scale, x)


def quantise(x: Tensor) -> Tensor:
    """Clip to [0, 1] and round to the 256 levels of an 8-bit image, half to even; stays float."""
    return (x.clamp(0, 1) * 255).round() / 255


def _limited_sum(x: Tensor, noise: Tensor, clip: bool) -> Tensor:
    noisy = x + noise
    return noisy.clamp_(0, 1) if CLIP.check(clip) else noisy
