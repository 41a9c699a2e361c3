"""``ird restore``: pictures in, restored pictures out, with a model from the registry or from a folder."""

import contextlib
import hashlib
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datagen.degradations.resample import imresize
from infra.config import ConfigError
from infra.tracking import TrackingConfig, tracking_uri
from pipeline.budget import AUTO as AUTO_VARIANT
from pipeline.budget import check_choice, choose_variant, measured_table, parse_bytes
from pipeline.inference import (
    AUTO,
    Adaptation,
    LoadedModel,
    RestoreOptions,
    adapt_together,
    load_model,
    resolve_options,
    restore_array,
)
from pipeline.pictures import Picture, decode_picture, encode_picture, side_by_side, suffix_of
from pipeline.places import STREAM, Job, plan
from pipeline.record import Record
from pipeline.registry.packaging import EXPORT
from pipeline.registry.pulling import pull
from pipeline.registry.server import RegistryError
from training.export import ExportError


def resolve_model(
    source: str,
    settings: TrackingConfig | None = None,
    *,
    cache: Path | None = None,
    device: str | torch.device | None = None,
    notify: Callable[[str], None] = warnings.warn,
) -> LoadedModel:
    """Load a model by ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, an export folder or a pulled folder.

    Args:
        cache: where models from the registry are kept; by default ``ird`` in the user's cache folder.
        device: by default CUDA where there is one.
        notify: told when the server is away and a copy that was pulled before is used.

    Raises:
        RegistryError: the registry has no such model, or does not answer.
        ExportError: the folder holds no export, or a damaged one.
    """
    settings = settings or TrackingConfig()
    if source.startswith("models:"):
        folder = pull(source, cache or default_cache(settings), settings, notify=notify)
        return load_model(folder / EXPORT, device)
    folder = Path(source)
    if not folder.is_dir():
        raise ExportError(
            f"{source}: no such folder; expected models:/NAME@ALIAS, models:/NAME/VERSION or an export folder"
        )
    return load_model(folder / EXPORT if (folder / "MLmodel").exists() else folder, device)


def default_cache(settings: TrackingConfig) -> Path:
    """Where models of this server are kept between restores: ``$XDG_CACHE_HOME/ird/models/…``."""
    server = hashlib.sha256(tracking_uri(settings).encode()).hexdigest()[:12]
    return cache_root() / "models" / server


