"""``ird``: one command with a subcommand for each thing that a person runs.

Imports of the floors below stand inside the commands, so that ``ird --help`` answers at once.
"""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.registry.commands import app as registry_app
from pipeline.studies import app as study_app
from pipeline.track import app as track_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Curate image-restoration corpora, co-pretrain DyNet on them, restore pictures from the model registry.",
)
app.add_typer(registry_app, name="registry")
app.add_typer(study_app, name="study")
app.add_typer(track_app, name="track")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace those of the file.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with the settings.")]


@app.command(
    epilog="Examples:\n\n`ird demo`\n\n`ird demo --source ~/photographs --out runs/mine`\n\n`ird demo ranks=1`",
)
def demo(
    source: Annotated[
        str, typer.Option(help="Folder of your own pictures; default: those that come with the dependencies.")
    ] = "",
    out: Annotated[str, typer.Option(help="Folder for everything that is made.")] = "",
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """The whole mission once: curate, shard, train, evaluate, register, pull, restore, report.

    Minutes on two CPU cores. Interrupt it and run it again: it goes on where it was.
    """
    from pipeline.demo import load_demo_config, run_demo
    from pipeline.resumable import resumable

    given = [f"source={source}"] * bool(source) + [f"out={out}"] * bool(out) + (overrides or [])
    settings = load_demo_config(config, given)
    with resumable():
        report = run_demo(settings, say=lambda line: print(line, flush=True))
    root = report.parent
    print(f"\nMade in {root}:")
    for what, where in (
        ("report", report),
        ("dataset (WebDataset shards)", root / "dataset" / "out"),
        ("DyNet weights, both variants", root / "finetune" / "out" / "export"),
        ("restored pictures", root / "restore" / "comparison.png"),
        ("registered model", f"models:/{settings.model_name}@{settings.alias}"),
    ):
        print(f"  {what:<30} {where}")
    from infra.tracking import tracking_uri

    print(f"  {'runs: mlflow ui':<30} --backend-store-uri {tracking_uri(settings.tracking)}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example:\n\n`ird datagen build --config configs/datagen/demo.yaml out=runs/dataset`",
)
def datagen(context: typer.Context) -> None:
    """Curate and shard a corpus; without arguments it lists its commands (the same as `python -m datagen`)."""
    from datagen.__main__ import main as datagen_main

    raise typer.Exit(datagen_main(context.args))


@app.command(
    epilog="Example:\n\n`ird train pretrain --ranks 2 --config configs/training/pretrain_demo.yaml out=runs/pretrain`",
)
def train(
    stage: Annotated[str, typer.Argument(help="pretrain, finetune, edsr, mdsr or mzsr.")],
    config: Annotated[Path, typer.Option("--config", help="YAML file, see configs/training/.")],
    ranks: Annotated[
        int | None, typer.Option(help="Processes on this host; default: one for each accelerator.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile for several hosts.")] = None,
    overrides: Overrides = None,
) -> None:
    """Run a training stage under the `deepspeed` launcher, and end all its processes with it.

    Exit codes: 0 finished, 2 refused, 75 told to stop and saved, 69 a rank or its host was lost (both: run it again).
    """
    from infra.config import ConfigError, load_config
    from infra.launcher import StageFailed, run_deepspeed
    from training.config import StageConfig
    from training.edsr import EDSRStageConfig
    from training.mdsr import MDSRStageConfig
    from training.mzsr import MZSRStageConfig
    from training.pretrain import PretrainConfig

    schemas: dict[str, type[StageConfig]] = {
        "pretrain": PretrainConfig,
        "finetune": PretrainConfig,
        "edsr": EDSRStageConfig,
        "mdsr": MDSRStageConfig,
        "mzsr": MZSRStageConfig,
    }
    if stage not in schemas:
        raise ConfigError(f"stage {stage!r}: one of {', '.join(schemas)}")
    out = Path(load_config(schemas[stage], config, overrides or []).out)  # refused here, before any launch
    try:
        run_deepspeed(f"training.{stage}", config, overrides or [], out, ranks=ranks, hostfile=hostfile)
    except StageFailed as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(failure.code) from None


@app.command(
    epilog="Examples:\n\n`ird restore --model models:/ird-demo@demo --variant small noisy.png clean.png`\n\n"
    "`ird restore --model runs/demo/finetune/out/export --budget-ms 500 --compare noisy/ restored/`\n\n"
    "`ird restore --model models:/ird-demo@demo 'scans/**/*.tif' s3://bucket/restored`\n\n"
    "`curl -s https://…/noisy.jpg | ird restore --model models:/ird-demo@demo - - > clean.jpg`",
)
def restore(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="IN... OUT",
            help="IN: pictures, folders, patterns, s3:// objects or prefixes, or - (standard input). "
            "OUT: a file name, a folder, s3://, or -.",
        ),
    ],
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, or an export folder.")],
    variant: Annotated[
        str, typer.Option(help="small or large for DyNet, depths as [2,4,4,6], or auto: the deepest in the budget.")
    ] = "",
    budget_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that a picture may take; chooses the variant.")
    ] = None,
    budget_mem: Annotated[
        str, typer.Option(help="Memory that a picture may take, as 2G; default: half of the free.")
    ] = "",
    tile: Annotated[
        int, typer.Option(help="Side of tiles, pixels; 0: always whole; -1: whole where memory allows, else tiles.")
    ] = -1,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 32,
    compare: Annotated[bool, typer.Option("--compare", help="Also write NAME.compare.png: before and after.")] = False,
    scale: Annotated[int, typer.Option(help="MZSR: how much to enlarge; 0: what it was trained for.")] = 0,
    steps: Annotated[int, typer.Option(help="MZSR: gradient steps on each picture; 0: one, as in the paper.")] = 0,
    kernel_variance: Annotated[float, typer.Option(help="MZSR: variance of the assumed blur, px^2; 0: the scale.")] = 0,
    kernel: Annotated[str, typer.Option(help="MZSR: estimate, a blur as 4,1,-0.5, or several: '1;2;4'.")] = "",
    noise: Annotated[float, typer.Option(help="MZSR: sigma of the noise in the pictures, levels of 255.")] = 0,
    back_projections: Annotated[int, typer.Option(help="MZSR: after the enlargement.")] = 0,
    batch: Annotated[int, typer.Option(help="MZSR: pictures that adapt at once; for GPUs and small pictures.")] = 1,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Mean over eight flips and turns, 8 times the cost.")
    ] = False,
) -> None:
    """Restore pictures with a model from the registry or from an export folder."""
    from infra.config import ConfigError

    if len(paths) < 2:
        raise ConfigError("give IN and OUT; see `ird restore --help`")
    from pipeline.restore import restore_files

    code = restore_files(
        model,
        paths[:-1],
        paths[-1],
        variant=variant or None,
        tile=tile,
        overlap=overlap,
        scale=scale,
        steps=steps,
        kernel_variance=kernel_variance,
        kernel=kernel,
        noise=noise,
        back_projections=back_projections,
        ensemble=ensemble,
        batch=batch,
        budget_ms=budget_ms,
        budget_mem=budget_mem,
        compare=compare,
    )
    raise typer.Exit(code)


