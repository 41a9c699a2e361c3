"""Section "Degradations": every step, and every chain that the run trained on, on a patch of the run's own dataset."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from datagen.dataset import DATASET
from datagen.degradations import Recipe, degrade, load_recipe, replay
from datagen.degradations.gallery import SERIES
from datagen.degradations.kernels import mzsr_kernel
from datagen.degradations.random import generator
from datagen.degradations.recipe import Chain
from datagen.degradations.resample import imresize
from datagen.picture.region import decode_whole
from pipeline.report.images import Image, image_of_pixels
from pipeline.report.run import STAGES, TRAININGS
from training.adaptation import shrink_blurred
from training.corruption import shrink
from training.data.shards import ShardReader

PATCH = 128
_CANDIDATES = 64
_DRAWS = 3

# Steps that the gallery has no series for: (fixed parameters, the parameter that runs, its values).
_RESAMPLING: dict[str, tuple[dict[str, Any], str, Sequence[Any]]] = {
    "downsample_direct": ({}, "scale", (2, 3, 4)),
    "quantise": ({}, "", ("8 bits",)),
}
_RESIZE_FACTORS = (2, 3, 4)


@dataclass(frozen=True)
class Row:
    """One degradation: a title, a note, and pictures with their captions. The clean patch is on the section."""

    title: str
    note: str
    pictures: list[tuple[str, Image]]


@dataclass(frozen=True)
class Trained:
    """What one training stage saw: its recipe with one row a chain, or no recipe and the one thing that it undoes."""

    stage: str
    recipe: str
    rows: list[Row]


@dataclass(frozen=True)
class Degradations:
    """The section: the clean patch, the steps alone, and the chains of the trainings."""

    clean: Image
    source: str
    steps: list[Row]
    trained: list[Trained]


def degradations(root: Path) -> Degradations | None:
    """Degrade a patch of the dataset of stage ``dataset``; None when there is no dataset yet."""
    folder = root / "dataset" / "out"
    if not (folder / DATASET).exists():
        return None
    reader = ShardReader(str(folder))
    source, clean = choose_patch(reader)
    trained = [found for stage in TRAININGS if (found := _trained(root, stage, clean)) is not None]
    return Degradations(_image(clean, f"Clean patch of {source}"), source, step_rows(clean), trained)


def choose_patch(reader: ShardReader) -> tuple[str, Tensor]:
    """(source picture, patch [3,P,P] in [0, 1]): the most colourful and detailed centre among the first samples.

    Grey or flat patches would hide what colour noise, haze and compression do.
    """
    best: tuple[float, str, np.ndarray] | None = None
    for sample in range(min(_CANDIDATES, len(reader.index))):
        found = reader.read(sample, json=True)
        picture = decode_whole(found.image)
        height, width = picture.shape[:2]
        top, left = max(0, height - PATCH) // 2, max(0, width - PATCH) // 2
        patch = picture[top : top + PATCH, left : left + PATCH]
        if patch.shape[:2] != (PATCH, PATCH):
            continue
        values = patch.astype(np.float32)
        colour = float(np.std(values - values.mean(axis=2, keepdims=True)))
        score = colour * float(np.std(values.mean(axis=2)))
        if best is None or score > best[0]:
            best = (score, json.loads(found.json)["source"], patch)
    if best is None:
        raise ValueError(f"no sample of {PATCH}x{PATCH} pixels or more")
    _, source, patch = best
    return source, torch.from_numpy(patch.transpose(2, 0, 1).copy()).float() / 255


def step_rows(clean: Tensor) -> list[Row]:
    """One row a series of the gallery from weak to strong, then the steps that resample."""
    rows = []
    for title, (fixed, parameter, values) in {**SERIES, **_RESAMPLING}.items():
        name = title.split()[0]
        picked = [values[0], values[len(values) // 2], values[-1]] if len(values) > 3 else list(values)
        pictures = []
        for value in picked:
            step = {"name": name, **fixed} | ({parameter: value} if parameter else {})
            caption = f"{parameter} {value:g}" if parameter else str(value)
            pictures.append((caption, _image(replay(clean, {"steps": [step]}), f"{title}, {caption}")))
        note = ", ".join(f"{key} {_short(value)}" for key, value in fixed.items() if key != "seed")
        rows.append(Row(_title(title), note, pictures))
    return [*rows, _resize_row(clean), _mzsr_row(clean)]


def _resize_row(clean: Tensor) -> Row:
    pictures = []
    for factor in _RESIZE_FACTORS:
        small = {"name": "resize", "height": PATCH // factor, "width": PATCH // factor}
        back = {"name": "resize", "height": PATCH, "width": PATCH}
        caption = f"1/{factor} and back"
        pictures.append((caption, _image(replay(clean, {"steps": [small, back]}).clamp(0, 1), f"resize, {caption}")))
    return Row("Resize, resize to output", "bicubic, antialiased", pictures)


def _mzsr_row(clean: Tensor) -> Row:
    step = [{"name": "mzsr_blur", "scale": 4}]
    recipe = Recipe(name="report", chains=[Chain.model_validate({"steps": step})])
    keys = [str(draw) for draw in range(_DRAWS)]
    blurred, metas = degrade(clean.expand(_DRAWS, -1, -1, -1), recipe, seed=0, epoch=0, keys=keys)
    captions = [_parameters(meta["steps"][0], ("sigma1", "sigma2")) for meta in metas]
    images = [(caption, _image(one, f"MZSR blur, {caption}")) for caption, one in zip(captions, blurred, strict=True)]
    return Row("MZSR blur", "random Gaussian kernels of 15×15, scale 4", images)


def _trained(root: Path, stage: str, clean: Tensor) -> Trained | None:
    """What the stage's own corruption makes of the patch; None for a stage that never started."""
    try:
        config = yaml.safe_load((root / stage / "out" / "config.yaml").read_text())
    except FileNotFoundError:
        return None
    label, seed = STAGES[stage], int(config.get("seed", 0))
    batch = clean.expand(_DRAWS, -1, -1, -1)
    if "recipe" in config:
        recipe = load_recipe(config["recipe"])
        return Trained(label, recipe.name, _chain_rows(batch, recipe, seed))
    scale = int(config.get("scale") or config["model"]["scale"])
    side = PATCH // scale * scale
    batch = batch[..., :side, :side]
    if config.get("phase") == "meta_transfer":
        kernels = [mzsr_kernel(generator(seed, 0, f"task:{draw}", 0), scale).to(clean) for draw in range(_DRAWS)]
        pictures = [(f"task {n}", shrink_blurred(batch[:1], kernel, scale)) for n, kernel in enumerate(kernels, 1)]
        note = f"a random Gaussian blur a task, then one pixel of {scale}×{scale}"
    else:
        low = shrink(scale, batch[:1], seed=seed, epoch=[0], keys=[stage], draw=[0])[0].float() / 255
        pictures = [("input", low), ("bicubic, to be beaten", imresize(low, scale))]
        note = f"bicubic, 1/{scale}, rounded to 8 bits"
    images = [(caption, _image(one[0], f"{label}: {caption}")) for caption, one in pictures]
    return Trained(label, "", [Row(label, note, images)])


