"""A real PostgreSQL server for tests, of Debian's packages, in a temporary folder and on a free port."""

import os
import pwd
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.launcher import end_with_parent, free_port


@dataclass(frozen=True)
class PostgresServer:
    """Where it answers, and the password of its one user, ``ird``."""

    port: int
    password: str

    @property
    def uri(self) -> str:
        """The address of its database. The driver is named: SQLAlchemy's default has changed to psycopg 3."""
        return f"postgresql+psycopg2://ird:{self.password}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A running PostgresServer; skips where it is not installed, or root has no one to run it as."""
    programs = _programs()
    if programs is None:
        pytest.skip("postgresql is not installed")
    pytest.importorskip("psycopg2", reason="psycopg2-binary is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("nobody")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(folder, account.pw_uid, account.pw_gid)
        for parent in folder.parents:  # pytest's own folders are for their user alone
            if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    server = PostgresServer(free_port(), secrets.token_hex(12))
    (folder / "password").write_text(server.password)
    if user:
        os.chown(folder / "password", user["user"], user["group"])
    data = str(folder / "data")
    initdb = [str(programs / "initdb"), "-D", data, "-U", "ird", "--auth=scram-sha-256", "--no-sync"]
    initdb += [f"--pwfile={folder / 'password'}"]
    made = subprocess.run(initdb, cwd=folder, capture_output=True, text=True, timeout=300, **user)
    assert made.returncode == 0, made.stderr
    dies_with_us: dict[str, Any] = {"preexec_fn": end_with_parent}
    command = [str(programs / "postgres"), "-D", data, "-p", str(server.port), "-k", str(folder), "-h", "127.0.0.1"]
    process = subprocess.Popen([*command, "-F"], cwd=folder, stderr=subprocess.PIPE, text=True, **user, **dies_with_us)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _programs() -> Path | None:
    """Debian keeps them off the PATH, a folder for each version."""
    for folder in (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), None):
        found = shutil.which("initdb", path=str(folder) if folder else None)
        if found and (Path(found).parent / "postgres").exists():
            return Path(found).parent
    return None


def _wait(server: PostgresServer, process: "subprocess.Popen[str]") -> None:
    import psycopg2

    deadline = time.monotonic() + 120
    while True:
        try:
            psycopg2.connect(server.uri.replace("+psycopg2", ""), connect_timeout=5).close()
            return
        except psycopg2.OperationalError:
            assert process.poll() is None and time.monotonic() < deadline, "postgres did not start"
            time.sleep(0.1)