@app.command(
    epilog="Examples:\n\n`ird serve --model models:/ird-demo@demo`\n\n"
    "`ird serve --model models:/ird-demo@demo --model runs/demo/edsr/out/export --port 8091`"
)
def serve(
    model: Annotated[list[str], typer.Option(help="As of `ird restore`; may be given several times.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8090,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name that people reach it by, where that is not this machine's.")
    ] = None,
    max_mib: Annotated[float, typer.Option(help="Size of a file, MiB.")] = 20,
    max_pixels: Annotated[int, typer.Option(help="Size of a picture, pixels.")] = 4_000_000,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; further ones get 429.")] = 8,
    workers: Annotated[int, typer.Option(help="Pictures at work at a time.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds until a request gets 503.")] = 60,
    budget_mem: Annotated[str, typer.Option(help="Memory that a picture may take, as 2G.")] = "",
) -> None:
    """Restore over HTTP, with a page to drop a picture on; on this machine alone unless --host says otherwise."""
    import os

    # OpenCV's own guard against decompression bombs, read when it is loaded.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(max_pixels))
    from pipeline.serve import serve as run
    from pipeline.serve import serving

    names = {"host": host, "port": port, "max_bytes": int(max_mib * 2**20), "max_pixels": max_pixels}
    names |= {"waiting": waiting, "workers": workers, "timeout": timeout}
    run(*serving(model, allow_host or [], budget_mem, names))


