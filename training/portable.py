"""A network as one file for programs without ird: ONNX, or torch.export's ``.pt2``.

A file holds one variant, with batch, height and width left open, and is checked before it is published: it is read
back, run on pictures of several sizes, and compared with the network that it was made from.
"""

import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from infra.errors import Refusal
from infra.files import publish_atomically
from training.export import load_export
from training.models import DyNet, ModelConfig, PromptIR, scale_of, variants_of
from training.models.dynet import STRIDE
from training.models.inputs import Variant

Format = Literal["onnx", "torch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
METADATA = "ird.json"

# Largest difference from the network itself, as a share of the largest value (at least 1, white).
BOUND = 1e-4

# (batch, height, width): both sides odd, smaller than the prompts of the published networks (128 pixels), larger.
_CHECKED = ((1, 9, 11), (1, 33, 47), (2, 64, 72), (1, 135, 201))

# Traced with sides that no stride divides, so that nothing in the graph rests on a picture that needs no border.
_TRACED = (2, 43, 50)


class PortableError(Refusal, RuntimeError):
    """Nothing was written. The message says why, and what to do."""


@dataclass(frozen=True)
class Portable:
    """A file that was written: what stands in it beside the network, and for each size how far it is from eager."""

    path: Path
    metadata: dict[str, Any]
    differences: dict[tuple[int, int, int], float]


def export_portable(
    export: str | Path, out: str | Path, format: Format, variant: Variant = "", *, bound: float = BOUND
) -> Portable:
    """Write one variant of an export folder as one file with open batch, height and width.

    The file maps float32 [N, channels, H, W] in [0, 1] to [N, channels, scale H, scale W], not clamped, for any N, and
    for H and W of at least 9 (DyNet, PromptIR) or 2. Input and output are called ``image`` and ``restored``. It
    records model, variant, dataset and run: ONNX in ``metadata_props``, torch.export as the extra file ``ird.json``.

    Args:
        out: ends with ``.onnx`` or ``.pt2``; replaced if it is there.
        variant: a name, or depths for DyNet; empty: the model's last.
        bound: largest accepted difference from eager, as a share of the largest value (at least 1).

    Raises:
        PortableError: packages are missing, the suffix or the variant does not suit, or the file that came out
            differs by more than ``bound``. Nothing is written then.
        ExportError: ``export`` is not a whole export folder.
    """
    out = Path(out)
    if out.suffix != SUFFIXES[format]:
        raise PortableError(f"{out}: a file of format {format} ends with {SUFFIXES[format]}")
    if format == "onnx":
        _need_onnx()
    network, config, origin = load_export(export)
    if config.name == "mzsr":
        raise PortableError(f"{export}: MZSR learns from each picture before it enlarges it, which no graph can hold")
    chosen = variant or variants_of(config)[-1]
    network.requires_grad_(False)
    try:
        network(torch.zeros(1, config.channels, 8, 8), chosen)
    except ValueError as error:
        raise PortableError(f"{export}: {error}") from None

    whole = _AnySize(network, chosen)
    metadata = _metadata(config, chosen, origin)
    with publish_atomically(out) as temporary:
        program = _trace(whole, config.channels)
        run = _write_onnx(program, temporary, metadata) if format == "onnx" else _write(program, temporary, metadata)
        differences = _differences(run, network, chosen, config.channels)
        size, worst = max(differences.items(), key=lambda item: item[1])
        if not worst <= bound:
            raise PortableError(
                f"{out}: not written; on {size[0]} picture(s) of {size[2]}x{size[1]} it differs from the network "
                f"by {worst:.2g} of the largest value, more than {bound:.2g}"
            )
    return Portable(out, metadata, differences)


class _AnySize(nn.Module):
    """A network of one variant, with the border that its stride needs made of operations whose shape may stay open.

    ``pad_to_multiple`` decides by the sizes at hand, which a graph cannot; the values are the same.
    """

    def __init__(self, network: nn.Module, variant: Variant) -> None:
        super().__init__()
        self.network, self.variant = network, variant
        self.stride = STRIDE if isinstance(network, DyNet | PromptIR) else 1

    def forward(self, image: Tensor) -> Tensor:
        if self.stride == 1:
            return self.network(image, self.variant)
        height, width = image.shape[-2:]
        padded_height = (height + self.stride - 1) // self.stride * self.stride
        padded_width = (width + self.stride - 1) // self.stride * self.stride
        below, right = torch.full((), padded_height - height), torch.full((), padded_width - width)
        mirrored = (below < height) & (right < width)
        rows = _continued(height, padded_height, mirrored)
        columns = _continued(width, padded_width, mirrored)
        restored = self.network(image.index_select(2, rows).index_select(3, columns), self.variant)
        # A slice would be a view, whose layout the graph would tie to sizes that are no multiple of the stride.
        return restored.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))


def _continued(length: int, padded: int, mirrored: Tensor) -> Tensor:
    """Which of ``length`` rows stands at each of ``padded`` places: mirrored at the last one, or the last one again."""
    places, last = torch.arange(padded), length - 1
    return torch.where(mirrored, last - (places - last).abs(), places.clamp(max=last))


def _trace(network: _AnySize, channels: int) -> ExportedProgram:
    batch, height, width = _TRACED
    with torch.no_grad():
        return torch.export.export(
            network,
            (torch.rand(batch, channels, height, width),),
            # Named dimensions would have to hold for every whole number, which torch cannot prove of rounding up.
            dynamic_shapes={"image": dict.fromkeys((0, 2, 3), Dim.DYNAMIC)},
        )


def _write(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of operators of packages that are not installed
    onnx_program = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["image"],
        output_names=["restored"],
        dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},
        external_data=False,
        verbose=False,
    )
    assert onnx_program is not None
    for key, value in metadata.items():
        onnx_program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    onnx_program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    return run


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise PortableError(f"not installed: {', '.join(missing)}; ONNX needs `pip install 'ird[onnx]'`")


def _metadata(config: ModelConfig, variant: Variant, origin: dict[str, Any]) -> dict[str, Any]:
    name = variant if isinstance(variant, str) else json.dumps(list(variant))
    facts = {key: origin[key] for key in ("dataset_id", "run_id", "code", "imported") if origin.get(key)}
    scale = scale_of(config, name)
    return {"model": config.model_dump(mode="json"), "variant": name, "scale": scale, "range": [0, 1], **facts}


def _differences(
    run: Callable[[Tensor], Tensor], network: nn.Module, variant: Variant, channels: int
) -> dict[tuple[int, int, int], float]:
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for batch, height, width in _CHECKED:
        image = torch.rand(batch, channels, height, width, generator=generator)
        with torch.no_grad():
            expected, found = network(image, variant), run(image)
        if found.shape != expected.shape:
            raise PortableError(f"gives {list(found.shape)} where the network gives {list(expected.shape)}")
        difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1)
        differences[batch, height, width] = float(difference)
    return differences
