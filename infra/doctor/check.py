"""What every check is made of: the row it yields, and careful ways to ask other programs and servers."""

import dataclasses
import socket
import subprocess
import urllib.parse
from typing import Literal

from infra.errors import without_password

GIB = 2**30
CONNECT_SECONDS = 3.0

Status = Literal["ok", "warn", "fail"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One row: what was looked at, how it stands, what was seen, and what to do about it ("" when ok)."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def reachable(name: str, variable: str, address: str, *, default_port: int, start: str) -> Check:
    """Whether something listens at host:port; ``address`` may be a URL or ``host:port``."""
    shown = without_password(address)
    try:
        parts = urllib.parse.urlsplit(address if "://" in address else f"//{address}")
        port = parts.port or {"http": 80, "https": 443, "ray": 10001}.get(parts.scheme, default_port)
        with socket.create_connection((parts.hostname or "localhost", port), timeout=CONNECT_SECONDS):
            return Check(name, "ok", f"{variable}={shown} answers")
    except (OSError, ValueError) as error:
        fix = f"Start it ({start}), or correct or unset {variable}."
        return Check(name, "fail", f"{variable}={shown} does not answer: {short(error)}", fix)


def short(error: BaseException) -> str:
    text = without_password(str(getattr(error, "strerror", None) or error)).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
