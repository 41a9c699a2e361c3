"""Training on two hosts, as people and schedulers start it, and through the loss of one of them."""

import base64
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from infra.launcher import LOST, run_deepspeed, session_processes
from infra.storage import open_store
from tests.support.dataset import REPOSITORY
from tests.support.hosts import INTERFACE, TwoHosts, two_hosts  # noqa: F401  (a fixture)
from training.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ["model.dim=8", "data.patch=16", "data.batch=4", "data.crops_per_sample=2", "steps=12", "log_every=4"]
SETTINGS += ["schedule.kind=constant", "checkpoint_every=1", "tracking.enabled=false", "cotraining.mode=alternate"]


def stage(dataset: Path, out: Path) -> list[str]:
    """A module for the launcher, with its arguments."""
    config = str(REPOSITORY / "configs/training/pretrain_demo.yaml")
    return ["training.pretrain", "--config", config, *SETTINGS, f"data.dataset={dataset}", f"out={out}"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(open_store(out / "checkpoints"))
    assert saved is not None and saved[1]["step"] == 12
    return saved[0]["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def wait_until(done: Callable[[], object], log: Path, seconds: float = 400) -> None:
    """Wait for something that is bound to happen; the bound only keeps a broken run from hanging."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


# A rank that only meets the other, and then takes STEPS steps of one barrier each, watched as the loop is.
MEET = """
import datetime, os, signal, time
import torch.distributed as dist
from training import distributed
from training.rendezvous import Meeting, MeetingError
from training.watchdog import Watchdog
try:
    meeting = Meeting("gloo")
    meeting.gather()
    with meeting.first_exchange():
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
        dist.barrier()
except MeetingError as error:
    print(error, flush=True)
    raise SystemExit(2)
distributed._watchdog = watchdog = Watchdog(meeting)
with distributed.end_well_or_blame():
    for step in range(int(os.environ.get("STEPS", "0"))):
        dist.barrier()
        watchdog.beat()
        print("step", step, flush=True)
        if str(step) == os.environ.get("DIES_AT") and meeting.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
"""


def start_ranks(
    hosts: TwoHosts, folder: Path, through: tuple[str, ...] = (), **more: str
) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
    """One rank of MEET on each host, and their logs.

    Its parent has the command line of DeepSpeed's launcher, where the hostfile's names stand.
    """
    world = base64.urlsafe_b64encode(json.dumps({host.name: [0] for host in hosts.all}).encode()).decode()
    started, logs = [], [folder / f"{rank}.log" for rank in range(2)]
    for rank, (host, log) in enumerate(zip(hosts.all, logs)):
        settings = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "IRD_JOIN_TIMEOUT": "60"}
        settings |= {"MASTER_ADDR": hosts.a.address, "MASTER_PORT": "29500", "PYTHONPATH": str(REPOSITORY)}
        parent = ["sh", "-c", '"$PYTHON" -c "$MEET"; exit $?', "launcher", f"--world_info={world}"]
        settings |= {"PYTHON": sys.executable, "MEET": MEET, **more}
        log.unlink(missing_ok=True)
        started.append(host.start(*through, *parent, log=log, **settings))
    return started, logs


def meet(hosts: TwoHosts, folder: Path, through: tuple[str, ...] = (), **more: str) -> list[tuple[int, str]]:
    """Exit code and words of two such ranks."""
    started, logs = start_ranks(hosts, folder, through, **more)
    return [(process.wait(200), log.read_text()) for process, log in zip(started, logs)]


def test_a_network_that_is_away_for_a_moment_costs_nothing_but_the_moment(
    two_hosts: TwoHosts,  # noqa: F811
    tmp_path: Path,
) -> None:
    ranks, logs = start_ranks(two_hosts, tmp_path, GLOO_SOCKET_IFNAME=INTERFACE, STEPS="40")
    wait_until(lambda: "step 1\n" in logs[0].read_text() or ranks[0].poll() is not None, logs[0])
    two_hosts.cut(two_hosts.b)
    time.sleep(3)
    two_hosts.mend(two_hosts.b)
    assert [rank.wait(120) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
    assert all("step 39" in log.read_text() for log in logs)


def test_a_rank_that_is_killed_on_another_host_is_named(two_hosts: TwoHosts, tmp_path: Path) -> None:  # noqa: F811
    found = meet(two_hosts, tmp_path, GLOO_SOCKET_IFNAME=INTERFACE, STEPS="40", DIES_AT="1")
    assert [code for code, _ in found] == [LOST, 128 + signal.SIGKILL], found
    b = two_hosts.b
    assert f"lost its connection to {b.name} ({b.address}), which was killed or cut off" in found[0][1]


def test_a_host_that_cannot_be_reached_at_the_start_is_named_on_both_sides(
    two_hosts: TwoHosts,  # noqa: F811
    tmp_path: Path,
) -> None:
    a, b = two_hosts.all
    two_hosts.cut(b)
    try:
        found = meet(two_hosts, tmp_path, GLOO_SOCKET_IFNAME=INTERFACE, IRD_JOIN_TIMEOUT="15")
    finally:
        two_hosts.mend(b)
    (code_a, said_a), (code_b, said_b) = found
    assert code_a == code_b == LOST
    assert f"5 s at the start: 1 of 2 ranks have come to {a.address}:29500. Missing: rank 1 ({b.name})" in said_a
    assert f"rank 1 on {b.name} does not reach rank 0 at {a.address}:29500: " in said_b
    assert all("ird doctor" in said and "gave up after 15 s" in said for said in (said_a, said_b))


@pytest.mark.parametrize(
    ("addresses", "found_by_b"),
    [
        (("172.17.0.1/24", "172.17.1.1/24"), "cannot exchange anything"),
        (("172.17.0.1/16", "172.17.0.1/16"), "have the same address 172.17.0.1"),
    ],
    ids=["no way", "docker's own"],
)
def test_an_interface_that_leads_nowhere_is_named(
    two_hosts: TwoHosts,  # noqa: F811
    tmp_path: Path,
    addresses: tuple[str, str],
    found_by_b: str,
) -> None:
    for address, host in zip(addresses, two_hosts.all):
        for command in ("link add docker0 type bridge", f"address add {address} dev docker0", "link set docker0 up"):
            assert host.run("ip", *command.split()).returncode == 0
    try:
        found = meet(two_hosts, tmp_path, GLOO_SOCKET_IFNAME="docker0", IRD_JOIN_TIMEOUT="30")
    finally:
        for host in two_hosts.all:
            host.run("ip", "link", "delete", "docker0")
    assert all(code in (2, LOST) for code, _ in found), found
    assert all(found_by_b in said and two_hosts.b.name in said for _, said in found), found


def test_a_host_whose_name_leads_to_itself_alone_is_refused_at_once(
    two_hosts: TwoHosts,  # noqa: F811
    tmp_path: Path,
) -> None:
    # Debian writes 127.0.1.1 and the host's own name into /etc/hosts. Here the name leads nowhere, to the same end.
    renamed = ("unshare", "--uts", "sh", "-c", 'hostname "$(hostname).invalid" && exec "$@"', "sh")
    found = meet(two_hosts, tmp_path, through=renamed)
    assert all(
        code == 2 and "own name leads to 127.0.0.1" in said and "GLOO_SOCKET_IFNAME=" in said for code, said in found
    ), found
    (_, said), _ = meet(two_hosts, tmp_path, GLOO_SOCKET_IFNAME="eth7")
    assert f"GLOO_SOCKET_IFNAME=eth7: {two_hosts.a.name} has no such interface" in said and INTERFACE in said


def test_without_ssh_each_host_is_started_by_itself(
    two_hosts: TwoHosts,  # noqa: F811
    small_dataset: Path,
    on_one_host: Path,
    tmp_path: Path,
) -> None:
    """As a scheduler does it: run_node.sh on every host, and all that it must know in its environment."""
    out, log = tmp_path / "out", tmp_path / "log"
    script = str(REPOSITORY / "infra" / "deploy" / "run_node.sh")
    scheduled = {"GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    nodes = [
        host.start(
            *("bash", script, str(rank), two_hosts.a.name, str(two_hosts.hostfile), *stage(small_dataset, out)),
            log=log,
            **scheduled,
        )
        for rank, host in enumerate(two_hosts.all)
    ]
    assert [node.wait(400) for node in nodes] == [0, 0], log.read_text()
    assert_same_weights(out, on_one_host)


@pytest.fixture(scope="module")
def on_one_host(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks on this machine. For reading only."""
    out = tmp_path_factory.mktemp("one") / "out"
    module, _, config, *settings = stage(small_dataset, out)
    run_deepspeed(module, Path(config), settings, out, ranks=2, show=lambda line: None)
    return out


def test_over_pdsh_through_a_killed_launcher_and_a_host_cut_off_to_the_same_weights(
    two_hosts: TwoHosts,  # noqa: F811
    small_dataset: Path,
    on_one_host: Path,
    tmp_path: Path,
) -> None:
    """The command of the README three times: its processes are killed, then a host goes away, then it finishes."""
    a, b = two_hosts.all
    out, log = tmp_path / "out", tmp_path / "log"
    command = ["deepspeed", "--hostfile", str(two_hosts.hostfile), "--module", *stage(small_dataset, out)]

    def ranks() -> list[psutil.Process]:
        return [process for host in two_hosts.all for process in host.processes("training.pretrain")]

    def train_beyond(saved: str) -> subprocess.Popen[bytes]:
        """Start, and come back when a later checkpoint than ``saved`` is there."""
        process = a.start(*command, log=log)
        latest = out / "checkpoints" / "latest"
        wait_until(lambda: process.poll() is not None or (latest.exists() and latest.read_text() != saved), log)
        assert process.poll() is None and len(ranks()) >= 2, log.read_text()
        return process

    process = train_beyond("")
    killed = {
        child for member in session_processes(process.pid) for child in [member, *member.children(recursive=True)]
    }
    assert {"pdsh.bin", "ssh"} <= {member.name() for member in killed}
    for member in killed:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end with those before them
            member.kill()
    process.wait()
    wait_until(lambda: not ranks(), log, 120)
    assert not (out / "finished.json").exists()

    settings = a.folder / "deepspeed_env"
    usual = settings.read_text()
    settings.write_text(usual + "IRD_HOST_TIMEOUT=15\n")
    process = train_beyond((out / "checkpoints" / "latest").read_text())
    two_hosts.cut(b)
    try:
        assert process.wait(200) not in (0, None), log.read_text()
        said = log.read_text()
        assert f"{b.name} (rank 1) has not been heard of" in said and "Run the same command" in said
        assert f"exits with return code = {LOST}" in said
        wait_until(lambda: not ranks(), log, 120)  # on the host that nobody can see, too
        assert not (out / "finished.json").exists()
    finally:
        two_hosts.mend(b)
        settings.write_text(usual)

    again = a.run(*command, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming at step" in again.stdout
    assert json.loads((out / "finished.json").read_text())["ranks"] == 2
    assert_same_weights(out, on_one_host)
