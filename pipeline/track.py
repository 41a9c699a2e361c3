"""``ird track``: what runs could not deliver to their tracking server."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()  # without it, a single command would have no name
def _track() -> None:
    """Records of runs that a tracking server has not got yet."""


@app.command(
    epilog="Examples:\n\n`ird track sync runs/`\n\n`MLFLOW_TRACKING_URI=http://host:5000 ird track sync --here runs/`"
)
def sync(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders with runs in or below them.")],
    here: Annotated[
        bool, typer.Option("--here", help="Send to MLFLOW_TRACKING_URI, wherever the runs were recorded.")
    ] = False,
    close: Annotated[
        bool, typer.Option("--close", help="Also mark runs of other hosts FAILED that have no end; they must be dead.")
    ] = False,
) -> None:
    """Send what is left in the spools of runs, any number of times; exit code 1 if some could not be delivered."""
    from rich.console import Console
    from rich.table import Table

    from infra.tracking.sync import sync as send

    table = Table("spool", "run", "sent", "left", "refused", "problem")
    code = 0
    for row in send(folders, here=here, close=close):
        code = code or int(row.left > 0)
        table.add_row(str(row.spool), row.run_id, str(row.sent), str(row.left), str(row.refused), row.problem)
    # Piped, a table is as wide as it has to be: a path that is cut cannot be used.
    console = Console()
    (console if console.is_terminal else Console(width=1000)).print(table)
    raise typer.Exit(code)
