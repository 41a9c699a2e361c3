"""A benchmark: a folder of clean pictures, what is done to them, and the protocol that results are compared under.

Every input is a function of the clean picture, its name and the seed, so that no figure depends on the order of files.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from datagen.degradations import degrade, load_recipe
from datagen.degradations.kernels import kernel_named
from datagen.degradations.recipe import Chain, Recipe, Step
from datagen.degradations.resample import imresize
from datagen.picture.region import decode_whole
from infra.config import Config, ConfigError, load_config
from training.adaptation import shrink_blurred
from training.metrics import PROTOCOLS, Protocol

BENCHMARKS = Path(__file__).resolve().parents[1] / "configs" / "benchmarks"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Condition(Config):
    """What is done to a clean picture before it is restored. Nothing given: it is shrunk by bicubic at ``scale``."""

    scale: Literal[1, 2, 3, 4] = 1
    # A blur before sub-sampling: see ``datagen.degradations.kernels.kernel_named``. Empty: none.
    kernel: str = ""
    subsample: Literal["bicubic", "direct"] = "bicubic"
    sigma: float = Field(0.0, ge=0, le=255)  # standard deviation of Gaussian noise, levels of 255
    recipe: str = ""  # at scale 1: each of its chains is a task of its own
    chains: tuple[str, ...] = ()  # only these chains of the recipe, by label

    @model_validator(mode="after")
    def _makes_sense(self) -> "Condition":
        if self.scale == 1 and (self.kernel or self.subsample == "direct"):
            raise ValueError("kernel and subsample: need a scale above 1")
        if self.scale > 1 and self.recipe:
            raise ValueError("recipe: of restoration, at scale 1")
        if self.scale == 1 and bool(self.recipe) == bool(self.sigma):
            raise ValueError("give a scale above 1, or one of sigma and recipe: there is nothing to restore otherwise")
        if self.chains and not self.recipe:
            raise ValueError("chains: need a recipe")
        return self


class Benchmark(Config):
    """A folder with a condition and a protocol; the files in ``configs/benchmarks`` hold one each."""

    folder: str  # environment variables such as $IRD_REAL_DATA are replaced
    condition: Condition
    protocol: str = ""  # a name in ``training.metrics.PROTOCOLS``; empty: sr-y above scale 1, else rgb
    pictures: int = Field(0, ge=0)  # how many the folder must hold; 0: any number
    sha256: str = ""  # ``pictures_sha256`` of the folder; empty: not checked
    seed: int = 0

    @model_validator(mode="after")
    def _protocol_suits(self) -> "Benchmark":
        self.compared_by()
        return self

    def compared_by(self) -> tuple[str, Protocol]:
        """The name of the protocol, and what it is.

        Raises:
            ValueError: there is none of this name, or it is of the other kind.
        """
        enlarges = self.condition.scale > 1
        suiting = [name for name, protocol in PROTOCOLS.items() if protocol.enlarges == enlarges]
        name = self.protocol or suiting[0]
        if name not in suiting:
            kind = "super-resolution" if enlarges else "restoration at the same size"
            raise ValueError(f"protocol={name}: expected one of {kind}: {', '.join(suiting)}")
        return name, PROTOCOLS[name]


def load_benchmark(name_or_path: str) -> Benchmark:
    """The benchmark ``configs/benchmarks/NAME.yaml``, or the one in the given YAML file.

    Raises:
        ConfigError: no such benchmark (the known ones are listed), or its contents are refused.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = {file.stem: file for file in sorted(BENCHMARKS.glob("*.yaml"))}
        if name_or_path not in known:
            raise ConfigError(
                f"{name_or_path}: neither a folder of pictures nor a benchmark; known benchmarks: {', '.join(known)}"
            )
        path = known[name_or_path]
    return load_config(Benchmark, path)


