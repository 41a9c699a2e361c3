"""The doctor names what is wrong with a machine, with a fix, and finds nothing wrong with a healthy one."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from infra.doctor import Check, hosts, machine, print_report, run_checks, services
from infra.doctor.check import GIB
from infra.errors import without_password
from tests.support.dataset import REPOSITORY
from tests.support.hosts import INTERFACE, TwoHosts, two_hosts  # noqa: F401  (a fixture)
from tests.support.s3 import S3Server

VARIABLES = (
    "RAY_ADDRESS",
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "GLOO_SOCKET_IFNAME",
    "DS_ENV_FILE",
    "OMP_NUM_THREADS",
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections for as long as the test runs: bound, but not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def only_failure(checks: list[Check]) -> Check:
    failures = [check for check in checks if check.status == "fail"]
    assert len(failures) == 1, checks
    assert failures[0].fix, "a failure without a fix"
    return failures[0]


def test_a_machine_that_runs_these_tests_is_healthy() -> None:
    checks = run_checks()
    assert [check for check in checks if check.status == "fail"] == []
    names = {check.name for check in checks}
    assert {"python", "packages", "compiler", "ninja", "memory", "disk", "ray", "deepspeed op", "mlflow", "s3"} <= names
    assert all(check.fix for check in checks if check.status == "warn")
    assert print_report(checks) == 0


def test_report_ends_with_the_fixes_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = print_report([Check("one", "ok", "fine"), Check("two [x]", "fail", "broken", "mend [it] with glue")])
    output = capsys.readouterr().out
    assert code == 1
    assert "mend [it] with glue" in output
    assert "2 checks, 1 failed, 0 warnings" in output


def test_a_check_that_breaks_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[broken")
    assert "mlflow" in {check.name for check in run_checks() if check.status == "fail"}


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert [check.status for check in machine.check_compiler()] == ["fail", "fail"]


def test_too_many_threads_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert [check.status for check in machine.check_cores() if check.name == "OMP_NUM_THREADS"] == ["warn"]


def test_a_planted_stale_lock_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    failure = only_failure(list(services.check_deepspeed()))
    assert failure.name == "deepspeed op"
    assert str(lock) in failure.fix
    lock.unlink()
    assert all(check.status != "fail" for check in services.check_deepspeed())


def test_a_ray_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    for address in (f"127.0.0.1:{closed_port}", f"http://127.0.0.1:{closed_port}", f"ray://127.0.0.1:{closed_port}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert address in only_failure(list(services.check_ray())).detail


def test_an_mlflow_server_that_does_not_answer_fails(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{closed_port}")
    failure = only_failure(list(services.check_mlflow()))
    assert f"127.0.0.1:{closed_port}" in failure.detail
    assert "hunter2" not in failure.detail + failure.fix


def test_a_server_that_is_not_mlflow_fails(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", s3_server.endpoint)
    only_failure(list(services.check_mlflow()))


@pytest.mark.slow
def test_a_running_mlflow_server_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path)]
    # Its seven processes for background jobs would take longer to start than the server itself.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + 300
        while (check := next(iter(services.check_mlflow()))).status != "ok":
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        assert check.detail == f"http://127.0.0.1:{port} answers"
    finally:
        os.killpg(server.pid, 9)
        server.wait(60)


def test_mlflow_stores_without_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    assert "file store" in only_failure(list(services.check_mlflow())).detail

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new/mlflow.db")
    assert [check.status for check in services.check_mlflow()] == ["ok"]

    (tmp_path / "garbage.db").write_bytes(b"no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/garbage.db")
    assert "garbage.db" in only_failure(list(services.check_mlflow())).fix


def test_s3_passes_with_a_server_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    checks = list(services.check_s3(f"s3://{s3_server.new_bucket()}/prefix"))
    assert [check.status for check in checks] == ["ok", "ok"]
    assert s3_server.secret not in str(checks)
    assert "NoSuchBucket" in only_failure(list(services.check_s3("s3://no-such-bucket"))).detail

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "SignatureDoesNotMatch" in only_failure(list(services.check_s3())).detail


def test_an_s3_endpoint_that_does_not_answer_fails(
    monkeypatch: pytest.MonkeyPatch, s3_server: S3Server, closed_port: int
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    assert "AWS_ENDPOINT_URL" in only_failure(list(services.check_s3())).fix


def test_s3_without_credentials_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "AWS_ACCESS_KEY_ID" in only_failure(list(services.check_s3("s3://bucket"))).fix


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("node1 slots=2\nnode2\n", ":2: 'node2'"),
        ("node1 slots=0\n", "slots=0"),
        ("node1 slots=2\nnode1 slots=2\n", ":2: node1 stands twice"),
        ("# nothing\n\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, wrong: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(text)
    assert wrong in only_failure(list(hosts.check_hostfile(file))).detail


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    only_failure(list(hosts.check_hostfile(tmp_path / "hostfile")))


def test_a_host_that_does_not_resolve_fails(tmp_path: Path) -> None:
    _require("ssh", "pdsh")
    file = tmp_path / "hostfile"
    file.write_text("nowhere.invalid slots=2  # a name that RFC 6761 keeps unresolvable\n")
    failure = only_failure(list(hosts.check_hostfile(file)))
    assert failure.name == "host nowhere.invalid"
    assert "does not resolve" in failure.detail


def test_hosts_behind_a_real_sshd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed_port: int) -> None:
    _require("ssh", "pdsh", "sshd", "ssh-keygen")
    with _sshd(tmp_path) as config:
        config.write_text(config.read_text() + f"Host closed\n  HostName 127.0.0.1\n  Port {closed_port}\n")
        # ssh reads its settings from the account's home, whatever HOME says.
        wrapper = tmp_path / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        file = tmp_path / "hostfile"

        file.write_text("node1 slots=2\nnode2 slots=2\n")
        rows = {check.name: check for check in hosts.check_hostfile(file)}
        assert [rows[name].status for name in ("hostfile", "host node1", "host node2")] == ["ok"] * 3

        (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=absent0\n")
        failure = only_failure(list(hosts.check_hostfile(file)))
        assert "absent0 is not on node1, node2" in failure.detail

        file.write_text("node1 slots=2\nclosed slots=2\n")
        (tmp_path / ".deepspeed_env").unlink()
        failure = only_failure(list(hosts.check_hostfile(file)))
        assert failure.name == "host closed"
        assert "refused" in failure.detail


DOCTOR = """
import dataclasses, json, sys
from pathlib import Path
from infra.doctor.hosts import check_hostfile
print(json.dumps([dataclasses.asdict(check) for check in check_hostfile(Path(sys.argv[1]))]))
"""


def rows_of(hosts: TwoHosts, **more: str) -> dict[str, Check]:
    """The rows of `ird doctor --hostfile`, asked on the first of two hosts that others cannot be told from."""
    done = hosts.a.run(
        *(sys.executable, "-c", DOCTOR, str(hosts.hostfile)), timeout=120, PYTHONPATH=str(REPOSITORY), **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["name"]: Check(**row) for row in json.loads(done.stdout)}


def wrong(rows: dict[str, Check]) -> set[str]:
    assert all(row.fix for row in rows.values() if row.status != "ok")
    return {name for name, row in rows.items() if row.status != "ok"}


@pytest.mark.slow
def test_two_healthy_hosts(two_hosts: TwoHosts) -> None:  # noqa: F811
    rows = rows_of(two_hosts)
    assert wrong(rows) == set(), rows
    assert f"GLOO_SOCKET_IFNAME={INTERFACE} is on every host" in rows["interface"].detail
    assert "10.77.0.1, 10.77.0.2" in rows["ports"].detail and "the same versions" in rows["hosts"].detail


@pytest.mark.slow
def test_a_host_that_does_not_answer_fails(two_hosts: TwoHosts) -> None:  # noqa: F811
    two_hosts.cut(two_hosts.b)
    try:
        rows = rows_of(two_hosts)
    finally:
        two_hosts.mend(two_hosts.b)
    assert wrong(rows) == {f"host {two_hosts.b.name}"} and "ssh: " in rows[f"host {two_hosts.b.name}"].detail


@pytest.mark.slow
def test_a_host_that_is_not_like_the_others_fails(two_hosts: TwoHosts) -> None:  # noqa: F811
    b = two_hosts.b
    interpreter = Path(sys.executable).resolve()
    with b.another(interpreter, b"#!/bin/sh\nexit 1\n"):
        rows = rows_of(two_hosts)
    assert wrong(rows) == {f"host {b.name}"} and "does not run there" in rows[f"host {b.name}"].detail

    source = REPOSITORY / "training" / "entry.py"
    metadata = (
        Path(str(importlib.metadata.distribution("torch").locate_file(""))) / f"torch-{version('torch')}.dist-info"
    )
    older = (metadata / "METADATA").read_text().replace(f"\nVersion: {version('torch')}\n", "\nVersion: 2.0.0\n")
    with (
        b.another(source, source.read_bytes() + b"# one commit ahead\n"),
        b.another(metadata / "METADATA", older.encode()),
    ):
        rows = rows_of(two_hosts)
    assert wrong(rows) == {"hosts: code", "hosts: torch"}, rows
    assert f"{b.name}: 2.0.0" in rows["hosts: torch"].detail and b.name in rows["hosts: code"].detail


@pytest.mark.slow
def test_an_interface_over_which_hosts_do_not_reach_each_other_fails(two_hosts: TwoHosts) -> None:  # noqa: F811
    for number, host in enumerate(two_hosts.all):
        for command in ("link add docker0 type bridge", f"address add 172.17.{number}.1/24 dev docker0"):
            assert host.run("ip", *command.split()).returncode == 0
        assert host.run("ip", "link", "set", "docker0", "up").returncode == 0
    settings = two_hosts.a.folder / "deepspeed_env"
    usual = settings.read_text()
    try:
        settings.write_text("GLOO_SOCKET_IFNAME=docker0\n")
        rows = rows_of(two_hosts)
        assert wrong(rows) == {"ports"}, rows
        assert f"{two_hosts.a.name} to {two_hosts.b.name}" in rows["ports"].detail

        settings.write_text("DS_ACCELERATOR=cpu\n")
        assert wrong(rows_of(two_hosts)) == {"interface"}  # several, and none chosen

        assert two_hosts.b.run("ip", "link", "delete", "docker0").returncode == 0
        settings.write_text("GLOO_SOCKET_IFNAME=docker0\n")
        rows = rows_of(two_hosts)
        assert wrong(rows) == {"interface"} and f"is not on {two_hosts.b.name}" in rows["interface"].detail
    finally:
        settings.write_text(usual)
        two_hosts.a.run("ip", "link", "delete", "docker0")
        two_hosts.b.run("ip", "link", "delete", "docker0")


def test_clocks_disks_and_ports_of_hosts() -> None:
    here = {"python": "3", "torch": "2", "deepspeed": "0", "ird": "0", "code": "c", "folder": True, "skew": 0.0}
    here |= {"free": 5 * GIB, "port_taken": False}
    late, full = here | {"skew": 3.5}, here | {"free": GIB, "port_taken": True}
    clocks = [c for c in hosts._alike({"a": here, "b": late}) if c.name == "hosts: clock"]
    assert [(c.status, c.detail) for c in clocks] == [("warn", "another time on b by 4 s")]
    clocks = [c for c in hosts._alike({"a": here, "b": here | {"skew": 4000.0}}) if c.name == "hosts: clock"]
    assert [c.status for c in clocks] == ["fail"]
    rows = list(hosts._room({"a": full, "b": here}))
    assert [(c.name, c.status) for c in rows] == [("hosts: disk", "warn"), ("master port", "warn")]
    assert "1.0 GiB on a" in rows[0].detail and list(hosts._room({"a": here, "b": here})) == []


def test_passwords_in_addresses_are_hidden() -> None:
    assert without_password("postgresql://me:s3cret@db/ird") == "postgresql://***@db/ird"
    assert without_password("http://host:5000/x@y") == "http://host:5000/x@y"


def _require(*commands: str) -> None:
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [command for command in commands if shutil.which(command, path=path) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on PATH")


@contextlib.contextmanager
def _sshd(folder: Path) -> Iterator[Path]:
    """A real sshd on a free port for this account; yields an ssh configuration that calls it node1 and node2."""
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server_settings = folder / "sshd_config"
    server_settings.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n"
    )
    client_settings = folder / "ssh_config"
    client_settings.write_text(
        f"Host node1 node2\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user_key\n"
        f"  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd run by root refuses to start without it
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    with open(folder / "sshd.log", "wb") as log:
        server = subprocess.Popen([str(program), "-D", "-e", "-f", str(server_settings)], stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "sshd.log").read_text()
                time.sleep(0.1)
        yield client_settings
    finally:
        server.terminate()
        server.wait(60)
