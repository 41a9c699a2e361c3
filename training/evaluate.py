"""Measure trained exports on held-out pictures: PSNR and SSIM beside the degraded input and bicubic.

Every degradation is keyed by the picture's name, so that a figure does not depend on file order.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pydantic import Field

from datagen.degradations import degrade, load_recipe
from datagen.degradations.kernels import gaussian_kernel
from datagen.degradations.resample import imresize
from datagen.degradations.sensor import quantise
from datagen.picture.region import decode_whole
from infra.config import Config, ConfigError
from infra.files import publish_atomically, write_atomically
from infra.launcher import MARKER, PROGRESS
from infra.tracking import Tracker, TrackingConfig
from training.adaptation import Assumption, adapt, enlarge, shrink_blurred
from training.benchmark import to_batch, to_picture
from training.config import Positive
from training.entry import run_from_command_line
from training.export import load_export
from training.metrics import compare
from training.models import scale_of, variants_of
from training.zero_shot import trained_for


class Restoration(Config):
    """A model that keeps the size, on each chain of a recipe as a task of its own."""

    model: str  # export folder
    recipe: str = "all_in_one_3"


class SuperResolution(Config):
    """A model that enlarges bicubic LR pictures."""

    model: str  # export folder


class Kernel(Config):
    """A Gaussian blur: variances in px^2 along its axes and the angle of the first, in radians."""

    var1: float
    var2: float
    theta: float = 0.0


class ZeroShot(Config):
    """MZSR on LR pictures of an unseen blur: before adaptation, adapted with the true blur, and with a wrong one."""

    model: str  # export folder of the meta-transfer phase
    large_scale: str  # export folder of the large-scale phase, which does not adapt
    scale: Positive = 2
    kernel: Kernel  # what blurs the pictures
    assumed: Kernel  # what is assumed of a photograph whose blur nobody knows
    lrs: tuple[float, ...] = Field(default=(0.02,), min_length=1)  # one a step


class EvaluateConfig(Config):
    """Which exports are measured on which pictures."""

    pictures: str  # folder of held-out pictures
    out: str
    seed: int = 0
    crop: Positive = 256  # the centre of each picture that is measured; bounds the cost
    restoration: Restoration | None = None
    super_resolution: SuperResolution | None = None
    zero_shot: ZeroShot | None = None
    tracking: TrackingConfig = TrackingConfig()


CLEAN = "clean"  # the method name under which the target itself is written

# (task, picture, method, restored or degraded RGB uint8, clean RGB uint8, protocol of ``compare``)
Result = tuple[str, str, str, np.ndarray, np.ndarray, dict[str, Any]]


def evaluate(config: EvaluateConfig) -> int:
    """Write ``results.json`` (one row a task, picture and method) and the pictures themselves below ``out``.

    Raises:
        ConfigError: there is no picture in the folder.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(config.tracking, "evaluate", out)
    tracker.log_params(config.model_dump(mode="json", exclude={"tracking"}))
    rows = []
    for task, picture, method, restored, clean, protocol in _results(config):
        if method != CLEAN:
            rows.append({"task": task, "picture": picture, "method": method, **compare(restored, clean, **protocol)})
        write_picture(out / "pictures" / task / picture / f"{method}.png", restored)
    means = mean_rows(rows)
    for number, row in enumerate(means):
        tracker.log_metrics({f"{m}.{row['task']}.{row['method']}": row[m] for m in ("psnr", "ssim")}, step=number)
        print(
            f"{PROGRESS}{row['task']:<14} {row['method']:<22} PSNR {row['psnr']:6.2f} dB  SSIM {row['ssim']:.4f}",
            flush=True,
        )
    write_atomically(out / "results.json", json.dumps({"rows": rows, "means": means}, indent=2).encode())
    tracker.log_artifact(out / "results.json")
    tracker.finish()
    write_atomically(
        out / MARKER, json.dumps({"run_id": tracker.run_id, "pictures": len({r["picture"] for r in rows})}).encode()
    )
    return 0


def mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean PSNR and SSIM over pictures, one row a (task, method), in order of first appearance."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    return [
        {"task": task, "method": method, "pictures": len(group)}
        | {metric: float(np.mean([row[metric] for row in group])) for metric in ("psnr", "ssim")}
        for (task, method), group in groups.items()
    ]