def cache_root() -> Path:
    """``ird`` in the user's cache folder: models from registries, and what was measured on this machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ird"


def restore_picture(
    model: LoadedModel,
    picture: Picture,
    options: RestoreOptions,
    *,
    notify: Callable[[str], None],
    memory: int | None = None,
    adaptation: Adaptation | None = None,
) -> Picture:
    """Restore the colours of ``picture``; grey stays grey, transparency is carried over (and enlarged).

    ``notify``, ``memory`` and ``adaptation``: see ``restore_array``.
    """
    pixels = restore_array(model, picture.pixels, options, notify=notify, memory=memory, adaptation=adaptation)
    alpha = picture.alpha
    if alpha is not None and pixels.shape[:2] != alpha.shape:
        enlarged = imresize(
            torch.from_numpy(np.ascontiguousarray(alpha))[None, None], pixels.shape[0] // alpha.shape[0]
        )
        alpha = enlarged[0, 0].clamp(0, 1).numpy()
    return Picture(pixels, alpha, picture.grey, picture.bits, picture.icc)


def restore_files(
    model_source: str,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    variant: str | None = None,
    tile: int = AUTO,
    overlap: int = 32,
    scale: int = 0,
    steps: int = 0,
    kernel_variance: float = 0.0,
    budget_ms: float | None = None,
    budget_mem: str = "",
    compare: bool = False,
    kernel: str = "",
    noise: float = 0.0,
    back_projections: int = 0,
    ensemble: bool = False,
    batch: int = 1,
    settings: TrackingConfig | None = None,
    cache: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> int:
    """Restore pictures, and say what was done.

    Several pictures keep their names, formats and sub-folders below ``out``. Those that ``out``/restored.jsonl
    records with the same content, the same model and the same options, and whose result is still what was
    written, are not done again. A picture that cannot be read or restored does not stop the others.

    Args:
        model_source: see ``resolve_model``.
        source, out: see ``pipeline.places.plan``.
        variant, tile, overlap, scale, steps, kernel_variance, kernel, noise, back_projections, ensemble: see
            ``RestoreOptions``; the variant ``auto`` takes the deepest that fits ``budget_ms``.
        batch: MZSR alone: so many pictures adapt at once; see ``adapt_together``.
        budget_ms: milliseconds that a picture may take; implies the variant ``auto``.
        budget_mem: memory that a picture may take, as ``2G``; it is done in tiles that fit.
        compare: also write NAME.compare.png, before and after beside each other.

    Returns:
        0 all restored; 1 some pictures failed, each is named at the end; 2 refused before any work: no
        such model, input or option, or an output that would overwrite the input.
    """
    # What is said must not end up in a picture on the standard output.
    console = console or Console(stderr=str(out) == STREAM)

    def say(message: str) -> None:
        console.print(message, markup=False, highlight=False, soft_wrap=True)

    automatic = variant == AUTO_VARIANT or budget_ms is not None
    try:
        if automatic and variant not in (None, "", AUTO_VARIANT):
            raise ConfigError(f"--budget-ms chooses the variant; leave out --variant {variant}, or the budget")
        if compare and str(out) == STREAM:
            raise ConfigError("--compare writes a second picture beside OUT, which - has not")
        options = RestoreOptions(
            variant="" if automatic else variant or "",
            tile=tile,
            overlap=overlap,
            scale=scale,
            steps=steps,
            kernel_variance=kernel_variance,
            kernel=kernel,
            noise=noise,
            back_projections=back_projections,
            ensemble=ensemble,
        )
        if batch < 1:
            raise ConfigError(f"--batch {batch}: at least 1")
        memory = parse_bytes(budget_mem) if budget_mem else None
        sources = [source] if isinstance(source, str | Path) else source
        work = plan([str(one) for one in sources], str(out))
        model = resolve_model(model_source, settings, cache=cache, device=device, notify=say)
        options = resolve_options(model, options)
        if batch > 1 and not model.adapts:
            raise ConfigError(
                f"--batch {batch}: of MZSR, whose network adapts to each picture; this is {model.config.name}"
            )
        table = None
        if automatic:
            check_choice(model)
            table = measured_table(model, cache_root() / "measured", say)
        order = _Order(model, options, table, budget_ms, memory, compare, batch)
        record = Record(work.folder, order.request()) if work.folder is not None else None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return _refuse(faults)
    except (RegistryError, ExportError, ValueError, OSError) as error:
        return _refuse(str(error))
    used, skipped, failures = _restore_all(order, work.jobs, record, console, say)
    variants = next(iter(used), options.variant)
    if len(used) > 1:
        variants = " and ".join(f"{name} ({count})" for name, count in sorted(used.items()))
    already = f", {skipped} already done" if skipped else ""
    failed = f", {len(failures)} failed" if failures else ""
    how = model.config.name if variants == "default" else variants
    say(f"{used.total()} restored with {how}{already}{failed}: {out}")
    for name, message in failures:
        say(f"  failed: {name}: {message}")
    return 1 if failures else 0


@dataclass(frozen=True)
class _Order:
    """How pictures are to be restored. A ``table`` means that the budget chooses the variant of each."""

    model: LoadedModel
    options: RestoreOptions
    table: Mapping[str, float] | None
    budget_ms: float | None
    memory: int | None
    compare: bool
    batch: int

    def request(self) -> dict[str, Any]:
        """What makes results of two runs the same, in JSON."""
        asked = {"model": self.model.sha256, "compare": self.compare, **self.options.model_dump()}
        asked |= {"budget_ms": self.budget_ms, "budget_mem": self.memory}
        return asked | ({"variant": AUTO_VARIANT} if self.table is not None else {})


def _restore_all(
    order: _Order, jobs: Sequence[Job], record: Record | None, console: Console, say: Callable[[str], None]
) -> tuple[Counter[str], int, list[tuple[str, str]]]:
    """How many were done with each variant, how many were done before, and which failed and why."""
    used: Counter[str] = Counter()
    skipped = 0
    failures: list[tuple[str, str]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("restore", total=len(jobs))
            for start in range(0, len(jobs), order.batch):
                given: list[_Given] = []
                for job in jobs[start : start + order.batch]:
                    with _noted(job, failures):
                        if record is not None and record.holds(job):
                            skipped += 1
                        else:
                            data = job.given.read()
                            given.append(_Given(job, data, decode_picture(data)))
                for one, adaptation in zip(given, _adaptations(order, given)):

                    def notify(message: str, name: str = one.job.name) -> None:
                        say(f"{name}: {message}")

                    with _noted(one.job, failures):
                        used[_restore(order, one, adaptation, notify)] += 1
                        if record is not None:
                            record.add(one.job)
                progress.advance(task, min(order.batch, len(jobs) - start))
    finally:
        if record is not None:
            record.close()
    return used, skipped, failures


class _Given(NamedTuple):
    job: Job
    data: bytes
    picture: Picture


@contextlib.contextmanager
def _noted(job: Job, failures: list[tuple[str, str]]) -> Iterator[None]:
    """A picture that cannot be done goes into ``failures``; the others go on."""
    try:
        yield
    # torch says "out of memory" by RuntimeError
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        failures.append((job.name, str(error) or type(error).__name__))


def _adaptations(order: _Order, given: Sequence[_Given]) -> list[Adaptation | None]:
    """None where a picture is to see to it by itself: one at a time, and where all at once were too much."""
    if order.batch > 1 and given:
        with contextlib.suppress(RuntimeError, MemoryError, ValueError):
            return adapt_together(order.model, [one.picture.pixels for one in given], order.options)
    return [None] * len(given)


def _restore(order: _Order, given: _Given, adaptation: Adaptation | None, notify: Callable[[str], None]) -> str:
    """Do one job; return the variant that it was done with."""
    job, data, picture = given
    options = order.options
    if order.table is not None:
        height, width = picture.pixels.shape[:2]
        choice = choose_variant(order.model, order.table, height, width, order.budget_ms)
        notify(choice.why)
        options = options.model_copy(update={"variant": choice.variant})
    restored = restore_picture(order.model, picture, options, notify=notify, memory=order.memory, adaptation=adaptation)
    suffix = job.result.suffix or suffix_of(data)
    encoded = encode_picture(restored, suffix)
    if order.compare:
        job.result.beside(".compare").write(encode_picture(side_by_side(picture, restored), suffix))
    job.result.write(encoded)
    return options.variant


def _refuse(message: str) -> int:
    print(f"restore: {message}", file=sys.stderr)
    return 2
