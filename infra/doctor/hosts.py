"""Checks of a DeepSpeed hostfile: that every host resolves, answers ssh, and has the network interface to talk over."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.doctor.check import Check, output_of, short

_SSH_SECONDS = 5


def check_hostfile(path: Path) -> Iterator[Check]:
    """Every line parses, every host resolves and answers ssh without a password, and all share an interface name."""
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
    with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
        results = list(pool.map(_probe_host, hosts))
    yield from (check for check, _ in results)
    yield from _shared_interface({host: names for host, (_, names) in zip(hosts, results) if names is not None})


def _probe_host(host: str) -> tuple[Check, set[str] | None]:
    """Whether a host can be used, and the names of its network interfaces (None when it cannot)."""
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
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}", host, "ls /sys/class/net"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * _SSH_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(command, 255, "", "no answer")
    if done.returncode == 255:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        fix = f"`ssh {host} true` must work without a password: start sshd there, ssh-copy-id, accept its host key."
        return Check(name, "fail", f"ssh: {last}", fix), None
    return Check(name, "ok", f"resolves to {dialled}, ssh answers"), set(done.stdout.split()) - {"lo"}


def _shared_interface(interfaces: dict[str, set[str]]) -> Iterator[Check]:
    """gloo and NCCL take one interface name for all hosts; DeepSpeed carries it there by .deepspeed_env."""
    if len(interfaces) < 2:
        return
    chosen = _deepspeed_env().get("GLOO_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    common = set.intersection(*interfaces.values())
    candidates = ", ".join(sorted(common)) or "none"
    if chosen is None:
        if len(common) == 1 and all(names == common for names in interfaces.values()):
            yield Check("interface", "ok", f"{candidates} on every host")
        else:
            fix = f"echo GLOO_SOCKET_IFNAME=NAME >> ~/.deepspeed_env (NCCL_SOCKET_IFNAME too); shared: {candidates}"
            yield Check("interface", "warn", "hosts have several or different interfaces, and none is chosen", fix)
    elif lacking := [host for host, names in interfaces.items() if chosen not in names]:
        fix = f"Choose a name that every host has ({candidates}) in .deepspeed_env."
        yield Check("interface", "fail", f"GLOO_SOCKET_IFNAME={chosen} is not on {', '.join(lacking)}", fix)
    else:
        yield Check("interface", "ok", f"GLOO_SOCKET_IFNAME={chosen} is on every host")


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
