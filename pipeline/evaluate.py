"""``ird evaluate``: one command that measures any model on any folder of clean pictures, under a named protocol."""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from datagen.config import SelectConfig
from datagen.dataset import code_version, read_dataset_json
from datagen.degradations.kernels import MZSR_SIZE, kernel_named
from datagen.picture.niqe import load_model as load_pristine
from datagen.picture.niqe import niqe
from datagen.picture.quality import luma
from datagen.select.exposure import exposed
from infra.config import Config, ConfigError
from infra.files import publish_atomically, write_atomically
from infra.storage import open_store
from infra.tracking import Tracker, TrackingConfig
from pipeline.evaluation_page import Crop, crops_of, write_page
from pipeline.evaluation_pictures import UNFINISHED, Restored, RestoredPictures
from pipeline.inference import LoadedModel, RestoreOptions, restore_array
from pipeline.restore import resolve_model
from training.adaptation import Assumption, enlarge
from training.benchmark import (
    Benchmark,
    Condition,
    bicubic,
    load_benchmark,
    picture_files,
    read_clean,
    tasks_of,
    to_batch,
    to_picture,
)
from training.metrics import Protocol
from training.models import scale_of, variants_of
from training.zero_shot import ZeroShotOptions, blur_of, enlarge_zero_shot, trained_for
from training.zssr import ZSSROptions, zssr

BICUBIC = "bicubic"
INPUT = "input"  # restoration's counterpart of bicubic: what went in, as it is
ZSSR = "zssr"  # trained from scratch on each picture

# Input uint8 [h,w,3] to result uint8 [H,W,3]; the second argument is told what a person should know.
Method = Callable[[np.ndarray, Callable[[str], None]], np.ndarray]


class EvaluateOptions(Config):
    """How a model is run and what is measured besides PSNR and SSIM."""

    model: str  # bicubic, input, zssr, an export folder, models:/NAME@ALIAS
    variant: str = ""
    tile: int = 512
    overlap: int = 32
    ensemble: bool = False  # mean over the eight flips and turns (EDSR+)
    # MZSR alone: steps of adaptation, 0 for none.
    steps: int = 10
    # MZSR and ZSSR: the blur that they assume, as ``ZeroShotOptions.kernel``, or "given" for the one that the pictures
    # are blurred with.
    assume: str = "given"
    back_projections: int = 0
    zssr: ZSSROptions = ZSSROptions()
    dataset: str = ""  # where the model's training data lies, to look for the benchmark's pictures in it
    niqe: bool = False
    lpips: str = ""  # a TorchScript file of a perceptual distance, of your own
    out: str = ""  # folder for table, page and run; empty: nothing is kept
    tracking: TrackingConfig = TrackingConfig()


