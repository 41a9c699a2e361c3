"""A real ``mlflow server`` process for tests, which can be killed, frozen and started again on the same port."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from infra.launcher import end_with_parent, free_port


class MlflowServer:
    """One server over one database; ``uri`` stays the same over all its starts."""

    def __init__(self, folder: Path, store: str = "", *options: str, environment: Mapping[str, str] | None = None):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "mlflow-server.log"
        self._store = store or f"sqlite:///{folder}/server.db"
        self._options = options or ("--artifacts-destination", str(folder / "artifacts"))
        self._environment = dict(environment or {})
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "MlflowServer":
        """Start it, and come back when it answers."""
        program = str(Path(sys.executable).with_name("mlflow"))
        command = [program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        # Passwords of a database do not belong on a command line; jobs are processes that nobody here asks for.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._environment}
        environment["MLFLOW_BACKEND_STORE_URI"] = self._store
        environment.pop("MLFLOW_TRACKING_URI", None)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    pytest.fail(f"mlflow server did not start:\n{self.log.read_text()[-4000:]}")
                time.sleep(0.1)

    def freeze(self) -> None:
        """Stop all its processes in their tracks: connections are taken, nothing is answered."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on, with all requests that came in meanwhile."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End all its processes without a word."""
        if self._process is not None:
            self._send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _send(self, sign: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(sign)