@app.command(
    epilog="Examples:\n\n`ird degrade clean.png degraded.png --recipe all_in_one_3 --seed 7`\n\n"
    "`ird degrade photographs/ degraded/ --recipe composite_weather`\n\n"
    "`ird degrade --replay degraded.png.json clean.png again.png`\n\n"
    "`ird degrade --gallery gallery.html --source clean.png`",
)
def degrade(
    source: Annotated[Path | None, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")] = None,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="A file name, or a folder; NAME.json beside a result says what was done."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Name in configs/degradations/, or a path; default: all_in_one_3.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other degradations.")] = 0,
    replay: Annotated[
        Path | None, typer.Option(metavar="META.json", help="Do to IN what this file says was done before.")
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write a page (.html) or picture (.png, .jpg) of every degradation."),
    ] = None,
    shown: Annotated[Path | None, typer.Option("--source", help="With --gallery: the picture to show.")] = None,
) -> None:
    """Degrade pictures by a recipe, and write down what was done so that it can be replayed."""
    from infra.config import ConfigError

    if gallery is not None and (source is not None or replay is not None):
        raise ConfigError("--gallery takes no IN, no OUT and no --replay; name a picture with --source")
    if gallery is None and shown is not None:
        raise ConfigError("--source goes with --gallery; otherwise give the picture as IN")
    if gallery is None and (source is None or out is None):
        raise ConfigError("give IN and OUT, or --gallery OUT; see `ird degrade --help`")
    if replay is not None and recipe is not None:
        raise ConfigError("--replay needs no --recipe: what is done stands in its file")
    from pipeline import degrade as work

    if gallery is not None:
        work.gallery(gallery, shown, recipe)
    elif source is not None and out is not None:
        if replay is not None:
            work.replay_file(replay, source, out)
        else:
            raise typer.Exit(work.degrade_files(source, out, recipe or work.DEFAULT_RECIPE, seed))