def picture_files(benchmark: Benchmark) -> dict[str, Path]:
    """The files of the benchmark by name without suffix, in order of name; checked as far as the benchmark says.

    Raises:
        ConfigError: the folder is missing or empty, two files have one name, or they are not the registered ones.
    """
    folder = Path(os.path.expandvars(benchmark.folder)).expanduser()
    if "$" in str(folder):
        raise ConfigError(f"folder={benchmark.folder}: the environment variable is not set")
    if not folder.is_dir():
        raise ConfigError(f"folder={folder}: no such folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise ConfigError(f"{folder}: {files[path.stem].name} and {path.name} have one name; rename one")
            files[path.stem] = path
    if not files:
        raise ConfigError(f"{folder}: no .png, .jpg, .webp, .bmp or .tif picture in this folder")
    if benchmark.pictures and len(files) != benchmark.pictures:
        raise ConfigError(f"{folder}: {len(files)} pictures, the benchmark has {benchmark.pictures}")
    if benchmark.sha256:
        found = pictures_sha256(files)
        if found != benchmark.sha256:
            raise ConfigError(
                f"{folder}: not the registered pictures (sha256 over pixels {found[:16]}…, the benchmark says "
                f"{benchmark.sha256[:16]}…): crops, encodings and orders differ between copies of these sets"
            )
    return files


def pictures_sha256(files: dict[str, Path]) -> str:
    """Over sizes and pixels in order of name: re-encoding without loss and renaming within the order change nothing."""
    digest = hashlib.sha256()
    for path in files.values():
        pixels = decode_whole(path.read_bytes())
        digest.update(np.array(pixels.shape, "<i8").tobytes())
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def tasks_of(condition: Condition) -> dict[str, Callable[[str, np.ndarray, int], np.ndarray]]:
    """The tasks of a condition: name, and what makes the input of one from (picture's name, clean uint8, seed).

    Raises:
        ConfigError: there is no such recipe, chain or kernel.
    """
    if condition.scale > 1:
        kernel = kernel_named(condition.kernel).float() if condition.kernel else None
        return {_enlarging_task(condition): lambda name, clean, seed: _shrunk(condition, kernel, name, clean, seed)}
    if condition.recipe:
        recipe = load_recipe(condition.recipe)
        chains = {chain.label or f"{recipe.name}_{number}": chain for number, chain in enumerate(recipe.chains)}
        unknown = sorted(set(condition.chains) - chains.keys())
        if unknown:
            raise ConfigError(f"chains={', '.join(unknown)}: {recipe.name} has {', '.join(chains)}")
        recipes = {
            label: recipe.model_copy(update={"chains": [chain]})
            for label, chain in chains.items()
            if not condition.chains or label in condition.chains
        }
    else:
        noise = Step.model_validate({"name": "gaussian_noise", "sigma": condition.sigma})
        label = f"noise_{condition.sigma:g}"
        recipes = {label: Recipe(name=label, output="8bit", chains=[Chain(label=label, steps=[noise])])}

    def by(recipe: Recipe) -> Callable[[str, np.ndarray, int], np.ndarray]:
        return lambda name, clean, seed: to_picture(
            degrade(to_batch(clean), recipe, seed=seed, epoch=0, keys=[name])[0]
        )

    return {label: by(recipe) for label, recipe in recipes.items()}


def read_clean(path: Path, scale: int) -> np.ndarray:
    """RGB uint8 [H,W,3], cut at bottom and right to multiples of ``scale`` (MATLAB's modcrop in every paper's code)."""
    picture = decode_whole(path.read_bytes())
    height, width = (side - side % scale for side in picture.shape[:2])
    return np.ascontiguousarray(picture[:height, :width])


def bicubic(low: np.ndarray, scale: int) -> np.ndarray:
    """RGB uint8 enlarged as the tables' bicubic rows are."""
    return to_picture(imresize(to_batch(low), scale))


def to_batch(picture: np.ndarray) -> torch.Tensor:
    """RGB uint8 [H,W,3] to float32 [1,3,H,W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].float() / 255


def to_picture(batch: torch.Tensor) -> np.ndarray:
    """Float [1,3,H,W] to RGB uint8 [H,W,3], clipped and rounded, halves upwards as MATLAB rounds them."""
    levels = (batch[0].double().clamp(0, 1) * 255 + 0.5).floor()
    return np.ascontiguousarray(levels.byte().permute(1, 2, 0).numpy())


def _enlarging_task(condition: Condition) -> str:
    parts = [f"x{condition.scale}", condition.kernel or "", condition.subsample]
    parts += [f"noise_{condition.sigma:g}"] if condition.sigma else []
    return "-".join(part for part in parts if part)


def _shrunk(condition: Condition, kernel: torch.Tensor | None, name: str, clean: np.ndarray, seed: int) -> np.ndarray:
    picture = to_batch(clean)
    if kernel is not None:
        low = shrink_blurred(picture, kernel, condition.scale, condition.subsample)
    elif condition.subsample == "direct":
        low = picture[..., :: condition.scale, :: condition.scale]
    else:
        low = imresize(picture, 1 / condition.scale, round_to_uint8=True)
    if condition.sigma:
        noisy = Condition(sigma=condition.sigma)
        (add_noise,) = tasks_of(noisy).values()
        return add_noise(name, to_picture(low), seed)
    return to_picture(low)
