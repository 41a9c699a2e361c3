"""``ird import-checkpoint`` and ``ird export``: weights from the public implementations in, files for others out."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.files import sha256_of_file
from infra.tracking import TrackingConfig
from pipeline.inference import parse_variant
from pipeline.registry.packaging import EXPORT
from pipeline.registry.pulling import pull
from pipeline.restore import default_cache
from training.export import CONFIG, ExportError, load_export, save_export
from training.models import build_model, variants_of
from training.portable import SUFFIXES, Format, export_portable
from training.public_checkpoints import Finding, ImportOptions, Match, match_checkpoint
from training.public_files import CheckpointError, read_checkpoint
from training.public_names import Kind

# Rows of one kind in the table; a checkpoint of another width has hundreds.
_ROWS = 12


def import_checkpoint(
    kind: Kind, file: Path, out: Path, options: ImportOptions | None = None, *, console: Console | None = None
) -> int:
    """Write the weights of a public checkpoint to ``out`` as an export of ours, and print what was done with each key.

    Returns:
        0, or 1 where a key is missing, unexpected, of another shape or of bad values; nothing is written then.

    Raises:
        CheckpointError: ``file`` cannot be read, or holds another kind of network.
        ExportError: ``out`` holds another export already.
    """
    console = console or Console()
    tensors, notes = read_checkpoint(file)
    digest = sha256_of_file(file)
    _refuse_other_export(out, digest)
    try:
        match = match_checkpoint(tensors, kind, options)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    for note in notes + match.notes:
        console.print(f"{file.name}: {note}", markup=False, highlight=False)
    if match.findings:
        console.print(_table(file, kind, match))
    if match.faults:
        console.print(
            f"{file}: {len(match.faults)} key(s) unlike those of the {kind} that its shapes speak of; nothing written. "
            + _remedy(match.faults),
            markup=False,
        )
        return 1
    network = build_model(match.config)
    network.load_state_dict(match.weights)
    save_export(network, match.config, out, {"imported": {"kind": kind, "file": file.name, "sha256": digest}})
    count = sum(weight.numel() for weight in match.weights.values())
    console.print(
        f"{out}: {match.config.name} with {count:,} weights; variants: {', '.join(variants_of(match.config))}\n"
        f"ird restore --model {out} --variant {variants_of(match.config)[0]} IN OUT",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _refuse_other_export(out: Path, digest: str) -> None:
    """The same import may run again; what somebody trained is not written over."""
    if not (out / CONFIG).exists():
        return
    try:
        before = json.loads((out / CONFIG).read_bytes())["metadata"]["imported"]["sha256"]
    except (ValueError, KeyError, TypeError):
        before = None
    if before != digest:
        raise ExportError(f"{out}: holds another export already; choose another --out, or remove that folder")


def _table(file: Path, kind: Kind, match: Match) -> Table:
    table = Table("what", "key", "expected", "found", title=f"{escape(file.name)} as {kind}")
    groups: dict[str, list[Finding]] = {}
    for finding in match.findings:
        groups.setdefault(finding.kind, []).append(finding)
    for what, findings in groups.items():
        for finding in findings[:_ROWS]:
            table.add_row(what, escape(finding.key), finding.expected, finding.found)
        if len(findings) > _ROWS:
            table.add_row(what, f"… and {len(findings) - _ROWS} more")
    return table


def _remedy(faults: list[Finding]) -> str:
    kinds = {fault.kind for fault in faults}
    if all(fault.kind == "missing" and fault.key.endswith(".body.bias") for fault in faults):
        return "Its normalisations have no bias (LayerNorm_type='BiasFree'), which this network does not offer."
    if kinds == {"unexpected"} and all(fault.key.endswith(".bias") for fault in faults):
        return "Its convolutions have a bias (bias=True), which this network does not offer."
    if kinds == {"bad values"}:
        return "Take a checkpoint from before the values broke, or give the constants it was trained with."
    return "Is it a whole checkpoint of the unchanged public network? Compare the keys above with its code."


def export_model(
    model: str,
    out: Path,
    format: Format,
    variant: str = "",
    *,
    settings: TrackingConfig | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> None:
    """Write one variant of a model as ONNX or torch.export, and print how far it is from the model itself.

    Args:
        model: an export folder, a pulled folder, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        out: the file, or a folder, into which ``MODEL-VARIANT.onnx`` or ``.pt2`` goes.
        variant: a name, or depths for DyNet as ``[2,4,4,6]``; empty: the model's last.

    Raises:
        PortableError, ExportError, RegistryError: nothing is written.
    """
    console = console or Console()
    export = _export_folder(model, settings or TrackingConfig(), cache, console)
    if out.suffix != SUFFIXES[format]:
        config: Any = load_export(export)[1]
        name = (variant or variants_of(config)[-1]).strip("[] ").replace(",", "-").replace(" ", "")
        out = out / f"{config.name}-{name}{SUFFIXES[format]}"
    written = export_portable(export, out, format, parse_variant(variant))
    table = Table("batch", "height", "width", "largest difference", title="against the model itself, white is 1")
    for (batch, height, width), difference in written.differences.items():
        table.add_row(str(batch), str(height), str(width), f"{difference:.1e}")
    console.print(table)
    console.print(f"{written.path}: {written.path.stat().st_size:,} bytes", markup=False, soft_wrap=True)


def _export_folder(model: str, settings: TrackingConfig, cache: Path | None, console: Console) -> Path:
    if model.startswith("models:"):
        folder = pull(model, cache or default_cache(settings), settings, notify=console.print)
        return folder / EXPORT
    return Path(model) / EXPORT if (Path(model) / "MLmodel").exists() else Path(model)
