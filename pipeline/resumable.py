"""What a person is told when a long command ends before its time."""

import contextlib
import sys
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Around work that goes on where it was when its command is given again.

    Raises:
        typer.Exit: 1 after a stage that failed, 130 after an interrupt.
    """
    from infra.launcher import StageFailed

    try:
        yield
    except StageFailed as failure:
        print(f"\n{failure}\nRun the same command again to go on from this stage.", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        raise typer.Exit(130) from None