class Evaluation(NamedTuple):
    """Rows, one a picture and task, and what they come to."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate_folder(benchmark: Benchmark, options: EvaluateOptions, console: Console) -> Evaluation:
    """Measure ``options.model`` on the pictures of ``benchmark``; say what is going on to ``console``.

    With ``options.out``: ``pictures.parquet`` (a row a picture), ``results.json`` (the summary), ``report.html`` with
    the best and the worst places, the restored pictures, and an MLflow run with the means. Interrupted and run again,
    it goes on with the next picture.

    Raises:
        ConfigError: pictures, model, protocol or options do not suit one another.
        ExportError, RegistryError: there is no such model.
    """
    protocol_name, protocol = benchmark.compared_by()
    files = picture_files(benchmark)
    scale, tasks = benchmark.condition.scale, tasks_of(benchmark.condition)
    status = console.status("")
    method, model = _method(benchmark, options, status)
    distance = _perceptual_distance(options.lpips) if options.lpips else None
    pristine = load_pristine() if options.niqe else None
    leaks = _leaks(files, options, model, console)
    rows: list[dict[str, Any]] = []
    crops: list[Crop] = []
    kept = None
    if options.out:
        kept = RestoredPictures(Path(options.out), _request(benchmark, options, model))
        if kept.known:
            told = f"goes on after an evaluation that was interrupted: {kept.known} restored already in {options.out}"
            console.print(f"{told}; delete {UNFINISHED} there to begin anew", markup=False, soft_wrap=True)
    with status:
        for (task, make_input), (name, path) in itertools.product(tasks.items(), files.items()):
            status.update(f"{len(rows) + 1} of {len(tasks) * len(files)}: {escape(name)}")
            clean = read_clean(path, scale)
            given = make_input(name, clean, benchmark.seed)
            made = kept.find(task, name, given) if kept else None
            if made is None:
                made = _restored(method, given)
                if kept:
                    kept.keep(task, name, given, made)
            restored = made.picture
            before = bicubic(given, scale) if scale > 1 else given
            row = {"task": task, "picture": name, "height": clean.shape[0], "width": clean.shape[1]}
            row |= _compared(protocol, restored, clean, scale)
            row |= {f"{key}_before": value for key, value in _compared(protocol, before, clean, scale).items()}
            row |= {"seconds": made.seconds, "leak": leaks.get(name, ""), "note": made.note}
            if pristine is not None:
                row["niqe"] = niqe(luma(restored), pristine, patches=None)
            if distance is not None:
                row["lpips"] = distance(restored, clean)
            rows.append(row)
            if kept:
                crops += crops_of(task, name, before, restored, clean)
            console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
    summary = _summary(rows, benchmark, protocol_name, options, model)
    _print(rows, summary, protocol, console)
    if kept:
        _keep(Path(options.out), rows, summary, crops, protocol, options)
        kept.finish()
        console.print(
            f"page, table, summary and restored pictures: {options.out}", markup=False, highlight=False, soft_wrap=True
        )
    return Evaluation(rows, summary)


def _restored(method: Method, given: np.ndarray) -> Restored:
    notes: list[str] = []
    started = time.perf_counter()
    picture = method(given, notes.append)
    return Restored(picture, time.perf_counter() - started, "; ".join(notes))


def _request(benchmark: Benchmark, options: EvaluateOptions, model: LoadedModel | None) -> dict[str, Any]:
    """All that a restored picture depends on besides what went in."""
    measured = {"dataset", "niqe", "lpips", "out", "tracking"}
    request = options.model_dump(mode="json", exclude=measured)
    request |= {"model_sha256": model.sha256 if model else "", "version": code_version()}
    return request | {"condition": benchmark.condition.model_dump(mode="json")}


def _compared(protocol: Protocol, restored: np.ndarray, clean: np.ndarray, scale: int) -> dict[str, float]:
    if restored.shape != clean.shape:
        raise ConfigError(f"the model made {restored.shape[:2]} of a picture of {clean.shape[:2]}: not of this scale")
    return protocol.compare(restored, clean, scale)


def _method(benchmark: Benchmark, options: EvaluateOptions, status: Status) -> tuple[Method, LoadedModel | None]:
    scale = benchmark.condition.scale
    if options.model == BICUBIC:
        if scale == 1:
            raise ConfigError("--model bicubic: enlarges, so it needs --scale; the unrestored input is --model input")
        return lambda given, notify: bicubic(given, scale), None
    if options.model == INPUT:
        if scale > 1:
            raise ConfigError("--model input: of restoration at the same size; for enlarging give --model bicubic")
        return lambda given, notify: given, None
    if options.model == ZSSR:
        if scale == 1:
            raise ConfigError("--model zssr: enlarges, so it needs --scale")
        return _zssr(benchmark.condition, options, status), None
    model = resolve_model(options.model, options.tracking)
    if model.adapts:
        if scale == 1:
            raise ConfigError(f"{options.model}: MZSR enlarges, give --scale")
        return _zero_shot(model, benchmark, options), model
    variant = options.variant or _variant(model, scale, options.model)
    of_model = scale_of(model.config, variant)
    if of_model != scale:
        raise ConfigError(f"{options.model}: makes pictures {of_model} times as large, --scale is {scale}")
    settings = RestoreOptions(variant=variant, tile=options.tile, overlap=options.overlap, ensemble=options.ensemble)

    def restore(given: np.ndarray, notify: Callable[[str], None]) -> np.ndarray:
        restored = restore_array(model, given.astype(np.float32) / 255, settings, notify=notify)
        return to_picture(torch.from_numpy(restored).permute(2, 0, 1)[None])

    return restore, model


def _variant(model: LoadedModel, scale: int, name: str) -> str:
    variants = variants_of(model.config)
    if model.config.name != "mdsr":
        return variants[-1]
    if f"x{scale}" not in variants:
        raise ConfigError(f"{name}: has {', '.join(variants)}, --scale is {scale}")
    return f"x{scale}"


def _zero_shot(model: LoadedModel, benchmark: Benchmark, options: EvaluateOptions) -> Method:
    condition, trained = benchmark.condition, trained_for(model.metadata)
    large_scale = model.metadata.get("stage") == "mzsr_large_scale"
    adapts = options.steps > 0 and not large_scale
    if adapts and trained["scale"] != condition.scale:
        raise ConfigError(f"{options.model}: was trained for x{trained['scale']}, --scale is {condition.scale}")
    kernel, assumed = _blur(condition, options)
    settings = ZeroShotOptions(
        scale=condition.scale,
        steps=max(options.steps, 1),
        kernel=assumed,
        subsample=condition.subsample,
        alignment=trained["alignment"],
        inner_lr=trained["inner_lr"],
        noise=condition.sigma,
        back_projections=options.back_projections,
        ensemble=options.ensemble,
    )
    network = model.network
    device = next(network.parameters()).device
    # The large-scale phase knows pictures enlarged by bicubic, and no shift.
    unadapted = Assumption(condition.subsample, "aligned" if large_scale else trained["alignment"])

    def restore(given: np.ndarray, notify: Callable[[str], None]) -> np.ndarray:
        image = to_batch(given).to(device)
        if not adapts:
            return to_picture(
                enlarge(network, dict(network.named_parameters()), image, settings.scale, unadapted).cpu()
            )
        return to_picture(enlarge_zero_shot(network, image, settings, kernel=kernel, notify=notify).cpu())

    return restore


def _blur(condition: Condition, options: EvaluateOptions) -> tuple[torch.Tensor | None, str]:
    """The blur that the pictures are known to have, or what ``ZeroShotOptions.kernel`` makes of each."""
    if options.assume != "given":
        return None, options.assume
    # A picture that bicubic shrank has no blur before that: the identity says so.
    return kernel_named(condition.kernel).float() if condition.kernel else torch.ones(1, 1), ""


def _zssr(condition: Condition, options: EvaluateOptions, status: Status) -> Method:
    kernel, assumed = _blur(condition, options)
    wanted = ZeroShotOptions(scale=condition.scale, kernel=assumed, subsample=condition.subsample)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def restore(given: np.ndarray, notify: Callable[[str], None]) -> np.ndarray:
        image = to_batch(given).to(device)
        if min(image.shape[-2:]) < MZSR_SIZE * condition.scale:
            notify("too small to train on; enlarged by bicubic")
            return bicubic(given, condition.scale)
        blur = (blur_of(image, wanted) if kernel is None else kernel).to(image)
        at = status.status
        trained = zssr(
            image,
            blur,
            condition.scale,
            options.zssr,
            wanted.assumption,
            tell=lambda text: status.update(f"{at}, {text}"),
        )
        notify(f"{trained.steps} steps")
        return to_picture(trained.picture.cpu())

    return restore


def _perceptual_distance(path: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """LPIPS and its kin need weights that are not ours to ship: a TorchScript file takes two [1,3,H,W] in [-1, 1]."""
    if not Path(path).is_file():
        raise ConfigError(
            f"--lpips {path}: no such file. LPIPS compares features of a network whose weights do not come with ird: "
            "give a TorchScript file that takes two float pictures [1,3,H,W] in [-1, 1] and returns one distance"
        )
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ConfigError(f"--lpips {path}: not a TorchScript file ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def distance(restored: np.ndarray, clean: np.ndarray) -> float:
        return float(network(to_batch(restored) * 2 - 1, to_batch(clean) * 2 - 1))

    return distance


def _leaks(
    files: dict[str, Path], options: EvaluateOptions, model: LoadedModel | None, console: Console
) -> dict[str, str]:
    """Pictures of the benchmark that the model's dataset holds, and which pictures of it they are."""
    trained_on = model.metadata.get("dataset_id", "") if model else ""
    if not options.dataset:
        if trained_on:
            console.print(
                f"not checked for leaks: the model was trained on dataset {trained_on}; --dataset says where it lies",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        return {}
    store = open_store(options.dataset)
    found = read_dataset_json(store)["id"]
    if trained_on and found != trained_on:
        raise ConfigError(f"--dataset {options.dataset}: is {found}, the model was trained on {trained_on}")
    pictures = {name: path.read_bytes() for name, path in files.items()}
    leaks: dict[str, str] = {}
    for name, source, how, _ in exposed(store, pictures, SelectConfig()):
        leaks.setdefault(name, f"{source} ({how})")
        console.print(f"LEAK: {name} is in the training data: {source} ({how})", markup=False, soft_wrap=True)
    return leaks


def _line(row: dict[str, Any]) -> str:
    return f"{row['task']} {row['picture']}: {row['psnr']:.2f} dB {row['ssim']:.4f}" + f"  {row['note']}" * bool(
        row["note"]
    )


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = [
        name for name in ("psnr", "ssim", "psnr_before", "ssim_before", "niqe", "lpips", "seconds") if name in rows[0]
    ]
    values = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in names}
    return {name: float(np.mean(found)) if found else math.nan for name, found in values.items()}