def read_pictures(folder: Path, crop: int) -> dict[str, torch.Tensor]:
    """Centres of all pictures in a folder, by file name without suffix: float32 [1,3,h,w] in [0, 1].

    h and w are multiples of 12 (of every scale and of the networks' stride), at most ``crop``.

    Raises:
        ConfigError: there is none.
    """
    pictures = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}:
            picture = decode_whole(path.read_bytes())
            height, width = (min(side, crop) // 12 * 12 for side in picture.shape[:2])
            top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
            pictures[path.stem] = to_batch(picture[top : top + height, left : left + width])
    if not pictures:
        raise ConfigError(f"pictures={folder}: no .png, .jpg, .webp, .bmp or .tif picture in this folder")
    return pictures


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Publish RGB uint8 [H,W,3] as PNG."""
    with publish_atomically(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())


def _results(config: EvaluateConfig) -> Iterator[Result]:
    pictures = read_pictures(Path(config.pictures), config.crop)
    sections: list[tuple[Any, Callable[..., Iterator[Result]]]] = [
        (config.restoration, _restoration),
        (config.super_resolution, _super_resolution),
        (config.zero_shot, _zero_shot),
    ]
    for section, measure in sections:
        if section is not None:
            yield from measure(section, pictures, config.seed)


@torch.no_grad()
def _restoration(section: Restoration, pictures: dict[str, torch.Tensor], seed: int) -> Iterator[Result]:
    model, model_config, _ = load_export(Path(section.model))
    recipe = load_recipe(section.recipe)
    for chain in recipe.chains:
        task = chain.label
        for name, clean in pictures.items():
            degraded, _ = degrade(clean, recipe.model_copy(update={"chains": [chain]}), seed=seed, epoch=0, keys=[name])
            target = to_picture(clean)
            yield task, name, CLEAN, target, target, {}
            yield task, name, "degraded", to_picture(degraded), target, {}
            for variant in variants_of(model_config):
                yield task, name, f"dynet-{variant}", to_picture(model(degraded, variant=variant)), target, {}


@torch.no_grad()
def _super_resolution(section: SuperResolution, pictures: dict[str, torch.Tensor], seed: int) -> Iterator[Result]:
    model, model_config, _ = load_export(Path(section.model))
    scale = scale_of(model_config)
    protocol = {"shave": scale, "y_only": True}
    for name, clean in pictures.items():
        low = imresize(clean, 1 / scale, round_to_uint8=True).clamp(0, 1)
        target = to_picture(clean)
        task = f"sr_x{scale}"
        yield task, name, CLEAN, target, target, protocol
        yield task, name, "bicubic", to_picture(imresize(low, scale)), target, protocol
        yield task, name, model_config.name, to_picture(model(low)), target, protocol


def _zero_shot(section: ZeroShot, pictures: dict[str, torch.Tensor], seed: int) -> Iterator[Result]:
    meta, _, facts = load_export(Path(section.model))
    large_scale, _, _ = load_export(Path(section.large_scale))
    before, unadapted = dict(large_scale.named_parameters()), dict(meta.named_parameters())
    scale = section.scale
    trained = trained_for(facts)
    assume = Assumption(trained["subsample"], trained["alignment"])
    kernel, assumed = (gaussian_kernel(15, k.var1, k.var2, k.theta).float() for k in (section.kernel, section.assumed))
    protocol = {"shave": scale, "y_only": True}
    steps = len(section.lrs)
    for name, clean in pictures.items():
        low = quantise(shrink_blurred(clean, kernel, scale, assume.subsample))
        target = to_picture(clean)
        task = f"blind_sr_x{scale}"
        yield task, name, CLEAN, target, target, protocol
        yield task, name, "bicubic", to_picture(imresize(low, scale)), target, protocol
        yield task, name, "large-scale", to_picture(enlarge(large_scale, before, low, scale, assume)), target, protocol
        yield task, name, "mzsr-unadapted", to_picture(enlarge(meta, unadapted, low, scale, assume)), target, protocol
        for method, blur in ((f"mzsr-{steps}step", kernel), (f"mzsr-{steps}step-assumed", assumed)):
            adapted = adapt(meta, low, blur, scale, section.lrs, assume)
            enlarged = enlarge(meta, adapted.weights, low, scale, assume)
            yield task, name, method, to_picture(enlarged), target, protocol


if __name__ == "__main__":
    run_from_command_line("training.evaluate", __doc__, EvaluateConfig, evaluate)
