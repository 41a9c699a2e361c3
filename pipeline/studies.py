"""``ird study``: comparisons at equal compute, written up as a table and a plot."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Comparisons at equal compute, written up as a table and a plot.")


@app.callback()
def study() -> None:
    """Studies are named: what they compare is theirs, how they are run is the same."""


@app.command("co-pretraining", epilog="Example:\n\n`ird study co-pretraining dataset=DIR pictures=DIR`")
def study_co_pretraining(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace those of the file.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with the settings.")] = None,
    train_with: Annotated[
        list[str] | None, typer.Option("--train", metavar="key=value", help="A setting for all trainings; repeatable.")
    ] = None,
) -> None:
    """Co-pretraining against separate training, every recipe at the same compute, and at half of it.

    40 minutes on two CPU cores. Interrupt it and run it again: it goes on where it was.
    """
    from rich.console import Console

    from infra.config import load_config
    from pipeline.demo import REPOSITORY
    from pipeline.resumable import resumable
    from pipeline.study import StudyConfig, read_rows, show, study

    path = config or REPOSITORY / "configs" / "pipeline" / "study_co_pretraining.yaml"
    settings = load_config(StudyConfig, path, overrides or [])
    with resumable():
        report = study(settings, train_with or [], say=lambda line: print(line, flush=True))
    show(read_rows(report.parent), Console())
    print(f"table: {report}\nplot:  {report.with_suffix('.png')}")
