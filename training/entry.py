"""The command line that every training stage shares, under ``deepspeed --module`` and without it."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from infra.config import ConfigT, load_config
from infra.errors import Refusal
from training.distributed import end_well_or_blame
from training.rendezvous import MeetingError


def run_from_command_line(module: str, about: str | None, schema: type[ConfigT], run: Callable[[ConfigT], int]) -> None:
    """Parse ``--config FILE key=value …``, refuse a bad configuration before any work, run, and exit with its code.

    The launcher's own ``--local_rank`` is accepted. Exit codes: 0 finished, 2 configuration refused,
    75 preempted after saving, 69 another rank or its host was lost, 1 any other failure. When one rank
    fails, the ranks of all hosts end with its code. The code is also left in the folder IRD_EXIT_CODES,
    where that is set, for those who cannot believe the launcher's.
    """
    _leave_word("running")
    parser = argparse.ArgumentParser(prog=f"deepspeed --num_accelerators N --module {module}", description=about)
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see configs/training/")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(schema, arguments.config, arguments.overrides)
        with end_well_or_blame():
            code = run(config)
    except Refusal as error:
        # What keeps ranks from meeting may be known to one of them alone.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, MeetingError):
            print(f"{module}: {error}", file=sys.stderr, flush=True)
        code = 2
    _leave_word(str(code))
    sys.exit(code)


def _leave_word(word: str) -> None:
    if folder := os.environ.get("IRD_EXIT_CODES"):
        Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(f"{word}\n")
