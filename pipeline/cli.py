"""``ird``: one command with a subcommand for each thing that a person runs.

Imports of the floors below stand inside the commands, so that ``ird --help`` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.track import app as track_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    help="Curate image-restoration corpora, co-pretrain DyNet on them, restore pictures from the model registry.",
)
registry_app = typer.Typer(no_args_is_help=True, help="Models in the MLflow registry: push, list, pull, alias.")
app.add_typer(registry_app, name="registry")
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
    from infra.launcher import StageFailed
    from pipeline.demo import load_demo_config, run_demo

    given = [f"source={source}"] * bool(source) + [f"out={out}"] * bool(out) + (overrides or [])
    settings = load_demo_config(config, given)
    try:
        report = run_demo(settings, say=lambda line: print(line, flush=True))
    except StageFailed as failure:
        print(f"\n{failure}\nRun the same command again to go on from this stage.", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None
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
    stage: Annotated[str, typer.Argument(help="pretrain, finetune, edsr or mzsr.")],
    config: Annotated[Path, typer.Option("--config", help="YAML file, see configs/training/.")],
    ranks: Annotated[
        int | None, typer.Option(help="Processes on this host; default: one for each accelerator.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile for several hosts.")] = None,
    overrides: Overrides = None,
) -> None:
    """Run a training stage under the `deepspeed` launcher, and end all its processes with it."""
    from infra.config import ConfigError, load_config
    from infra.launcher import StageFailed, run_deepspeed
    from training.config import StageConfig
    from training.edsr import EDSRStageConfig
    from training.mzsr import MZSRStageConfig
    from training.pretrain import PretrainConfig

    schemas: dict[str, type[StageConfig]] = {
        "pretrain": PretrainConfig,
        "finetune": PretrainConfig,
        "edsr": EDSRStageConfig,
        "mzsr": MZSRStageConfig,
    }
    if stage not in schemas:
        raise ConfigError(f"stage {stage!r}: one of {', '.join(schemas)}")
    out = Path(load_config(schemas[stage], config, overrides or []).out)  # refused here, before any launch
    try:
        run_deepspeed(f"training.{stage}", config, overrides or [], out, ranks=ranks, hostfile=hostfile)
    except StageFailed as failure:
        print(failure, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command(
    epilog="Examples:\n\n`ird restore --model models:/ird-demo@demo --variant small noisy.png clean.png`\n\n"
    "`ird restore --model runs/demo/finetune/out/export --variant large noisy/ restored/`",
)
def restore(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A picture, or a folder of pictures.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file name, or a folder.")],
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, or an export folder.")],
    variant: Annotated[str, typer.Option(help="Which variant of the model: small or large for DyNet.")] = "",
    tile: Annotated[int, typer.Option(help="Side of the tiles that large pictures are restored in, pixels.")] = 512,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share.")] = 32,
    scale: Annotated[int, typer.Option(help="MZSR: how much to enlarge; 0: what it was trained for.")] = 0,
    kernel_variance: Annotated[float, typer.Option(help="MZSR: variance of the assumed blur, px^2; 0: the scale.")] = 0,
) -> None:
    """Restore pictures with a model from the registry or from an export folder."""
    from pipeline.restore import restore_files

    code = restore_files(
        model,
        source,
        out,
        variant=variant or None,
        tile=tile,
        overlap=overlap,
        scale=scale,
        kernel_variance=kernel_variance,
    )
    raise typer.Exit(code)


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


@app.command(epilog="Example:\n\n`ird evaluate --config configs/training/evaluate_demo.yaml out=runs/evaluate`")
def evaluate(
    config: Annotated[Path, typer.Option("--config", help="YAML file, see configs/training/evaluate_demo.yaml.")],
    overrides: Overrides = None,
) -> None:
    """Measure exports on held-out pictures: PSNR and SSIM beside the degraded input and bicubic."""
    from infra.config import load_config
    from training.evaluate import EvaluateConfig
    from training.evaluate import evaluate as run

    raise typer.Exit(run(load_config(EvaluateConfig, config, overrides or [])))


@app.command(epilog="Example:\n\n`ird report runs/demo`")
def report(root: Annotated[Path, typer.Argument(help="Folder of a demo run.")]) -> None:
    """Write the self-contained HTML page of a run anew."""
    from pipeline.report import write_report

    print(write_report(root, root / "report.html"))


@app.command(epilog="Examples:\n\n`ird doctor`\n\n`ird doctor --hostfile hostfile --s3 s3://bucket/prefix`")
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="DeepSpeed hostfile whose hosts must answer.")] = None,
    s3: Annotated[str | None, typer.Option(help="s3:// prefix that must be reachable.")] = None,
) -> None:
    """Check this machine and print the fix for what is wrong."""
    from infra.doctor import print_report, run_checks

    raise typer.Exit(print_report(run_checks(hostfile=hostfile, s3_uri=s3)))


@registry_app.command(epilog="Example:\n\n`ird registry push runs/finetune/export --name my-dynet --alias champion`")
def push(
    export: Annotated[Path, typer.Argument(help="Export folder of a training stage.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    alias: Annotated[str | None, typer.Option(help="Alias that shall point to the new version.")] = None,
    run_id: Annotated[
        str | None, typer.Option(help="MLflow run of the version; default: the one in the export.")
    ] = None,
) -> None:
    """Register an export, all its variants, as a new model version."""
    from infra.tracking import TrackingConfig
    from pipeline.registry import push as push_export

    version = push_export(export, name, run_id=run_id, alias=alias, settings=TrackingConfig())
    print(f"models:/{name}/{version}" + (f"  (models:/{name}@{alias})" if alias else ""))


@registry_app.command(epilog="Example:\n\n`ird registry pull models:/ird-demo@demo --out models/`")
def pull(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    out: Annotated[Path, typer.Option(help="Folder that the model's own folder goes into.")],
) -> None:
    """Download a model version and check its sha256; it then restores without a server."""
    from infra.tracking import TrackingConfig
    from pipeline.registry import pull as pull_model

    print(pull_model(model, out, TrackingConfig()))


@registry_app.command("list", epilog="Examples:\n\n`ird registry list`\n\n`ird registry list ird-demo`")
def list_models(name: Annotated[str | None, typer.Argument(help="Only this model.")] = None) -> None:
    """List model versions with their aliases, runs and stages."""
    from rich.console import Console
    from rich.table import Table

    from infra.tracking import TrackingConfig
    from pipeline.registry import list_versions

    table = Table("model", "version", "aliases", "made", "stage", "dataset", "run")
    for row in list_versions(TrackingConfig(), name):
        made, tags = f"{row.created:%Y-%m-%d %H:%M}", row.tags
        dataset = tags.get("dataset_id", "")[:16]
        table.add_row(
            row.name, str(row.version), ", ".join(row.aliases), made, tags.get("stage", ""), dataset, row.run_id
        )
    Console().print(table)


@registry_app.command("alias", epilog="Example:\n\n`ird registry alias ird-demo 2 champion`")
def alias_version(
    name: Annotated[str, typer.Argument(help="Name of the registered model.")],
    version: Annotated[int, typer.Argument(help="The version that the alias shall point to.")],
    alias: Annotated[str, typer.Argument(help="The alias.")],
) -> None:
    """Point an alias to a version, and to no other any more."""
    from infra.tracking import TrackingConfig
    from pipeline.registry import set_alias

    set_alias(name, version, alias, TrackingConfig())
    print(f"models:/{name}@{alias} is version {version}")


def main() -> None:
    """Entry point of the ``ird`` command: refusals are one clear message and exit code 2, never a traceback."""
    from infra.errors import Refusal

    try:
        app()
    except Refusal as refusal:
        print(f"ird: {refusal}", file=sys.stderr)
        sys.exit(2)
