"""Measurements while a stage trains: the moving average of the weights, on held-out pictures, for each variant."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from infra.config import ConfigError
from infra.files import write_atomically
from training.benchmark import to_picture
from training.config import ValidationConfig
from training.corruption import Corruption
from training.evaluate import read_pictures

Scores = dict[str, dict[str, float]]
"""A variant's name to PSNR in dB by task."""

Weights = Mapping[str, Tensor]


def call(module: nn.Module, weights: Weights | None, image: Tensor, variant: str) -> Tensor:
    """What ``variant`` of ``module`` makes of ``image``, with ``weights`` in place of its own if there are any."""
    arguments = (image,) if variant == "default" else (image, variant)
    restored: Tensor = module(*arguments) if weights is None else functional_call(module, dict(weights), arguments)
    return restored


@dataclass(frozen=True)
class Task:
    """What is to be undone, by which variants, and how their network is used for it."""

    label: str
    corrupt: Corruption
    variants: tuple[str, ...]
    restore: Callable[[nn.Module, Weights | None, Tensor, str], Tensor] = call


class Validator:
    """Measures PSNR of 8-bit RGB pictures, whole, the same at any number of ranks, which share the pictures.

    A picture is degraded by its own name, so that figures of different steps and runs compare.
    """

    def __init__(self, config: ValidationConfig, tasks: Sequence[Task], seed: int, device: torch.device) -> None:
        """
        Raises:
            ConfigError: the folder of pictures is missing or holds none.
        """
        folder = Path(config.pictures)
        if not folder.is_dir():
            raise ConfigError(f"validation.pictures={config.pictures}: not a folder; a folder of pictures is expected")
        pictures = read_pictures(folder, config.crop)
        self._pictures = dict(list(pictures.items())[: config.limit])
        self._tasks, self._seed, self._device, self._grid = tasks, seed, device, config.grid

    @torch.no_grad()
    def measure(self, module: nn.Module, weights: Weights | None) -> tuple[Scores, np.ndarray | None]:
        """PSNR of ``module`` with ``weights`` in place of its own. A collective.

        Returns:
            The scores, on every rank, and on rank 0 the sample grid: RGB uint8, a row a picture and task, its columns
            the degraded picture, each variant's result and the clean one.
        """
        training = module.training
        module.eval()
        names = sorted({variant for task in self._tasks for variant in task.variants})
        sums = torch.zeros(len(names), len(self._tasks), dtype=torch.float64, device=self._device)
        rows: list[np.ndarray] = []
        for place, (name, clean) in enumerate(self._pictures.items()):
            shown = place < self._grid
            if place % dist.get_world_size() != dist.get_rank() and not (shown and dist.get_rank() == 0):
                continue
            for column, task in enumerate(self._tasks):
                degraded, _ = task.corrupt(clean, seed=self._seed, epoch=[0], keys=[name], draw=[0], depth=None)
                degraded = degraded if degraded.is_floating_point() else degraded.float() / 255
                images = [to_picture(degraded)]
                for variant in task.variants:
                    restored = task.restore(module, weights, degraded.to(self._device), variant)
                    images.append(to_picture(restored.cpu()))
                    if place % dist.get_world_size() == dist.get_rank():
                        sums[names.index(variant), column] += _psnr(images[-1], to_picture(clean))
                if shown and dist.get_rank() == 0:
                    rows.append(_row([*images, to_picture(clean)]))
        module.train(training)
        dist.all_reduce(sums)
        means = (sums / len(self._pictures)).tolist()
        scores: Scores = {name: {} for name in names}
        for column, task in enumerate(self._tasks):
            for variant in task.variants:
                scores[variant][task.label] = means[names.index(variant)][column]
        return scores, _stacked(rows) if rows else None


class Best:
    """The best mean PSNR of each variant so far: what ``best/VARIANT`` holds."""

    def __init__(self, reached: Mapping[str, float]) -> None:
        self.reached = dict(reached)

    def improved(self, scores: Scores) -> list[str]:
        """Variants that are better than ever before; they count as reached from now on."""
        means = {variant: sum(by_task.values()) / len(by_task) for variant, by_task in scores.items()}
        better = [variant for variant, mean in means.items() if mean > self.reached.get(variant, -math.inf)]
        self.reached |= {variant: means[variant] for variant in better}
        return better


def flat(scores: Scores) -> dict[str, float]:
    """Scores as metrics: ``psnr.TASK.VARIANT``."""
    return {f"psnr.{task}.{variant}": value for variant, tasks in scores.items() for task, value in tasks.items()}


def record(out: Path, step: int, scores: Scores, facts: Mapping[str, Any]) -> None:
    """Add a line to ``out``/validation.jsonl; one that stands there for this step or a later one is of a run that
    was killed after its last checkpoint, and goes."""
    path = out / "validation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["step"] < step]
    lines.append({"step": step, "psnr": scores, **facts})
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _psnr(restored: np.ndarray, clean: np.ndarray) -> float:
    """In dB, at most 100, so that a mean over pictures stays one where a picture is met exactly."""
    error = float(np.mean((restored.astype(np.float64) - clean) ** 2))
    return min(100.0, 10 * math.log10(255**2 / error)) if error else 100.0


def _row(images: Sequence[np.ndarray]) -> np.ndarray:
    """Side by side; smaller ones (LR) enlarged pixel by pixel."""
    height, width = images[-1].shape[:2]
    same = [cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST) for image in images]
    return np.hstack(same)


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    width = max(row.shape[1] for row in rows)
    return np.vstack([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows])
