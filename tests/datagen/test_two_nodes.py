"""A cluster of two nodes that share no path with each other's code or with the submitter: only the stores."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from datagen.dataset import read_dataset_json, read_json
from datagen.source.embedded import materialise
from infra.launcher import free_port
from infra.storage import open_store
from tests.datagen.conftest import DEMO, ROOT, shard_bytes
from tests.datagen.kills import make_crowd
from tests.support.s3 import S3Server

RAY = str(Path(sys.executable).parent / "ray")
# A node has the dependencies installed, and of this repository nothing.
HIDDEN = ("infra", "datagen", "training", "pipeline", "configs", "tests")


def can_hide_folders() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, timeout=60).returncode == 0


class Cluster:
    """A head and a worker node of one core each, that can be killed one by one."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        # Only what any node of a cluster has: no working directory of ours, and the way to the bucket.
        mine["PATH"] = f"{Path(sys.executable).parent}:{mine['PATH']}"
        self.environment = {**mine, **environment, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.environment["RAY_worker_niceness"] = "0"  # Else other tests take the cores from its workers.
        self._folder = folder
        # Two hosts would not share Ray's folder either, and each node's agent unpacks the job's code there afresh.
        self._session = Path(f"/tmp/ird-nodes-{os.getpid()}")
        self._session.mkdir()
        self.port, self._dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self._dashboard}"
        head = ["--head", f"--port={self.port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-port={self._dashboard}", f"--temp-dir={self._session}"]
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            self._start("head", head)
            self._wait_for(f"{self.address}/api/version")
            self._start("worker", [f"--address=127.0.0.1:{self.port}"])
        except BaseException:
            self.end()
            raise

    def _start(self, name: str, arguments: list[str]) -> None:
        agent = free_port()
        start = [RAY, "start", "--block", "--num-cpus=1", f"--dashboard-agent-listen-port={agent}", *arguments]
        start += ["--object-store-memory=100000000", "--disable-usage-stats"]
        own = [self._session, *(ROOT / name for name in HIDDEN)]
        hide = " && ".join(f"mount -t tmpfs none {shlex.quote(str(path))}" for path in own)
        home = self._folder / name
        home.mkdir()
        command = ["unshare", "--mount", "bash", "-c", f"{hide} && exec {shlex.join(start)}"]
        with open(home / "ray.log", "wb") as log:
            process = subprocess.Popen(command, cwd=home, env=self.environment, stdout=log, stderr=log)
        self.nodes.append(process)
        self._wait_for(f"http://127.0.0.1:{agent}/api/local_raylet_healthz", process, home / "ray.log")

    def _wait_for(self, url: str, process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> None:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
            if time.monotonic() > deadline or (process and process.poll() is not None):
                pytest.fail(f"{url} does not answer\n{log.read_text() if log else ''}")
            time.sleep(0.3)

    def submit(self, *settings: str) -> subprocess.Popen[str]:
        """``ray job submit`` of a build, as from another machine: over HTTP, with the code uploaded."""
        build = ["python", "-m", "datagen", "build", "--config", str(DEMO.relative_to(ROOT)), *settings]
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", "--", *build]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)  # type: ignore[call-overload]

    def end(self) -> None:
        """Kill all nodes, the head last."""
        for node in reversed(range(len(self.nodes))):
            self.kill(node)
        shutil.rmtree(self._session, ignore_errors=True)

    def kill(self, node: int) -> None:
        """Kill a node and all its processes at once."""
        process = self.nodes[node]
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
        process.wait(60)


def answer_of(job: subprocess.Popen[str]) -> str:
    """All that it said, when it has ended by itself."""
    try:
        return job.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the job did not end: {said_by(job)}")


def said_by(job: subprocess.Popen[str]) -> str:
    """All that it said up to now, and no more from now on."""
    job.kill()
    return job.communicate(timeout=60)[0][-4000:]


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not can_hide_folders():
        pytest.skip("a node of its own needs a mount namespace: run as root")
    running = Cluster(tmp_path_factory.mktemp("nodes"), s3_server.environment)
    try:
        yield running
    finally:
        running.end()


@pytest.mark.slow
def test_a_job_from_elsewhere_gives_the_same_bytes(
    cluster: Cluster, built: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(materialise(tmp_path / "corpus"))
    out = f"s3://{s3_server.new_bucket()}/set"
    job = cluster.submit(f"source=s3://{bucket}/pictures", f"leak_guard=s3://{bucket}/held_out", f"out={out}")
    said = answer_of(job)
    assert job.returncode == 0, said[-4000:]
    # The log of a job reads line by line.
    assert "[scan] 26/26 images" in said and "every input accounted for" in said and "\r" not in said
    store = open_store(out)
    assert read_json(store, "curation/summary.json")["scan"]["cluster"]["CPU"] == 2.0
    assert {entry.key: store.read(entry.key) for entry in store.list("shards/")} == shard_bytes(built)
    assert read_dataset_json(store)["id"] == read_dataset_json(open_store(built))["id"]


@pytest.mark.slow
def test_a_node_that_dies_costs_nothing_but_time(
    cluster: Cluster, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(make_crowd(tmp_path / "crowd", 40))
    settings = [f"source=s3://{bucket}", "leak_guard=[]", "scan.pictures_per_piece=1"]
    settings += ["select.min_laplacian_variance=1.0", "tiles.min_laplacian_variance=1.0", "pack.samples_per_shard=6"]
    out = f"s3://{s3_server.new_bucket()}/set"
    job = cluster.submit(*settings, f"out={out}")
    store = open_store(out)
    deadline = time.monotonic() + 200
    while sum(1 for _ in store.list("curation/inventory/")) < 3:
        assert time.monotonic() < deadline and job.poll() is None, said_by(job)
        time.sleep(0.1)
    cluster.kill(1)
    said = answer_of(job)
    assert job.returncode == 0, said[-4000:]
    assert read_dataset_json(store)["totals"]["inputs"] == 40
    assert read_dataset_json(store)["totals"]["failed"] == {}
