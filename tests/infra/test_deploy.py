"""The deployment files are what their programs take, and a node started by a scheduler ends as the scheduler asks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import environment_variables as mlflow_variables
from mlflow.cli import server as mlflow_server
from ray.autoscaler._private.util import prepare_config, validate_config

import infra
from infra.launcher import free_port

DEPLOY = Path(infra.__file__).parent / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix in {".sh", ".sbatch"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_begins_by_saying_what_it_is_for(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("#!") else lines[0]
    assert first.startswith("# ") and len(first) > 30


@pytest.mark.parametrize(
    "path", [*SCRIPTS, DEPLOY.parent / "create_venv.sh", DEPLOY.parent / "install_test_tools.sh"], ids=lambda p: p.name
)
def test_scripts_parse_and_are_strict(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "\nset -euo pipefail\n" in path.read_text()


def test_ray_takes_the_cluster_file() -> None:
    cluster = yaml.safe_load((DEPLOY / "ray" / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1], "the job server is remote execution"


def test_kubernetes_job_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all((DEPLOY / "kubernetes" / "pretrain.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["NODES"]) == spec["completions"] == spec["parallelism"]
    assert int(environment["RANKS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert service["metadata"]["name"] == pod["subdomain"], "pods would have no names"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    rules = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["containerName"] for rule in rules} == {container["name"]}
    script = container["args"][0]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert (DEPLOY.parents[1] / environment["CONFIG"]).is_file()


# What the server reads beside its own options: its users, its jobs, its S3.
MLFLOW_ENVIRONMENT = {name for name in vars(mlflow_variables) if name.startswith("MLFLOW_")}
AWS_ENVIRONMENT = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}


def assert_mlflow_takes(command: list[str], environment: set[str]) -> None:
    options = {option for parameter in mlflow_server.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert command[:2] == ["mlflow", "server"] and {part for part in command if part.startswith("-")} <= options
    of_options: set[Any] = {parameter.envvar for parameter in mlflow_server.params}
    assert environment - AWS_ENVIRONMENT <= of_options | MLFLOW_ENVIRONMENT
    # Users are asked for, foreign names refused, and no password stands where `ps` shows it.
    assert command[command.index("--app-name") + 1] == "basic-auth" and "--disable-security-middleware" not in command
    assert (
        "MLFLOW_SERVER_ALLOWED_HOSTS" in environment and "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE" not in environment
    )
    assert "://" not in " ".join(command) and "MLFLOW_FLASK_SERVER_SECRET_KEY" in environment


def test_mlflow_service_and_its_settings_are_what_the_server_takes() -> None:
    lines = (DEPLOY / "mlflow" / "mlflow.env").read_text().splitlines()
    names = {line.split("=", 1)[0].removeprefix("#") for line in lines if "=" in line and not line.startswith("# ")}
    unit = (DEPLOY / "mlflow" / "mlflow.service").read_text()
    (start,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert_mlflow_takes(["mlflow", *start.split()[1:]], names)
    assert "PASSWORD" not in unit and "pg_dump" in unit


def test_mlflow_compose_file_agrees_with_itself_and_with_the_lock() -> None:
    compose = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())
    services = compose["services"]
    server = services["mlflow"]
    assert_mlflow_takes(server["command"], set(server["environment"]))
    assert set(server["depends_on"]) <= set(services)
    named = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
    assert {name for name in named if not name.startswith("./")} == set(compose["volumes"])
    assert all((DEPLOY / "mlflow" / name).is_file() for name in named if name.startswith("./"))
    locked = (DEPLOY.parents[1] / "requirements.lock").read_text().splitlines()
    (install,) = [line for line in server["build"]["dockerfile_inline"].splitlines() if "pip install" in line]
    pins = [part for part in install.split() if "==" in part]
    assert {pin.split("==")[0] for pin in pins} == {"mlflow", "psycopg2-binary", "boto3", "flask-wtf"}
    assert set(pins) <= set(locked)
    # Passwords come from outside, and one that is not given stops it before anything starts.
    for service in services.values():
        for name, value in service["environment"].items():
            if any(word in name for word in ("PASSWORD", "SECRET", "KEY", "URI")):
                assert "${" in value and value.count("${") == value.count(":?}"), name


def test_systemd_unit_has_no_unknown_key(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on PATH")
    unit = (DEPLOY / "mlflow" / "mlflow.service").read_text()
    # The program is looked up as well, and stands where the unit says only on the machine it is for.
    (tmp_path / "mlflow.service").write_text(unit.replace("/opt/ird/.venv/bin/mlflow", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "mlflow.service")], capture_output=True, text=True, timeout=60
    )
    assert "mlflow.service" not in done.stderr, done.stderr


STAGE = """
import os, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
me = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
open(f"started {me}", "w").close()
while not stopped and "finish" not in sys.argv:
    time.sleep(0.1)
time.sleep(2)  # saving
open(f"saved {me}", "w").close()
sys.exit(75 if stopped else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "to_group"), [(2, False), (1, True)], ids=["kubelet: one process", "slurm: all"])
def test_a_node_that_is_told_to_stop_lets_its_ranks_save(tmp_path: Path, count: int, to_group: bool) -> None:
    ranks = [f"{rank} of {count}" for rank in range(count)]
    nodes = _start_nodes(tmp_path, count)
    try:
        _wait_for(tmp_path, {f"started {rank}" for rank in ranks}, nodes)
        for node in nodes:
            (os.killpg if to_group else os.kill)(node.pid, signal.SIGTERM)
        assert [node.wait(timeout=120) for node in nodes] == [75] * count, (tmp_path / "log").read_text()
        assert all((tmp_path / f"saved {rank}").exists() for rank in ranks)
    finally:
        _end(nodes)


@pytest.mark.slow
def test_a_node_that_finishes_returns_zero(tmp_path: Path) -> None:
    nodes = _start_nodes(tmp_path, 1, "finish")
    try:
        assert nodes[0].wait(timeout=240) == 0, (tmp_path / "log").read_text()
        assert (tmp_path / "saved 0 of 1").exists()
    finally:
        _end(nodes)


def _start_nodes(folder: Path, count: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Up to two nodes on this machine: two names of it in the hostfile, launches without ssh."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in ("localhost", "127.0.0.1")[:count]))
    (folder / "stage.py").write_text(STAGE)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
    }
    with open(folder / "log", "ab") as log:
        return [
            subprocess.Popen(
                ["bash", str(DEPLOY / "run_node.sh"), str(rank), "127.0.0.1", "hostfile", "stage", *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for rank in range(count)
        ]


def _wait_for(folder: Path, names: set[str], nodes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 240
    while not names <= {path.name for path in folder.iterdir()}:
        assert time.monotonic() < deadline, (folder / "log").read_text()
        assert all(node.poll() is None for node in nodes), (folder / "log").read_text()
        time.sleep(0.2)


def _end(nodes: list[subprocess.Popen[bytes]]) -> None:
    for node in nodes:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