def _summary(
    rows: list[dict[str, Any]],
    benchmark: Benchmark,
    protocol: str,
    options: EvaluateOptions,
    model: LoadedModel | None,
) -> dict[str, Any]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    leaked = sorted({row["picture"] for row in rows if row["leak"]})
    summary: dict[str, Any] = {
        **_means(rows),
        "pictures": len({row["picture"] for row in rows}),
        "protocol": protocol,
        "scale": benchmark.condition.scale,
        "model": options.model,
        "model_sha256": model.sha256 if model else "",
        "dataset_id": model.metadata.get("dataset_id", "") if model else "",
        "folder": benchmark.folder,
        "condition": benchmark.condition.model_dump(mode="json"),
        "ensemble": options.ensemble,
        "leaks": leaked,
    }
    if options.model == ZSSR:
        summary |= {"zssr": options.zssr.model_dump(mode="json"), "assume": options.assume}
    if model is not None and model.adapts:
        summary |= {"steps": options.steps, "assume": options.assume, "back_projections": options.back_projections}
        summary["alignment"] = trained_for(model.metadata)["alignment"]
    if len(tasks) > 1:
        summary["tasks"] = {task: _means([row for row in rows if row["task"] == task]) for task in tasks}
    unseen = [row for row in rows if not row["leak"]]
    if leaked and unseen:
        summary["without_leaks"] = _means(unseen)
    return summary


