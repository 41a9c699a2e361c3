"""The deployment files are what their programs take, and a node started by a scheduler ends as the scheduler asks."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from mlflow import environment_variables as mlflow_variables
from mlflow.cli import server as mlflow_server
from ray.autoscaler._private.util import prepare_config, validate_config

import infra
from infra.launcher import PREEMPTED, free_port

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


def test_kubernetes_takes_the_manifest() -> None:
    """By the API's own schema, of the oldest release that is still maintained and of the newest that is known."""
    for version in ("1.33", kubernetes_validate.latest_version()):
        for resource in yaml.safe_load_all((DEPLOY / "kubernetes" / "pretrain.yaml").read_text()):
            kubernetes_validate.validate(resource, version, strict=True)


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
    actions = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in spec["podFailurePolicy"]["rules"][::2]}
    assert actions == {(PREEMPTED,): "Ignore", (2,): "FailJob"}  # LOST counts against backoffLimit
    assert pod["restartPolicy"] == "Never", "the policy would not be taken"
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


# Stands in for a stage, and keeps to training/entry.py: the folder IRD_EXIT_CODES, SIGTERM, 75.
STAGE = """
import os, pathlib, signal, sys, time
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
me = f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
word = pathlib.Path(os.environ["IRD_EXIT_CODES"], f"rank-{os.environ['RANK']}")
word.write_text("running\\n")
pathlib.Path(f"started {me}").touch()
if "launcher" in sys.argv:
    os.kill(os.getppid(), signal.SIGKILL)
while not stopped and not {"finish", "launcher"} & set(sys.argv):
    time.sleep(0.1)
time.sleep(2)  # saving
pathlib.Path(f"saved {me}").touch()
code = 75 if stopped or "launcher" in sys.argv else 0
out = [a.removeprefix("out=") for a in sys.argv if a.startswith("out=")]
if out and code == 0:
    pathlib.Path(out[0], "finished.json").touch()
word.write_text(f"{code}\\n")
sys.exit(code)
"""


@pytest.mark.slow
def test_nodes_that_the_kubelet_tells_to_stop_let_their_ranks_save(tmp_path: Path) -> None:
    nodes = _start_nodes(tmp_path, 2)
    try:
        _wait_for(tmp_path, {"started 0 of 2", "started 1 of 2"}, nodes)
        for node in nodes:
            os.kill(node.pid, signal.SIGTERM)  # to one process; Slurm tells all of them
        assert [node.wait(timeout=120) for node in nodes] == [75] * 2, (tmp_path / "log").read_text()
        assert all((tmp_path / f"saved {rank} of 2").exists() for rank in range(2))
    finally:
        _end(nodes)


@pytest.mark.slow
def test_a_node_whose_launcher_is_killed_does_not_return_zero(tmp_path: Path) -> None:
    nodes = _start_nodes(tmp_path, 1, "launcher")
    try:
        assert nodes[0].wait(timeout=240) == 75, (tmp_path / "log").read_text()
        assert "the launcher says 0, but the ranks ended with: 75" in (tmp_path / "log").read_text()
    finally:
        _end(nodes)


# Slurm's commands as far as the script uses them: two nodes are two sessions of this machine, under its two names.
SLURM = {
    "srun": """
for node in 0 1; do
    SLURM_NODEID=$node setsid "${@:2}" &
    echo $! >>"$NODES"
done
code=0
for node in $(tail -n 2 "$NODES"); do
    one=0
    wait "$node" || one=$?
    ((one > code)) && code=$one
done
exit "$code"
""",
    "scontrol": """
case $1 in
    show) printf "localhost\\n127.0.0.1\\n" ;;
    requeue) echo "$2" >>requeued ;;
esac
""",
    "scancel": """
for node in $(tail -n 2 "$NODES"); do kill -TERM -- "-$node"; done
""",
}


@pytest.mark.slow
def test_a_slurm_job_requeues_itself_until_it_has_finished(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "infra").symlink_to(DEPLOY.parent)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "none.yaml").touch()
    job = 1 + free_port()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NODES": str(tmp_path / "nodes"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": str(job),
        "DS_ACCELERATOR": "cpu",
    }

    def submit(*more: str) -> subprocess.Popen[bytes]:
        script = str(DEPLOY / "slurm" / "pretrain.sbatch")
        with open(tmp_path / "log", "ab") as log:
            return subprocess.Popen(
                ["bash", script, "stage", "none.yaml", str(tmp_path / "out"), *more],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    batch = submit()
    try:
        _wait_for(tmp_path, {"started 0 of 2", "started 1 of 2"}, [batch])
        os.kill(batch.pid, signal.SIGTERM)  # --signal=B:TERM, before the time limit
        assert batch.wait(timeout=120) == 75, (tmp_path / "log").read_text()
        assert (tmp_path / "requeued").read_text() == f"{job}\n"
        assert all((tmp_path / f"saved {rank} of 2").exists() for rank in range(2))

        batch = submit("finish")
        assert batch.wait(timeout=240) == 0, (tmp_path / "log").read_text()
        assert (tmp_path / "requeued").read_text() == f"{job}\n"
    finally:
        _end([batch])
        for pid in (tmp_path / "nodes").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(75, 100, True), (69, 0, True), (69, 20, False), (1, 0, False), (0, 0, False)]
)
def test_a_slurm_job_requeues_itself_for_what_another_try_can_mend(
    tmp_path: Path, code: int, restarts: int, requeued: bool
) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in {**SLURM, "srun": f"exit {code}"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    script = str(DEPLOY / "slurm" / "pretrain.sbatch")
    done = subprocess.run(["bash", script, "stage", "none.yaml", "out"], env=environment, timeout=60)
    # 0 without finished.json is no success.
    assert done.returncode == (code or 1) and (tmp_path / "requeued").exists() == requeued


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
            node.wait(60)
