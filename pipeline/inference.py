"""A trained network on one picture of any size: variants, tiles with blended overlaps, zero-shot adaptation.

Knows nothing of files but the export that it loads, because this module and what it imports travel inside each
registered model.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from datagen.degradations.kernels import MZSR_SIZE
from infra.config import Config
from infra.files import sha256_of_file
from pipeline.memory import SHARE, bytes_per_pixel, free_memory, largest_tile
from training.adaptation import ONE_STEP, Adapted, adapt, adapt_many, network_input
from training.ensemble import self_ensemble
from training.export import CONFIG, WEIGHTS, ExportError, load_export
from training.models import DyNetConfig, ModelConfig, scale_of, variants_of
from training.models.inputs import check_variant
from training.zero_shot import ZeroShotOptions, blur_of, enlarge_adapted, trained_for, why_not_adapted

Forward = Callable[[torch.Tensor], torch.Tensor]

AUTO = -1
_ADAPTED_SIDE = 512  # MZSR learns from no more than this of a picture, and its memory grows with it
_ALIGNMENT = 8  # DyNet works on blocks of 8 pixels: tiles that start on a multiple see the blocks of the whole picture


class RestoreOptions(Config):
    """How a picture is restored. A default that reads "the model's" is resolved by ``resolve_options``."""

    # A name, or for DyNet the depths of the four levels, as "[2,4,4,6]". Empty: the model's last, which is its largest.
    variant: str = ""
    # Side of a tile in input pixels; a picture that fits is done whole. 0: always whole, whatever memory it takes.
    # AUTO (-1): whole where the free memory allows, else in the largest tiles that it allows.
    tile: Annotated[int, Field(ge=-1)] = -1
    overlap: Annotated[int, Field(ge=0)] = 32  # input pixels that neighbouring tiles share
    # MZSR alone. 0: the factor that the model was trained for.
    scale: Annotated[int, Field(ge=0, le=4)] = 0
    # MZSR alone: variance in px² of the Gaussian blur that the picture is assumed to have gone through, isotropic,
    # on the grid of the result. 0: as many px² as the scale, near the middle of the kernels that MZSR trains on.
    kernel_variance: Annotated[float, Field(ge=0, le=400)] = 0.0
    # MZSR alone: gradient steps on each picture before it is enlarged. 0: one, as in the paper.
    steps: Annotated[int, Field(ge=0, le=10)] = 0
    # MZSR alone, in place of kernel_variance: "estimate" finds the blur in the picture; else what ``kernel_named``
    # reads, or several with ";" between them, of which the one that suits the picture best is taken.
    kernel: str = ""
    # MZSR alone: standard deviation of the noise that the picture holds, levels of 255, and how often what the result
    # lacks of the picture is added to it.
    noise: Annotated[float, Field(ge=0, le=50)] = 0.0
    back_projections: Annotated[int, Field(ge=0, le=20)] = 0
    # Mean over the eight flips and turns ("EDSR+"), at eight times the cost; MZSR: those that leave the blur as it is.
    ensemble: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode on its device, what it is, and the sha256 of the export it came from."""

    network: nn.Module
    config: ModelConfig
    metadata: dict[str, Any]
    sha256: str

    @property
    def adapts(self) -> bool:
        """Whether the network learns from each picture before it enlarges it."""
        return self.config.name == "mzsr"


@dataclass(frozen=True)
class Adaptation:
    """What MZSR's network has learnt from a picture, and the blur that it was told or found."""

    kernel: torch.Tensor
    adapted: Adapted


def load_model(export: Path, device: str | torch.device | None = None) -> LoadedModel:
    """Load an export folder (``training.export``) onto ``device``; by default CUDA where there is one.

    Raises:
        ExportError: the folder holds no export, a damaged one, or a model that is not for three channels.
    """
    network, config, metadata = load_export(export)
    if config.channels != 3:
        raise ExportError(f"{export}: built for {config.channels} channel(s); pictures are restored in three")
    target = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    return LoadedModel(network.to(target).eval().requires_grad_(False), config, metadata, export_sha256(export))