def _chain_rows(batch: Tensor, recipe: Recipe, seed: int) -> list[Row]:
    total = sum(chain.weight for chain in recipe.chains)
    rows = []
    for chain in recipe.chains:
        one = recipe.model_copy(update={"chains": [chain]})
        keys = [f"{chain.label}-{draw}" for draw in range(len(batch))]
        pictures, metas = degrade(batch, one, seed=seed, epoch=0, keys=keys)
        title = chain.label or recipe.name
        captions = [_caption(meta) for meta in metas]
        images = [(text, _image(one, f"{title}: {text}")) for text, one in zip(captions, pictures, strict=True)]
        rows.append(Row(_title(title), f"{chain.weight / total:.0%} of the patches", images))
    return rows


def _caption(meta: Mapping[str, Any]) -> str:
    """The parameters that differ from draw to draw and mean something to a reader, a few of them."""
    drawn = [_parameters(step, _TELLING.get(step["name"], ())) for step in meta["steps"]]
    return "; ".join(text for text in drawn if text) or "as drawn"


_TELLING = {
    "gaussian_noise": ("sigma",),
    "poisson_gaussian_noise": ("shot", "read"),
    "speckle_noise": ("sigma",),
    "jpeg": ("quality",),
    "gaussian_blur": ("sigma1", "sigma2"),
    "motion_blur": ("length", "angle"),
    "defocus_blur": ("radius",),
    "low_light": ("gamma",),
    "rain": ("density", "angle"),
    "snow": ("density", "size"),
    "haze": ("beta", "airlight"),
    "block_mask": ("masked",),
}


def _parameters(step: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {_short(step[name])}" for name in names if name in step)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _title(name: str) -> str:
    words = name.replace("_", " ")
    return "JPEG" + words[4:] if words.startswith("jpeg") else words[:1].upper() + words[1:]


def _image(picture: Tensor, alt: str) -> Image:
    """A [3,h,w] picture in [0, 1]; one of half the patch or less is shown with enlarged pixels."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return image_of_pixels(pixels, alt, enlarge=PATCH // max(pixels.shape[:2]) or 1)