@app.command(
    "import-checkpoint",
    epilog="Examples:\n\n`ird import-checkpoint dynet model.ckpt --out runs/dynet`\n\n"
    "`ird import-checkpoint basicsr-edsr EDSR_Lx2.pth --out runs/edsr`",
)
def import_checkpoint(
    kind: Annotated[str, typer.Argument(help="dynet, promptir, edsr, mdsr or basicsr-edsr.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".pth, .ckpt or .safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder of the export, for `ird restore --model` and `ird registry push`.")],
    residual_scale: Annotated[float | None, typer.Option(help="Of EDSR and MDSR, where the file cannot tell.")] = None,
    image_range: Annotated[float | None, typer.Option(help="White, as the network was trained: 1 or 255.")] = None,
    mean: Annotated[str, typer.Option(help="Subtracted from the picture, white being 1: R,G,B.")] = "",
) -> None:
    """Read a checkpoint of a public implementation; strict, with a table of what did not fit."""
    from typing import get_args

    from infra.config import ConfigError
    from training.public_checkpoints import ImportOptions
    from training.public_names import Kind

    kinds: tuple[Kind, ...] = get_args(Kind)
    known = next((one for one in kinds if one == kind), None)
    if known is None:
        raise ConfigError(f"{kind!r} is no kind of checkpoint; expected one of {', '.join(kinds)}")
    try:
        means = tuple(float(value) for value in mean.split(",")) if mean else None
    except ValueError:
        raise ConfigError(f"--mean {mean!r}: expected numbers as 0.45,0.44,0.40") from None
    from pipeline.checkpoints import import_checkpoint as run

    options = ImportOptions(residual_scale=residual_scale, image_range=image_range, mean=means)
    raise typer.Exit(run(known, file, out, options))


@app.command(epilog="Example:\n\n`ird export runs/finetune/export restore.onnx --format onnx --variant small`")
def export(
    model: Annotated[str, typer.Argument(help="An export folder, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file, or a folder to put it in.")],
    format: Annotated[str, typer.Option(help="onnx (for ONNX runtimes) or torch (.pt2, torch.export).")] = "onnx",
    variant: Annotated[str, typer.Option(help="A name, or depths as [2,4,4,6]; default: the model's last.")] = "",
) -> None:
    """Write one variant for other runtimes, any picture size, checked against the model itself."""
    from infra.config import ConfigError
    from training.portable import SUFFIXES

    if format not in SUFFIXES:
        raise ConfigError(f"--format {format!r}: expected one of {', '.join(SUFFIXES)}")
    from pipeline.checkpoints import export_model

    export_model(model, out, format, variant)


@app.command(epilog="Examples:\n\n`ird models --size 224`\n\n`ird models --size 128 --measure`")
def models(
    size: Annotated[int, typer.Option(help="Side of the picture that costs are counted for, pixels.")] = 224,
    measure: Annotated[bool, typer.Option("--measure", help="Add each one's latency here; takes minutes.")] = False,
) -> None:
    """List models and variants with their parameters, multiply-accumulates and memory."""
    from pipeline.models import print_models

    print_models(size, measure)


@app.command(
    epilog="Examples:\n\n`ird evaluate --model bicubic --scale 2 benchmarks/set5`\n\n"
    "`ird evaluate --model runs/edsr/export --scale 2 --protocol sr-y benchmarks/set5 --json`\n\n"
    "`ird evaluate --model models:/dynet@champion --sigma 25 benchmarks/cbsd68 --out runs/cbsd68`\n\n"
    "`ird evaluate --model runs/mzsr_meta/export --scale 2 --kernel g_2.0 --subsample direct --steps 1 set5/`\n\n"
    "`ird evaluate --config configs/training/evaluate_demo.yaml out=runs/evaluate`",
)
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="FOLDER", help="Clean pictures, or a benchmark: a name in configs/benchmarks, a .yaml."),
    ] = None,
    model: Annotated[str, typer.Option(help="bicubic, input, zssr, an export folder, or models:/NAME@ALIAS.")] = "",
    scale: Annotated[int, typer.Option(help="Super-resolution: how much smaller the pictures are made.")] = 0,
    protocol: Annotated[str, typer.Option(help="sr-y (default), sr-rgb, sr-div2k, …; rgb (default), y.")] = "",
    kernel: Annotated[str, typer.Option(help="Blur first: g_2.0, a variance in px^2, or var1,var2,theta.")] = "",
    subsample: Annotated[str, typer.Option(help="Super-resolution: bicubic or direct.")] = "",
    sigma: Annotated[float, typer.Option(help="Gaussian noise, levels of 255, drawn by the picture's name.")] = 0,
    recipe: Annotated[str, typer.Option(help="Restoration: each chain of this recipe is a task.")] = "",
    chains: Annotated[str, typer.Option(help="Only these chains of the recipe: noise_25,rain.")] = "",
    variant: Annotated[str, typer.Option(help="Of DyNet; MDSR's follows from the scale.")] = "",
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Mean over eight flips and turns (EDSR+).")] = False,
    steps: Annotated[int, typer.Option(help="MZSR: steps of adaptation, 0 to 10.")] = 10,
    assume: Annotated[
        str, typer.Option(help="MZSR, ZSSR: given, estimate, or blurs to choose from: '1.0;2.0'.")
    ] = "given",
    zssr_steps: Annotated[int, typer.Option(help="ZSSR: at most so many on each picture; they take minutes.")] = 3000,
    zssr_bf16: Annotated[bool, typer.Option("--zssr-bf16", help="ZSSR: train in bfloat16.")] = False,
    back_projections: Annotated[int, typer.Option(help="MZSR: after the enlargement.")] = 0,
    dataset: Annotated[str, typer.Option(help="The model's training data, to look for these pictures in it.")] = "",
    niqe: Annotated[bool, typer.Option("--niqe", help="Also the score without reference.")] = False,
    lpips: Annotated[str, typer.Option(metavar="FILE", help="Also a perceptual distance: your TorchScript.")] = "",
    seed: Annotated[int, typer.Option(help="Another seed draws other noise.")] = 0,
    out: Annotated[
        str, typer.Option(help="Keep table, page with best and worst places, the pictures, and an MLflow run.")
    ] = "",
    tile: Annotated[int, typer.Option(help="Side of the tiles, pixels; 0: whole pictures.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with the means on standard output.")] = False,
    config: ConfigFile = None,
) -> None:
    """Measure a model on a folder of clean pictures: PSNR and SSIM under a named protocol, leaks, best and worst."""
    from infra.config import ConfigError, load_config

    if config is not None:
        from training.evaluate import EvaluateConfig
        from training.evaluate import evaluate as run_config

        raise typer.Exit(run_config(load_config(EvaluateConfig, config, arguments or [])))
    if not model or len(arguments or []) != 1:
        raise ConfigError("give --model and one FOLDER, or --config FILE; see `ird evaluate --help`")
    from pipeline.evaluate import evaluate_from_command_line
    from pipeline.resumable import resumable

    given = {"scale": scale, "kernel": kernel, "subsample": subsample, "sigma": sigma, "recipe": recipe}
    given["chains"] = tuple(chains.split(",")) if chains else ()
    options = {"model": model, "variant": variant, "ensemble": ensemble, "steps": steps, "assume": assume}
    options |= {"back_projections": back_projections, "dataset": dataset, "niqe": niqe, "lpips": lpips, "out": out}
    options |= {"tile": tile, "zssr": {"steps": zssr_steps, "bf16": zssr_bf16}}
    (folder,) = arguments or []
    with resumable() if out else contextlib.nullcontext():
        code = evaluate_from_command_line(folder, given, protocol, seed, options, as_json=as_json)
    raise typer.Exit(code)


