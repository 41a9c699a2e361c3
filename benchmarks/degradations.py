"""What degradations cost on one CPU core beside plain numpy and OpenCV code, albumentations and imagecorruptions.

    python benchmarks/degradations.py [--rounds 5] [--size 256]

Milliseconds of process CPU time for one 256x256 colour patch, one thread, the least of several rounds in which all take
turns; in brackets, how many times longer the others take. The plain column is what KAIR, BSRGAN and BasicSR do: numpy
random numbers, ``cv2.filter2D``, ``cv2.imencode``; it draws no recorded parameters and cannot replay. The last two
columns need those packages (not dependencies of ird); they take 8-bit pictures, as their users give them.
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from skimage import data

from datagen.degradations import degrade, load_recipe, replay
from datagen.degradations.kernels import gaussian_kernel, motion_kernel

Job = Callable[[int], Any]

STEPS: dict[str, dict[str, Any]] = {
    "gaussian_noise": {"sigma": 25.0, "grey": False, "clip": True, "seed": 0},
    "poisson_gaussian_noise": {"shot": 15.0, "read": 3.0, "grey": False, "clip": True, "seed": 0},
    "gaussian_blur": {"sigma1": 2.0, "sigma2": 1.0, "theta": 0.5, "size": 21, "shape": "gaussian", "beta": 1.0},
    "motion_blur": {"length": 15.0, "angle": 30.0, "wander": 0.0, "size": 19, "seed": 0},
    "defocus_blur": {"radius": 4.0, "size": 9},
    "jpeg": {"quality": 50, "subsampling": "4:2:0"},
    "rain": {"density": 0.006, "length": 35.0, "angle": 10.0, "width": 1.5, "opacity": 0.8, "layers": 3, "seed": 0}
    | {"light": 0.95, "veil": 0.0, "airlight": 0.8},
    "snow": {"density": 0.005, "size": 8.0, "angle": 10.0, "drift": 3.0, "opacity": 0.95, "layers": 3, "seed": 0}
    | {"light": 0.95, "veil": 0.0, "airlight": 0.8},
    "haze": {"beta": 1.2, "airlight": 0.9, "near": 0.1, "far": 1.0, "horizon": 0.2, "relief": 0.4, "seed": 0}
    | {"depth": "procedural"},
    "low_light": {"gamma": 2.5, "gain": 0.95, "scale": 0.8},
}
RECIPES = (
    "dynet_pretrain",
    "all_in_one_3",
    "all_in_one_5",
    "composite_weather",
    "mzsr_kernels",
    "bsrgan",
    "real_esrgan",
)


def ours(clean: torch.Tensor, name: str) -> Job:
    def run(number: int) -> Any:
        step = {"name": name, **STEPS[name]}
        step |= {"seed": number} if "seed" in step else {}
        return replay(clean, [{"size": list(clean.shape[-2:]), "steps": [step]}])

    return run


def plain(image: np.ndarray) -> dict[str, Job]:
    """``image``: float32 (H, W, 3) in [0, 1], as KAIR and BasicSR pass pictures on."""
    rng = np.random.default_rng(0)
    height, width, _ = image.shape
    depth = np.linspace(1, 0.1, height, dtype=np.float32)[:, None, None]

    def noise(sigma: float) -> np.ndarray:
        return np.clip(image + rng.normal(0, sigma / 255, image.shape).astype(np.float32), 0, 1)

    def poisson(_: int) -> np.ndarray:
        photons = (255 / 15) ** 2
        counts = rng.poisson(image * photons).astype(np.float32) / photons
        return np.clip(counts + rng.normal(0, 3 / 255, image.shape).astype(np.float32), 0, 1)

    def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
        stored = cv2.imencode(".jpg", np.uint8((picture * 255).round()), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(stored, cv2.IMREAD_COLOR).astype(np.float32) / 255

    def blur(picture: np.ndarray, kernel: torch.Tensor) -> np.ndarray:
        return cv2.filter2D(picture, -1, kernel.float().numpy(), borderType=cv2.BORDER_REFLECT)

    def rain(_: int) -> np.ndarray:
        drops = np.where(rng.random((height, width)) < 0.006, 8.0, 0.0).astype(np.float32)
        streaks = np.clip(blur(drops, motion_kernel(37, 35, 80)), 0, 1)[..., None]
        return image + streaks * (0.95 - image).clip(0)

    def bsrgan(_: int) -> np.ndarray:
        picture = blur(image, gaussian_kernel(21, 4.0, 4.0))
        picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC)
        picture = blur(picture, gaussian_kernel(21, 3.0, 1.0, 0.4))
        picture = np.clip(picture + rng.normal(0, 10 / 255, picture.shape).astype(np.float32), 0, 1)
        picture = cv2.resize(jpeg(picture, 60), (width // 4, height // 4), interpolation=cv2.INTER_CUBIC)
        return jpeg(picture.clip(0, 1), 50)

    return {
        "gaussian_noise": lambda _: noise(25),
        "poisson_gaussian_noise": poisson,
        "gaussian_blur": lambda _: blur(image, gaussian_kernel(21, 4.0, 1.0, 0.5)),
        "motion_blur": lambda _: blur(image, motion_kernel(19, 15, 30)),
        "jpeg": lambda _: jpeg(image, 50),
        "rain": rain,
        "haze": lambda _: image * np.exp(-1.2 * depth) + np.float32(0.9) * (1 - np.exp(-1.2 * depth)),
        "low_light": lambda _: np.float32(0.8) * (np.float32(0.95) * image) ** np.float32(2.5),
        "dynet_pretrain": lambda _: jpeg(noise(25), 50),
        "bsrgan": bsrgan,
    }


def albumentations(image: np.ndarray) -> dict[str, Job]:
    module = _module("albumentations")
    if module is None:
        return {}
    transforms = {
        "gaussian_noise": module.GaussNoise(p=1),
        "poisson_gaussian_noise": module.ISONoise(p=1),
        "gaussian_blur": module.AdvancedBlur(p=1),
        "motion_blur": module.MotionBlur(p=1),
        "defocus_blur": module.Defocus(p=1),
        "jpeg": module.ImageCompression(p=1),
        "rain": module.RandomRain(p=1),
        "snow": module.RandomSnow(method="texture", p=1),
        "haze": module.RandomFog(p=1),
        "low_light": module.RandomGamma(p=1),
    }
    return {name: _transform(transform, image) for name, transform in transforms.items()}


def _transform(transform: Any, image: np.ndarray) -> Job:
    return lambda _: transform(image=image)


def imagecorruptions(image: np.ndarray) -> dict[str, Job]:
    module = _module("imagecorruptions")
    if module is None:
        return {}
    names = {"gaussian_noise": "gaussian_noise", "shot_noise": "poisson_gaussian_noise", "defocus_blur": "defocus_blur"}
    names |= {"gaussian_blur": "gaussian_blur", "motion_blur": "motion_blur", "jpeg_compression": "jpeg"}
    names |= {"snow": "snow", "fog": "haze"}
    return {name: _corruption(module, image, corruption) for corruption, name in names.items()}


def _corruption(module: Any, image: np.ndarray, corruption: str) -> Job:
    return lambda _: module.corrupt(image, corruption_name=corruption, severity=3)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"{name}: not measured ({type(error).__name__}: {error})")
        return None


def least(jobs: dict[tuple[str, str], Job], rounds: int) -> dict[tuple[str, str], float]:
    """The least CPU time of each job in milliseconds, all taking turns; jobs that raise are left out, and said."""
    best: dict[tuple[str, str], float] = {}
    failed: set[tuple[str, str]] = set()
    for turn in range(rounds):
        for name, job in jobs.items():
            if name in failed:
                continue
            try:
                job(turn)
                started, calls = time.process_time(), 0
                while calls < 8 or time.process_time() - started < 0.1:
                    job(100 * turn + calls)
                    calls += 1
            except Exception as error:
                failed.add(name)
                print(f"{name[1]} {name[0]}: not measured ({type(error).__name__}: {error})")
                continue
            best[name] = min(best.get(name, np.inf), 1000 * (time.process_time() - started) / calls)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    side = arguments.size
    picture = np.ascontiguousarray(data.astronaut()[:side, 100 : 100 + side])
    image = picture.astype(np.float32) / 255
    clean = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()

    jobs: dict[tuple[str, str], Job] = {(name, "ird"): ours(clean, name) for name in STEPS}
    for name in RECIPES:
        recipe = load_recipe(name)
        jobs[name, "ird"] = lambda turn, recipe=recipe: degrade(clean, recipe, seed=0, epoch=0, keys=[str(turn)])
    for kind, found in (
        ("plain", plain(image)),
        ("albumentations", albumentations(picture)),
        ("imagecorruptions", imagecorruptions(picture)),
    ):
        jobs |= {(name, kind): job for name, job in found.items()}
    best = least(jobs, arguments.rounds)

    table = Table(title=f"CPU milliseconds for a {side}x{side} patch, one thread (times ird's)")
    for heading in ("step or recipe", "ird", "plain", "albumentations", "imagecorruptions"):
        table.add_column(heading, justify="left" if heading == "step or recipe" else "right")
    for name in (*STEPS, *RECIPES):
        mine = best[name, "ird"]
        cells = [
            f"{best[name, kind]:.2f} ({best[name, kind] / mine:.1f}x)" if (name, kind) in best else ""
            for kind in ("plain", "albumentations", "imagecorruptions")
        ]
        table.add_row(name, f"{mine:.2f}", *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
