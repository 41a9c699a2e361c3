"""What a machine lacks before a job finds out: every check is a row, with the fix beside what is wrong.

A check never raises and never waits long. What is optional here (a GPU, numactl) warns at most; what a person
asked for by a variable or a flag (a tracking server, a bucket, a hostfile) fails when it does not answer.
Secrets are looked for, never printed.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.doctor import hosts, machine, services
from infra.doctor.check import Check, short

__all__ = ["Check", "print_report", "run_checks"]


def run_checks(hostfile: str | Path | None = None, s3_uri: str | None = None) -> list[Check]:
    """Look at this machine, and at the services its environment names.

    Args:
        hostfile: a DeepSpeed hostfile whose hosts must resolve and answer ssh, or None.
        s3_uri: ``s3://bucket[/prefix]`` that must be listable with the credentials at hand, or None.
    """
    checks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", machine.check_python),
        ("packages", machine.check_packages),
        ("compiler", machine.check_compiler),
        ("cores", machine.check_cores),
        ("memory", machine.check_memory),
        ("disk", machine.check_disk),
        ("shared memory", machine.check_shared_memory),
        ("gpu", machine.check_gpu),
        ("ray", services.check_ray),
        ("deepspeed", services.check_deepspeed),
        ("mlflow", services.check_mlflow),
        ("s3", lambda: services.check_s3(s3_uri)),
    ]
    if hostfile is not None:
        checks.append(("hostfile", lambda: hosts.check_hostfile(Path(hostfile))))
    return [row for name, check in checks for row in _rows_of(name, check)]


def print_report(checks: list[Check]) -> int:
    """Print the rows as a table, the fixes below it. Returns the exit code: 1 if any check failed."""
    console = Console()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.detail))
    console.print(table)
    wrong = [check for check in checks if check.status != "ok"]
    for check in wrong:
        console.print(f"\n[{colours[check.status]}]{check.name}[/]: {escape(check.fix)}", soft_wrap=True)
    failed = sum(check.status == "fail" for check in checks)
    console.print(f"\n{len(checks)} checks, {failed} failed, {len(wrong) - failed} warnings")
    return 1 if failed else 0


def _rows_of(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """A check that breaks is itself a finding: a broken import of torch is why someone calls the doctor."""
    rows: list[Check] = []
    try:
        rows.extend(check())
    except Exception as error:
        fix = "pip install -r requirements.lock; if that does not help, report it with this line."
        rows.append(Check(name, "fail", f"the check broke: {type(error).__name__}: {short(error)}", fix))
    return rows