@app.command(epilog="Example:\n\n`ird report runs/demo`")
def report(root: Annotated[Path, typer.Argument(help="Folder of a demo run.")]) -> None:
    """Write the self-contained HTML page of a run anew."""
    from pipeline.report import write_report

    print(write_report(root, root / "report.html"))


@app.command(
    epilog="Examples:\n\n`ird curves runs/pretrain`\n\n"
    "`ird curves runs/alternate runs/sandwich --over device_hours --out compared.png`",
)
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders that training stages write (out=), finished or not.")],
    over: Annotated[Literal["step", "device_hours"], typer.Option(help="What stands on the x axis.")] = "step",
    out: Annotated[Path, typer.Option(help="The picture, .png or .pdf.")] = Path("curves.png"),
) -> None:
    """Draw loss and held-out PSNR of a training run, or of several over each other."""
    from pipeline.curves import draw_curves

    draw_curves(runs, out, over)
    print(out)


@app.command(epilog="Examples:\n\n`ird doctor`\n\n`ird doctor --hostfile hostfile --s3 s3://bucket/prefix`")
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile whose hosts must answer.")] = None,
    s3: Annotated[str | None, typer.Option(help="s3:// prefix that must be reachable.")] = None,
) -> None:
    """Check this machine and print the fix for what is wrong."""
    from infra.doctor import print_report, run_checks

    raise typer.Exit(print_report(run_checks(hostfile=hostfile, s3_uri=s3)))


@app.command(
    epilog="Examples:\n\n`ird trace models:/ird-demo@demo`\n\n`ird trace models:/ird-demo/1 --json`\n\n"
    "`ird trace photographs/a.jpg --dataset runs/dataset`",
)
def trace(
    target: Annotated[
        str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION; or a picture: its path, uri or sha256.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix of the dataset; for a model: where the run read it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Follow a model back to its pictures, or a picture to the samples, shards and models that hold it."""
    import json

    from infra.config import ConfigError
    from infra.tracking import TrackingConfig
    from pipeline import lineage

    settings = TrackingConfig()
    if target.startswith("models:"):
        traced = lineage.trace_model(target, settings, dataset)
        text, whole = lineage.describe_model(traced), not traced["gaps"]
    elif dataset is None:
        raise ConfigError("a picture is looked for in a dataset: give --dataset")
    else:
        traced = lineage.trace_picture(target, dataset, settings)
        text, whole = lineage.describe_picture(traced), traced["found"]
    print(json.dumps(traced, default=str) if as_json else text)
    raise typer.Exit(0 if whole else 1)


def main() -> None:
    """Entry point of the ``ird`` command: refusals are one clear message and exit code 2, never a traceback."""
    from infra.errors import Refusal

    try:
        app()
    except Refusal as refusal:
        print(f"ird: {refusal}", file=sys.stderr)
        sys.exit(2)
