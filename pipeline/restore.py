"""``ird restore``: pictures in, restored pictures out, with a model from the registry or from a folder."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datagen.degradations.resample import imresize
from infra.files import sha256_of_file
from infra.tracking import TrackingConfig, tracking_uri
from pipeline.inference import LoadedModel, RestoreOptions, load_model, resolve_options, restore_array
from pipeline.pictures import SUFFIXES, Picture, inputs_below, read_picture, refuse_input_as_output, write_picture
from pipeline.registry import EXPORT, RegistryError, pull
from training.export import ExportError

# One line for each picture that has been restored into a folder; what makes a rerun skip it.
RECORD = "restored.jsonl"


def resolve_model(
    source: str,
    settings: TrackingConfig | None = None,
    *,
    cache: Path | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load a model by ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, an export folder or a pulled folder.

    Args:
        cache: where models from the registry are kept; by default ``ird`` in the user's cache folder.
        device: by default CUDA where there is one.

    Raises:
        RegistryError: the registry has no such model, or does not answer.
        ExportError: the folder holds no export, or a damaged one.
    """
    settings = settings or TrackingConfig()
    if source.startswith("models:"):
        return load_model(pull(source, cache or default_cache(settings), settings) / EXPORT, device)
    folder = Path(source)
    if not folder.is_dir():
        raise ExportError(
            f"{source}: no such folder; expected models:/NAME@ALIAS, models:/NAME/VERSION or an export folder"
        )
    return load_model(folder / EXPORT if (folder / "MLmodel").exists() else folder, device)


def default_cache(settings: TrackingConfig) -> Path:
    """Where models of this server are kept between restores: ``$XDG_CACHE_HOME/ird/models/…``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    server = hashlib.sha256(tracking_uri(settings).encode()).hexdigest()[:12]
    return root / "ird" / "models" / server


def restore_picture(
    model: LoadedModel, picture: Picture, options: RestoreOptions, *, notify: Callable[[str], None]
) -> Picture:
    """Restore the colours of ``picture``; grey stays grey, transparency is carried over (and enlarged)."""
    pixels = restore_array(model, picture.pixels, options, notify=notify)
    alpha = picture.alpha
    if alpha is not None and pixels.shape[:2] != alpha.shape:
        enlarged = imresize(
            torch.from_numpy(np.ascontiguousarray(alpha))[None, None], pixels.shape[0] // alpha.shape[0]
        )
        alpha = enlarged[0, 0].clamp(0, 1).numpy()
    return Picture(pixels, alpha, picture.grey, picture.bits, picture.icc)


def restore_files(
    model_source: str,
    source: Path,
    out: Path,
    *,
    variant: str | None = None,
    tile: int = 512,
    overlap: int = 32,
    scale: int = 0,
    steps: int = 0,
    kernel_variance: float = 0.0,
    kernel: str = "",
    settings: TrackingConfig | None = None,
    cache: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> int:
    """Restore a picture, or all pictures below a folder, and say what was done.

    A folder's pictures keep their names, formats and sub-folders below ``out``. Those that ``out``/restored.jsonl
    records with the same bytes, the same model and the same options, and whose result is still what was
    written, are not done again. A picture that cannot be read or restored does not stop the others.

    Args:
        model_source: see ``resolve_model``.
        source: a PNG, JPEG, WebP or TIFF file, or a folder.
        out: for a folder a folder; for a picture a file name, whose suffix chooses the format, or a folder.
        variant, tile, overlap, scale, steps, kernel_variance, kernel: see ``RestoreOptions``.

    Returns:
        0 all restored; 1 some pictures failed, each is named at the end; 2 refused before any work: no
        such model, input or option, or an output that would overwrite the input.
    """
    console = console or Console()
    try:
        options = RestoreOptions(
            variant=variant or "",
            tile=tile,
            overlap=overlap,
            scale=scale,
            steps=steps,
            kernel_variance=kernel_variance,
            kernel=kernel,
        )
        pairs = _pairs(source, out)
        model = resolve_model(model_source, settings, cache=cache, device=device)
        options = resolve_options(model, options)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return _refuse(faults)
    except (RegistryError, ExportError, ValueError, OSError) as error:
        return _refuse(str(error))
    record = _Record(out, model, options) if source.is_dir() else None
    skipped, failures = 0, []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("restore", total=len(pairs))
        for given, result in pairs:
            name = given.relative_to(source).as_posix() if source.is_dir() else given.name

            def notify(message: str, name: str = name) -> None:
                progress.console.print(f"{name}: {message}", markup=False, highlight=False, soft_wrap=True)

            try:
                digest = sha256_of_file(given)
                if record is not None and record.holds(name, digest, result):
                    skipped += 1
                else:
                    write_picture(result, restore_picture(model, read_picture(given), options, notify=notify))
                    if record is not None:
                        record.add(name, digest, result)
            except (
                OSError,
                ValueError,
                RuntimeError,
                MemoryError,
            ) as error:  # torch says "out of memory" by RuntimeError
                failures.append((name, str(error) or type(error).__name__))
            progress.advance(task)
    done = len(pairs) - skipped - len(failures)
    already = f", {skipped} already done" if skipped else ""
    failed = f", {len(failures)} failed" if failures else ""
    used = options.variant if options.variant != "default" else model.config.name
    console.print(f"{done} restored with {used}{already}{failed}: {out}", markup=False, highlight=False, soft_wrap=True)
    for name, message in failures:
        console.print(f"  failed: {name}: {message}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


def _refuse(message: str) -> int:
    print(f"restore: {message}", file=sys.stderr)
    return 2


def _pairs(source: Path, out: Path) -> list[tuple[Path, Path]]:
    """What is read, and where its result goes. Raises ValueError where that makes no sense."""
    if source.is_dir():
        return [(source / path, out / path) for path in inputs_below(source, out)]
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    result = out / source.name if out.is_dir() or not out.suffix else out
    if result.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{result}: cannot write {result.suffix!r}; choose one of {', '.join(SUFFIXES)}")
    refuse_input_as_output(source, result)
    return [(source, result)]


class _Record:
    """The pictures that a folder holds restored, known by content: what went in, how it was done, what came out.

    A line is added after its picture is in place; a line that a killed process tore is passed over.
    """

    def __init__(self, out: Path, model: LoadedModel, options: RestoreOptions) -> None:
        self._path = out / RECORD
        request = {"model": model.sha256, **options.model_dump()}
        self._request = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        self._known: dict[str, Mapping[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                entry = json.loads(line)
                self._known[entry["name"]] = entry
            except (ValueError, KeyError, TypeError):
                continue

    def holds(self, name: str, digest: str, result: Path) -> bool:
        entry = self._known.get(name, {})
        same = entry.get("input") == digest and entry.get("request") == self._request and result.is_file()
        return same and entry.get("output") == sha256_of_file(result)

    def add(self, name: str, digest: str, result: Path) -> None:
        entry = {"name": name, "input": digest, "request": self._request, "output": sha256_of_file(result)}
        with open(self._path, "a") as file:
            file.write("\n" * self._torn() + json.dumps(entry) + "\n")

    def _torn(self) -> bool:
        """Whether the last line lacks its end."""
        if not self._path.exists() or self._path.stat().st_size == 0:
            return False
        with open(self._path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
