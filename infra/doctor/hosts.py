"""Checks of a DeepSpeed hostfile: that its hosts answer, are alike, and reach each other the way ranks will."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from infra.doctor import remote
from infra.doctor.check import GIB, Check, Status, output_of, short

_SSH_SECONDS = 5
_TASK_SECONDS = 30
_MASTER_PORT = 29500  # what `deepspeed` takes without --master_port
_CLOCK_WARNS, _CLOCK_FAILS = 2.0, 300.0  # seconds; S3 refuses requests that are 15 minutes off

Facts = dict[str, Any]


def check_hostfile(path: Path) -> Iterator[Check]:
    """Every line parses; every host resolves, answers ssh without a password, has the same Python, packages, code and
    time as this machine, and room to write; they share an interface, and reach each other through it.
    """
    form = "One line a host: HOSTNAME slots=N"
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        yield Check("hostfile", "fail", f"{path}: {short(error)}", f"Write the file. {form}")
        return
    hosts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if match is None:
            yield Check("hostfile", "fail", f"{path}:{number}: {line!r} is no host line", form)
            return
        if match[1] in hosts:
            yield Check("hostfile", "fail", f"{path}:{number}: {match[1]} stands twice", "Add its slots into one line.")
            return
        hosts.append(match[1])
    if not hosts:
        yield Check("hostfile", "fail", f"{path} names no host", form)
        return
    yield Check("hostfile", "ok", f"{path}: {len(hosts)} hosts")
    if shutil.which("pdsh"):
        yield Check("pdsh", "ok", "there")
    else:
        fix = "apt-get install pdsh, or start each node yourself with deepspeed --no_ssh --node_rank"
        yield Check("pdsh", "fail", "missing; DeepSpeed reaches hosts with it", fix)
    if shutil.which("ssh") is None:
        yield Check("ssh", "fail", "missing", "apt-get install openssh-client")
        return
    chosen = _deepspeed_env().get("GLOO_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME") or ""
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        results = list(pool.map(lambda host: _probe_host(host, chosen), hosts))
    yield from (check for check, _ in results)
    usable = {host: facts for host, (_, facts) in zip(hosts, results) if facts is not None}
    yield from _keepalive(list(usable))
    yield from _alike(usable)
    yield from _room(usable)
    interface = list(_shared_interface({host: set(facts["interfaces"]) for host, facts in usable.items()}, chosen))
    yield from interface
    if len(usable) > 1 and all(check.status != "fail" for check in interface):
        yield from _reachability(usable)


def _probe_host(host: str, interface: str) -> tuple[Check, Facts | None]:
    """Whether a host can be used, and what stands there (None when it cannot)."""
    name = f"host {host}"
    # An alias of ~/.ssh/config need not resolve; ssh itself says which name it would dial.
    settings = output_of(["ssh", "-G", host]) or ""
    dialled = next((line.split()[1] for line in settings.splitlines() if line.startswith("hostname ")), host)
    jumps = re.search(r"^proxy(jump|command) (?!none)", settings, re.MULTILINE)
    try:
        if not jumps:
            socket.getaddrinfo(dialled, None)
    except OSError as error:
        fix = f"Add {host} to DNS, /etc/hosts or ~/.ssh/config, or correct the hostfile."
        return Check(name, "fail", f"does not resolve: {short(error)}", fix), None
    before = time.time()
    done = _on(host, "facts", str(Path.cwd()), interface, str(_MASTER_PORT))
    after = time.time()
    last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    if done.returncode == 255:
        fix = f"`ssh {host} true` must work without a password: start sshd there, ssh-copy-id, accept its host key."
        return Check(name, "fail", f"ssh: {last}", fix), None
    try:
        facts: Facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        fix = f"DeepSpeed starts this very path on every host: install the same environment at {sys.executable} there."
        return Check(name, "fail", f"{sys.executable} does not run there: {last}", fix), None
    # Somewhere between the two the other clock was read; what lies outside is its error.
    facts["skew"] = max(before - facts["time"], facts["time"] - after, 0.0)
    return Check(name, "ok", f"resolves to {dialled}, ssh answers, Python {facts['python']} runs"), facts


def _on(host: str, *task: str) -> subprocess.CompletedProcess[str]:
    """Run a task of ``remote`` on a host, with the interpreter that DeepSpeed would start there."""
    try:
        return subprocess.run(
            _ssh(host, *task),
            input=Path(remote.__file__).read_text(),
            capture_output=True,
            text=True,
            timeout=_TASK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(task, 255, "", "no answer")


def _ssh(host: str, *task: str) -> list[str]:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}"]
    return ["ssh", *options, host, shlex.join(["env", f"PYTHONPATH={_python_path()}", sys.executable, "-", *task])]


def _python_path() -> str:
    """As DeepSpeed carries it to every host: the folder of the command first."""
    return os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))


def _keepalive(hosts: list[str]) -> Iterator[Check]:
    """Without ServerAliveInterval, ssh waits for ever for a host that is cut off, and with it pdsh and `deepspeed`."""
    local = {socket.gethostname(), "localhost", "127.0.0.1"}
    settings = {host: output_of(["ssh", "-G", host]) or "" for host in hosts if host not in local}
    without = [host for host, text in settings.items() if not re.search(r"^serveraliveinterval [1-9]", text, re.M)]
    if without:
        fix = "ServerAliveInterval 15 and ServerAliveCountMax 4 in ~/.ssh/config; `ird train` does it by itself"
        yield Check("ssh keepalive", "warn", f"none for {_listed(without)}: a lost host would not be noticed", fix)
    elif settings:
        yield Check("ssh keepalive", "ok", "set for every host")


def _alike(hosts: dict[str, Facts]) -> Iterator[Check]:
    """Everything as on this machine, from where the command is given."""
    done = subprocess.run(
        [sys.executable, remote.__file__, "facts", str(Path.cwd()), "", "0"],
        env={**os.environ, "PYTHONPATH": _python_path()},
        capture_output=True,
        text=True,
        check=True,
        timeout=_TASK_SECONDS,
    )
    here: Facts = json.loads(done.stdout)
    for name, what, fix in (
        ("python", "Python", f"Install the same environment at {sys.prefix} there."),
        ("torch", "torch", "pip install -r requirements.lock, there"),
        ("deepspeed", "DeepSpeed", "pip install -r requirements.lock, there"),
        ("ird", "ird", "The same ird on every host: git pull there, or a folder that all hosts share."),
        ("code", "the code of ird", "git pull there, or a folder that all hosts share; ranks must run the same code."),
    ):
        other = {host: facts[name] for host, facts in hosts.items() if facts[name] != here[name]}
        if other:
            found = ", ".join(f"{host}: {value}" for host, value in list(other.items())[:8])
            yield Check(f"hosts: {name}", "fail", f"{what} is {here[name]} here, but on {found}", fix)
    missing = [host for host, facts in hosts.items() if not facts["folder"]]
    if missing:
        fix = "Start the command in a folder that all hosts share: DeepSpeed changes into it on every host."
        yield Check("hosts: folder", "fail", f"{Path.cwd()} is not on {_listed(missing)}", fix)
    off = {host: facts["skew"] for host, facts in hosts.items() if facts["skew"] > _CLOCK_WARNS}
    if off:
        found = ", ".join(f"{host} by {seconds:.0f} s" for host, seconds in off.items())
        status: Status = "fail" if max(off.values()) > _CLOCK_FAILS else "warn"
        yield Check("hosts: clock", status, f"another time on {found}", "Start chrony or systemd-timesyncd there.")
    if hosts and not missing and not off and all(facts["code"] == here["code"] for facts in hosts.values()):
        yield Check("hosts", "ok", f"the same versions, code ({here['code']}) and time as here")


def _room(hosts: dict[str, Facts]) -> Iterator[Check]:
    """Space in the folder of the command, and the port at which ranks will meet."""
    small = {host: facts["free"] / GIB for host, facts in hosts.items() if facts["folder"] and facts["free"] < 2 * GIB}
    if small:
        found = ", ".join(f"{free:.1f} GiB on {host}" for host, free in small.items())
        yield Check("hosts: disk", "warn", f"{found} free at {Path.cwd()}", "Free at least 2 GiB there.")
    if hosts and next(iter(hosts.values()))["port_taken"]:
        fix = "Choose another one with --master_port, or end what holds it."
        first = next(iter(hosts))
        yield Check("master port", "warn", f"port {_MASTER_PORT} of {first}, DeepSpeed's default, is taken", fix)


def _shared_interface(interfaces: dict[str, set[str]], chosen: str) -> Iterator[Check]:
    """gloo and NCCL take one interface name for all hosts; DeepSpeed carries it there by .deepspeed_env."""
    if len(interfaces) < 2:
        return
    common = set.intersection(*interfaces.values())
    candidates = ", ".join(sorted(common)) or "none"
    if not chosen:
        if len(common) == 1 and all(names == common for names in interfaces.values()):
            yield Check("interface", "ok", f"{candidates} on every host")
        else:
            fix = f"echo GLOO_SOCKET_IFNAME=NAME >> ~/.deepspeed_env (NCCL_SOCKET_IFNAME too); shared: {candidates}"
            yield Check("interface", "warn", "hosts have several or different interfaces, and none is chosen", fix)
    elif lacking := [host for host, names in interfaces.items() if chosen not in names]:
        fix = f"Choose a name that every host has ({candidates}) in .deepspeed_env."
        yield Check("interface", "fail", f"GLOO_SOCKET_IFNAME={chosen} is not on {_listed(lacking)}", fix)
    else:
        yield Check("interface", "ok", f"GLOO_SOCKET_IFNAME={chosen} is on every host")


def _reachability(hosts: dict[str, Facts]) -> Iterator[Check]:
    """A listener on every host where gloo's will be; the first host connects to all others, and they to it."""
    addresses = {host: facts["address"] for host, facts in hosts.items()}
    several = len({facts["host"] for facts in hosts.values()}) > 1
    nowhere = [host for host, address in addresses.items() if not address or ip_address(address).is_loopback]
    if several and nowhere:
        fix = "GLOO_SOCKET_IFNAME=NAME in .deepspeed_env; or let the host's name in its /etc/hosts lead to its address."
        found = ", ".join(f"{host}: {addresses[host] or 'no IPv4 address'}" for host in nowhere)
        yield Check("addresses", "fail", f"others would look for ranks where nobody else comes ({found})", fix)
        return
    first, *others = hosts
    with contextlib.ExitStack() as listeners:
        targets = {
            host: f"{address},{listeners.enter_context(_listener(host, address))}"
            for host, address in addresses.items()
        }
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            from_first = pool.submit(_on, first, "connect", *(targets[host] for host in others))
            to_first = dict(zip(others, pool.map(lambda host: _on(host, "connect", targets[first]), others)))
    broken = [f"{first} to {host} ({reason})" for host, reason in _failures(from_first.result(), targets, others)]
    broken += [
        f"{host} to {first} ({r})" for host, done in to_first.items() for _, r in _failures(done, targets, [first])
    ]
    if broken:
        fix = "Open all ports between the hosts on that interface (ranks take any), or choose another interface."
        yield Check("ports", "fail", f"no connection from {_listed(broken)}", fix)
    else:
        yield Check(
            "ports", "ok", f"{first} and the others reach each other at {', '.join(list(addresses.values())[:8])}"
        )


@contextlib.contextmanager
def _listener(host: str, address: str) -> Iterator[str]:
    """A listener on another host; yields its port ("0", which refuses, where it did not start)."""
    process = subprocess.Popen(
        _ssh(host, "listen", address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(Path(remote.__file__).read_text())
            process.stdin.close()
        yield process.stdout.readline().strip() or "0"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _failures(
    done: subprocess.CompletedProcess[str], targets: dict[str, str], wanted: list[str]
) -> Iterator[tuple[str, str]]:
    try:
        failed: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        failed = dict.fromkeys(
            (targets[host] for host in wanted), (done.stderr.strip() or "no answer").splitlines()[-1]
        )
    yield from ((host, failed[targets[host]]) for host in wanted if targets[host] in failed)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _deepspeed_env() -> dict[str, str]:
    """What DeepSpeed exports to every node: NAME=VALUE lines of .deepspeed_env here or at home, this folder winning."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    values: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        file = folder / name
        if file.is_file():
            pairs = (line.split("=", 1) for line in file.read_text().splitlines() if "=" in line)
            values.update({key.strip(): value.strip() for key, value in pairs})
    return values
