"""The command line that every training stage shares, under ``deepspeed --module`` and without it."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from infra.config import ConfigT, load_config
from infra.errors import Refusal


def run_from_command_line(module: str, about: str | None, schema: type[ConfigT], run: Callable[[ConfigT], int]) -> None:
    """Parse ``--config FILE key=value …``, refuse a bad configuration before any work, run, and exit with its code.

    The launcher's own ``--local_rank`` is accepted. Exit codes: 0 finished, 2 configuration refused,
    75 preempted after saving, 1 any other failure.
    """
    parser = argparse.ArgumentParser(prog=f"deepspeed --num_accelerators N --module {module}", description=about)
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see configs/training/")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    arguments = parser.parse_intermixed_args()
    try:
        code = run(load_config(schema, arguments.config, arguments.overrides))
    except Refusal as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{module}: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