def export_sha256(export: Path) -> str:
    """One sha256 over both files of an export folder.

    Raises:
        ExportError: a file is missing.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if not (export / name).is_file():
            raise ExportError(f"{export / name}: missing; expected an export folder with {CONFIG} and {WEIGHTS}")
        digest.update(f"{name} {sha256_of_file(export / name)}\n".encode())
    return digest.hexdigest()


def offered_options(config: ModelConfig, metadata: dict[str, Any]) -> dict[str, Any]:
    """The options that mean something to this kind of model, with the values that it takes when none are given."""
    defaults = RestoreOptions()
    offered: dict[str, Any] = {"variant": variants_of(config)[-1], "tile": defaults.tile, "overlap": defaults.overlap}
    offered |= {"ensemble": defaults.ensemble}
    if config.name == "mzsr":
        offered |= {"scale": int(metadata.get("scale", 2)), "kernel_variance": defaults.kernel_variance}
        offered |= {"steps": len(ONE_STEP), "kernel": defaults.kernel}
        offered |= {"noise": defaults.noise, "back_projections": defaults.back_projections}
    return offered


def resolve_options(model: LoadedModel, options: RestoreOptions) -> RestoreOptions:
    """Fill in what ``options`` leaves to the model, after checking that they suit it.

    Raises:
        ValueError: no such variant, an overlap that does not suit the tile, or an option of another kind of model.
    """
    if 0 < options.tile < 8 * _ALIGNMENT:
        raise ValueError(
            f"tile {options.tile}: at least {8 * _ALIGNMENT}, 0 for the whole picture at once, or -1 for what fits"
        )
    if 0 < options.tile < 2 * options.overlap:
        raise ValueError(f"overlap {options.overlap}: at most half the tile, {options.tile // 2}")
    offered = offered_options(model.config, model.metadata)
    given = {name for name, value in options if value != type(options).model_fields[name].default}
    foreign = sorted(given - offered.keys())
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: not an option of {model.config.name}; it has {', '.join(offered)}")
    variant = options.variant or offered["variant"]
    if isinstance(model.config, DyNetConfig):
        model.network.depth_of(parse_variant(variant))  # type: ignore[operator]
    else:
        check_variant(variant, variants_of(model.config), model.config.name)
    scale = options.scale or offered.get("scale", 0)
    variance = options.kernel_variance or float(scale)
    steps = options.steps or offered.get("steps", 0)
    return options.model_copy(update={"variant": variant, "scale": scale, "kernel_variance": variance, "steps": steps})


def restore_array(
    model: LoadedModel,
    picture: np.ndarray,
    options: RestoreOptions | None = None,
    *,
    notify: Callable[[str], None] = warnings.warn,
    memory: int | None = None,
    adaptation: Adaptation | None = None,
) -> np.ndarray:
    """Restore one picture, in tiles when it is larger than ``options.tile``.

    Tiles of convolutional networks (EDSR, MDSR, MZSR) make up the whole picture's result. DyNet and PromptIR look
    at all they are given (channel attention, prompts spread over the picture), so that tiles make another
    result than the whole picture would; docs/serving.md says how much. Memory beyond input and result is that of one
    tile.

    Args:
        picture: float32 [H, W, 3] in [0, 1].
        notify: told when a picture is done in tiles for want of memory, and when a zero-shot adaptation did not help
            and bicubic enlargement was done instead.
        memory: bytes that ``tile`` -1 may plan with; None takes half of those that are free.
        adaptation: what ``adapt_together`` returned for this picture and these options; None: it is made here.

    Returns:
        float32 [scale H, scale W, 3] in [0, 1].

    Raises:
        ValueError: the picture has another shape or dtype, or the options do not suit the model.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.float32 or 0 in picture.shape:
        raise ValueError(f"expected float32 [H, W, 3], got {picture.dtype} {list(picture.shape)}")
    options = resolve_options(model, options or RestoreOptions())
    image = _batch_of(picture)
    device = next(model.network.parameters()).device
    if options.tile == AUTO:
        tile = _fitting_tile(model, options, picture.shape[:2], memory, device, notify)
        options = options.model_copy(update={"tile": tile, "overlap": min(options.overlap, tile // 2)})
    if model.adapts:
        scale = options.scale
        if adaptation is None:
            (adaptation,) = adapt_together(model, [picture], options)
        restore = _adapted(model, image.shape, adaptation, options, notify)
    else:
        variant = parse_variant(options.variant)
        scale = scale_of(model.config, options.variant)

        def restore_once(tile: torch.Tensor) -> torch.Tensor:
            return model.network(tile, variant)

        restore = partial(self_ensemble, restore_once) if options.ensemble else restore_once

    with torch.inference_mode():
        result = _in_tiles(lambda tile: restore(tile.to(device)).cpu(), image, scale, options.tile, options.overlap)
    return np.ascontiguousarray(result.clamp(0, 1)[0].permute(1, 2, 0).numpy())


def _fitting_tile(
    model: LoadedModel,
    options: RestoreOptions,
    shape: tuple[int, ...],
    memory: int | None,
    device: torch.device,
    notify: Callable[[str], None],
) -> int:
    """0 for the whole picture, or the side of the largest tile that fits into the memory."""
    if model.adapts:
        return _ADAPTED_SIDE
    per_pixel = bytes_per_pixel(model.config, options.variant)
    limit = SHARE * free_memory(device) if memory is None else memory
    tile = largest_tile(per_pixel, shape[0], shape[1], limit)
    if tile:
        needed = per_pixel * shape[0] * shape[1]
        notify(
            f"in tiles of {tile} pixels: the whole, {shape[1]}x{shape[0]}, would take about {needed / 2**30:.1f} GiB "
            f"of the {limit / 2**30:.1f} GiB that it may"
        )
    return tile


def parse_variant(variant: str) -> str | list[int]:
    """``"small"`` as it is, ``"[2,4,4,6]"`` as a list of depths. The network refuses what it does not have."""
    if not variant.startswith("["):
        return variant
    try:
        return [int(depth) for depth in variant.strip("[] ").split(",")]
    except ValueError:
        raise ValueError(f"variant {variant!r}: expected a name, or four depths such as [2,4,4,6]") from None


def adapt_together(
    model: LoadedModel, pictures: Sequence[np.ndarray], options: RestoreOptions
) -> list[Adaptation | None]:
    """Let an MZSR network adapt to each of the pictures, float32 [H, W, 3] in [0, 1].

    It looks at no more than one tile from the middle of each, because its memory grows with the picture. Middles of one
    size are done at once (``adapt_many``), with as much memory as all of them take; what is learnt is that of one after
    the other to rounding.

    Returns:
        None for a picture that is too small to be shrunk and still hold its blur.

    Raises:
        ValueError: the options do not suit the model.
    """
    options = resolve_options(model, options)
    shot = _zero_shot_options(model, options)
    side = _ADAPTED_SIDE if options.tile == AUTO else options.tile
    device = next(model.network.parameters()).device
    by_size: dict[tuple[int, int], list[int]] = {}
    for number, picture in enumerate(pictures):
        height, width = (min(one, side or one) // shot.scale * shot.scale for one in picture.shape[:2])
        by_size.setdefault((height, width), []).append(number)
    results: list[Adaptation | None] = [None] * len(pictures)
    for (height, width), numbers in by_size.items():
        if min(height, width) < MZSR_SIZE * shot.scale:
            continue
        middles = torch.cat([_batch_of(_middle(pictures[number], height, width)) for number in numbers]).to(device)
        kernels = [blur_of(middle[None], shot).to(middle) for middle in middles]
        if len(numbers) == 1:
            learnt = [adapt(model.network, middles, kernels[0], shot.scale, shot.all_rates, shot.assumption)]
        else:
            learnt = adapt_many(
                model.network, middles, torch.stack(kernels), shot.scale, shot.all_rates, shot.assumption
            )
        for number, kernel, adapted in zip(numbers, kernels, learnt):
            results[number] = Adaptation(kernel, adapted)
    return results


def _zero_shot_options(model: LoadedModel, options: RestoreOptions) -> ZeroShotOptions:
    trained = trained_for(model.metadata) | {"scale": options.scale}
    more = {name: getattr(options, name) for name in ("steps", "noise", "back_projections", "ensemble")}
    return ZeroShotOptions(**trained, **more, kernel=options.kernel or f"{options.kernel_variance:g}")


def _middle(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _batch_of(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]


def _adapted(
    model: LoadedModel,
    shape: torch.Size,
    adaptation: Adaptation | None,
    options: RestoreOptions,
    notify: Callable[[str], None],
) -> Forward:
    """The enlargement of a network that has adapted to a picture [1,3,H,W], or bicubic if that went wrong."""
    shot = _zero_shot_options(model, options)
    if adaptation is None or not adaptation.adapted.helped:
        reason = why_not_adapted(shape, adaptation.adapted if adaptation else None)
        notify(f"{reason}; enlarged by bicubic")
        return lambda tile: network_input(tile, shot.scale, shot.assumption)
    return lambda tile: enlarge_adapted(model.network, adaptation.adapted.weights, tile, adaptation.kernel, shot)


def _in_tiles(restore: Forward, image: torch.Tensor, scale: int, tile: int, overlap: int) -> torch.Tensor:
    """``restore(image)``, put together from tiles that fade into each other where they overlap."""
    height, width = image.shape[-2:]
    rows, columns = _spans(height, tile, overlap), _spans(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return restore(image)
    row_weights, column_weights = _fades(rows, scale), _fades(columns, scale)
    result = image.new_zeros(*image.shape[:2], height * scale, width * scale)
    for (top, bottom), row_weight in zip(rows, row_weights):
        for (left, right), column_weight in zip(columns, column_weights):
            part = restore(image[..., top:bottom, left:right])
            place = result[..., top * scale : bottom * scale, left * scale : right * scale]
            place += part * row_weight[:, None] * column_weight
    return result


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Evenly spread (start, end) that cover ``length``, start on the alignment and share ``overlap`` or more."""
    if tile == 0 or length <= tile:
        return [(0, length)]
    # Aligning a start moves it by less than one alignment, which must not eat into the overlap.
    count = math.ceil((length - tile) / (tile - overlap - _ALIGNMENT)) + 1
    starts = [math.ceil((length - tile) * i / (count - 1) / _ALIGNMENT) * _ALIGNMENT for i in range(count)]
    return [(start, min(start + tile, length)) for start in starts]


def _fades(spans: list[tuple[int, int]], scale: int) -> list[torch.Tensor]:
    """For each span the share [scale * (end - start)] that it has in the result; the shares at a place sum to 1.

    A tile knows nothing of what lies beyond its edge, so the outer parts of an overlap are left to the neighbour, and
    the fade lies in the middle.
    """
    shares = torch.ones(len(spans), scale * spans[-1][1])
    for share, (start, end), before, after in zip(shares, spans, [None, *spans], [*spans[1:], None]):
        share[: scale * start] = share[scale * end :] = 0
        if before:
            share[scale * start : scale * before[1]] = _rise(scale * (before[1] - start))
        if after:
            share[scale * after[0] : scale * end] *= _rise(scale * (end - after[0])).flip(0)
    shares /= shares.sum(dim=0)
    return [share[scale * start : scale * end] for share, (start, end) in zip(shares, spans)]


def _rise(length: int) -> torch.Tensor:
    """From 0 to 1 over the middle third of ``length`` places; with its mirror image it sums to 1."""
    return (3 * (torch.arange(length) + 0.5) / length - 1).clamp(0, 1)