def _print(rows: list[dict[str, Any]], summary: dict[str, Any], protocol: Protocol, console: Console) -> None:
    before = "bicubic" if summary["scale"] > 1 else "input"
    more = [name for name in ("niqe", "lpips") if name in rows[0]]
    table = Table(
        title=f"{summary['model']} on {summary['folder']}", caption=f"{summary['protocol']}: {protocol.about}"
    )
    table.add_column("picture")
    for name in ("PSNR dB", "SSIM", f"PSNR {before}", "gain dB", *(name.upper() for name in more), "s"):
        table.add_column(name, justify="right")

    def add(name: str, row: dict[str, Any], **style: Any) -> None:
        values = [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['psnr_before']:.2f}"]
        values += [f"{row['psnr'] - row['psnr_before']:+.2f}", *(f"{row[name]:.3f}" for name in more)]
        table.add_row(name, *values, f"{row['seconds']:.2f}", **style)

    several = "tasks" in summary
    for row in rows:
        name = f"{row['task']} {row['picture']}" if several else row["picture"]
        add(name + " (LEAK)" * bool(row["leak"]), row)
    table.add_section()
    for task, means in summary.get("tasks", {}).items():
        add(f"mean of {task}", means)
    add("mean", summary, style="bold")
    if "without_leaks" in summary:
        add("mean without leaks", summary["without_leaks"])
    console.print(table)


def _keep(
    out: Path,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    crops: list[Crop],
    protocol: Protocol,
    options: EvaluateOptions,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with publish_atomically(out / "pictures.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    write_atomically(out / "results.json", to_json(summary).encode())
    write_page(out / "report.html", rows, summary, crops, protocol)
    tracker = Tracker(options.tracking, f"evaluate {Path(summary['folder']).name}", out)
    tracker.log_params({**options.model_dump(mode="json", exclude={"tracking"}), "condition": summary["condition"]})
    tracker.set_tags({"ird.stage": "evaluate", "ird.dataset_id": summary["dataset_id"]})
    tracker.log_metrics(_means(rows), step=0)
    for name in ("report.html", "results.json", "pictures.parquet"):
        tracker.log_artifact(out / name)
    tracker.finish()


def to_json(summary: dict[str, Any]) -> str:
    """One JSON object; what is not a number (PSNR of equal pictures is infinite) becomes null, as JSON has it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(summary), indent=2, allow_nan=False)


def evaluate_from_command_line(
    folder: str, condition: dict[str, Any], protocol: str, seed: int, options: dict[str, Any], *, as_json: bool
) -> int:
    """The command: a table on the terminal, or one JSON object alone on standard output. Returns the exit code, 0.

    Args:
        folder: of clean pictures, or a benchmark's name or file, which then says all that ``condition`` leaves out.
        condition: what is not 0 or empty of ``Condition``.

    Raises:
        ConfigError: any of it is refused.
    """
    given = {name: value for name, value in condition.items() if value}
    try:
        if Path(folder).is_dir():
            benchmark = Benchmark(
                folder=folder, condition=Condition.model_validate(given), protocol=protocol, seed=seed
            )
        else:
            registered = load_benchmark(folder).model_dump()
            registered["condition"] |= given
            registered |= {"protocol": protocol or registered["protocol"], "seed": seed or registered["seed"]}
            benchmark = Benchmark.model_validate(registered)
        chosen = EvaluateOptions.model_validate(options)
    except ValidationError as error:
        raise ConfigError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None
    evaluation = evaluate_folder(benchmark, chosen, Console(stderr=as_json))
    if as_json:
        print(to_json(evaluation.summary), flush=True)
    return 0
