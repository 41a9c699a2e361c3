"""``ird registry``: its subcommands. Heavy imports stand inside them, so that help answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Models in the MLflow registry: push, list, show, promote, pull.")

Name = Annotated[str, typer.Argument(help="Name of the registered model.")]
Alias = Annotated[str, typer.Option(help="The alias, for example champion.")]
Results = Annotated[
    Path | None, typer.Option("--metrics", help="results.json of `ird evaluate`: figures of this version.")
]


@app.command(
    epilog="Examples:\n\n`ird registry push runs/finetune --name my-dynet --metrics runs/evaluate/results.json`\n\n"
    "`ird registry push runs/finetune/export --name my-dynet --alias champion`"
)
def push(
    source: Annotated[str, typer.Argument(metavar="RUN|DIR", help="A run's folder or MLflow id, or an export folder.")],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
    alias: Annotated[
        str | None, typer.Option(help="Alias that shall point to the new version, without a gate.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="MLflow run of the version; default: the one in the export.")
    ] = None,
    metrics: Results = None,
) -> None:
    """Register an export, all its variants, as a new model version."""
    from infra.tracking import TrackingConfig
    from pipeline.registry import pushing
    from training.export import load_export

    settings = TrackingConfig()
    export = pushing.find_export(source, settings)
    tags = pushing.figures_of(metrics, load_export(export)[1].name) if metrics else {}
    version = pushing.push(export, name, run_id=run_id, alias=alias, tags=tags, settings=settings)
    print(f"models:/{name}/{version}" + (f"  (models:/{name}@{alias})" if alias else ""))


@app.command(epilog="Example:\n\n`ird registry pull models:/ird-demo@demo --out models/`")
def pull(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    out: Annotated[Path, typer.Option(help="Folder that the model's own folder goes into.")],
) -> None:
    """Download a model version, every file checked by sha256; it then restores without a server.

    Interrupted, it goes on with the files that are missing.
    """
    from infra.tracking import TrackingConfig
    from pipeline.registry import pulling

    print(pulling.pull(model, out, TrackingConfig(), notify=lambda message: print(message, file=sys.stderr)))


@app.command("list", epilog="Examples:\n\n`ird registry list`\n\n`ird registry list ird-demo`")
def list_models(name: Annotated[str | None, typer.Argument(help="Only this model.")] = None) -> None:
    """List model versions with their aliases, runs and stages."""
    from rich.console import Console
    from rich.table import Table

    from infra.tracking import TrackingConfig
    from pipeline.registry.versions import list_versions

    table = Table("model", "version", "aliases", "made", "variants", "stage", "dataset", "run")
    for row in list_versions(TrackingConfig(), name):
        made, tags = f"{row.created:%Y-%m-%d %H:%M}", row.tags
        facts = (tags.get("stage", ""), tags.get("dataset_id", "")[:16], row.run_id)
        table.add_row(row.name, str(row.version), ", ".join(row.aliases), made, ", ".join(row.variants), *facts)
    Console().print(table)


@app.command(
    epilog="Examples:\n\n`ird registry show models:/ird-demo@demo`\n\n`ird registry show models:/ird-demo/1 --json`"
)
def show(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one version: its variants and their figures, where it comes from, and where its aliases have been."""
    from infra.tracking import TrackingConfig
    from pipeline.registry.promotion import history
    from pipeline.registry.server import parse_model_uri
    from pipeline.registry.versions import get_version

    version, model_tags = get_version(*parse_model_uri(model), TrackingConfig())
    histories = {
        key.removeprefix("alias_history."): history(model_tags, key.removeprefix("alias_history."))
        for key in model_tags
        if key.startswith("alias_history.")
    }
    if as_json:
        facts = {"name": version.name, "version": version.version, "aliases": version.aliases}
        facts |= {"created": version.created.isoformat(), "run_id": version.run_id, "variants": version.variants}
        print(json.dumps({**facts, "figures": version.figures, "tags": dict(version.tags), "history": histories}))
        return
    _print_version(version, histories)


@app.command("alias", epilog="Example:\n\n`ird registry alias ird-demo 2 champion`")
def alias_version(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version that the alias shall point to.")],
    alias: Annotated[str, typer.Argument(help="The alias.")],
) -> None:
    """Point an alias to a version, and to no other any more, without a gate; `promote` has one."""
    from infra.tracking import TrackingConfig
    from pipeline.registry.promotion import set_alias

    set_alias(name, version, alias, TrackingConfig())
    print(f"models:/{name}@{alias} is version {version}")


@app.command(
    epilog="Example:\n\n`ird registry promote ird-demo 2 --alias champion --require 'psnr.noise_25.small>=29.5' "
    "--require 'psnr.noise_25.large>=29.8'`"
)
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version to promote.")],
    alias: Alias,
    require: Annotated[
        list[str] | None, typer.Option(help="FIGURE>=NUMBER (or <=, >, <); may be given several times.")
    ] = None,
    metrics: Results = None,
) -> None:
    """Point an alias to a version whose figures suffice; otherwise say which do not, and exit with 1.

    A figure that was never measured does not suffice.
    """
    from infra.tracking import TrackingConfig
    from pipeline.registry import promotion, pushing

    settings = TrackingConfig()
    requirements = [promotion.parse_requirement(text) for text in require or []]
    if metrics is not None:
        pushing.add_figures(name, version, metrics, settings)
    try:
        checks = promotion.promote(name, version, alias, requirements, settings)
    except promotion.GateError as refusal:
        print(refusal, file=sys.stderr)
        raise typer.Exit(1) from None
    for check in checks:
        print(check)
    print(f"models:/{name}@{alias} is version {version}")


@app.command(epilog="Example:\n\n`ird registry rollback ird-demo --alias champion`")
def rollback(name: Name, alias: Alias) -> None:
    """Point an alias to the version that it had before the last change; again, to the one before that."""
    from infra.tracking import TrackingConfig
    from pipeline.registry import promotion

    before, after = promotion.rollback(name, alias, TrackingConfig())
    print(f"models:/{name}@{alias} is version {after} again; it was {before}")


def _print_version(version: Any, histories: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    aliases = ", ".join(version.aliases) or "none"
    console.print(f"models:/{version.name}/{version.version}   aliases: {aliases}", markup=False, highlight=False)
    lines = {
        "network": version.tags.get("model"),
        "variants": ", ".join(version.variants),
        "made": f"{version.created:%Y-%m-%d %H:%M} UTC",
        "stage": version.tags.get("stage"),
        "run": version.run_id,
        "checkpoint": version.tags.get("checkpoint"),
        "dataset": version.tags.get("dataset_id"),
        "code": version.tags.get("code"),
        "sha256": version.tags.get("sha256"),
    }
    for label, value in lines.items():
        console.print(f"  {label:<11} {value or 'not known'}", markup=False, highlight=False)
    table, rows = Table("figure", "task", *version.variants), version.figure_table()
    for (metric, task), figures in rows.items():
        cells = [f"{figures[variant]:.4g}" if variant in figures else "" for variant in version.variants]
        table.add_row(metric, task, *cells)
    if rows:
        console.print(table)
    else:
        console.print("  figures     none; `ird registry push --metrics results.json` brings them", highlight=False)
    for alias, events in sorted(histories.items()):
        for event in events:
            console.print(f"  @{alias}  {event['at']:<19}  version {event['version']} {event['how']}", highlight=False)
    console.print(f"ird trace models:/{version.name}/{version.version}  says which pictures it was made from")
