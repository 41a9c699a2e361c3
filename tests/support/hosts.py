"""Two hosts made of network namespaces, each with its name, its address on a switch, its ``/etc/hosts`` and an sshd.

They share this machine's files, as hosts with one NFS would, and its process table. Nothing outside the namespaces
changes but ``/etc/netns/<name>``, which ``ip netns exec`` lays over ``/etc``, and goes with them.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

INTERFACE = "lan0"
_PREFIX = "irdtest"
_ETC = Path("/etc/netns")
_TOOLS = ("ip", "unshare", "nsenter", "hostname", "ssh", "ssh-keygen", "sshd", "pdsh")
# sshd and ip live in the sbin folders, which are often not on PATH.
_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


class Host:
    """One of them. Commands run in its namespaces: they see its interface, its name and nothing of the other."""

    def __init__(self, letter: str, address: str, folder: Path) -> None:
        self.name = f"node-{letter}-{os.getpid()}"
        self.address = address
        self.namespace = f"{_PREFIX}-{os.getpid()}-{letter}"
        self.folder = folder
        self.port = f"port-{letter}"
        foreign = ("MLFLOW_", "DS_", "IRD_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment |= {"PATH": _PATH, "DS_ENV_FILE": str(folder / "deepspeed_env"), "OMP_NUM_THREADS": "1"}

    def command(self, arguments: Sequence[str]) -> list[str]:
        named = f'hostname {self.name} && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh", *arguments]

    def run(self, *arguments: str, timeout: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end; ``more`` is added to its environment."""
        process = subprocess.Popen(
            self.command(arguments),
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"{shlex.join(arguments)} did not end within {timeout:.0f} s:\n{out}\n{err}")
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
        """Start a command here, in a session of its own that ``end`` ends."""
        with open(log, "ab") as said:
            return subprocess.Popen(
                self.command(arguments),
                env={**self.environment, **more},
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def another(self, path: Path, content: bytes) -> Iterator[None]:
        """While it lasts, those who come by ssh find another file at ``path`` on this host alone."""
        (self.folder / path.name).write_bytes(content)
        (self.folder / path.name).chmod(path.stat().st_mode)
        (server,) = (p for p in self.processes("sshd_config") if p.name() == "sshd" and "-D" in p.cmdline())
        inside = ["nsenter", "--mount", "--target", str(server.pid)]
        mount = [*inside, "mount", "--bind", str(self.folder / path.name), str(path)]
        subprocess.run(mount, check=True, capture_output=True, env=_tools())
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", str(path)], check=True, capture_output=True, env=_tools())

    def processes(self, containing: str = "") -> list[psutil.Process]:
        """Living processes of this host whose command line holds ``containing``."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, env=_tools())
        found = []
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if containing in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


class TwoHosts:
    """Both hosts, the hostfile that names them, and the switch between them."""

    def __init__(self, folder: Path) -> None:
        self.a, self.b = (Host(letter, f"10.77.0.{n}", folder) for n, letter in enumerate("ab", start=1))
        self.hostfile = folder / "hostfile"
        self._switch = f"{_PREFIX}-{os.getpid()}-switch"
        self._folder = folder

    @property
    def all(self) -> tuple[Host, Host]:
        return self.a, self.b

    def build(self) -> None:
        self.hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self.all))
        # What DeepSpeed carries to every host: the interface to meet on, and what a shell there would not set.
        carried = {"GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
            carried["TORCH_EXTENSIONS_DIR"] = folder
        (self._folder / "deepspeed_env").write_text("".join(f"{name}={text}\n" for name, text in carried.items()))
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for name in ("host_key", "user_key"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name)]
            subprocess.run(key, check=True, env=_tools())
        for host in self.all:
            self._add(host)

    def _add(self, host: Host) -> None:
        _ip("netns", "add", host.namespace)
        pair = ("type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
        _ip("-n", self._switch, "link", "add", host.port, *pair)
        _ip("-n", self._switch, "link", "set", host.port, "master", "switch", "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", host.namespace, "link", "set", interface, "up")
        etc = _ETC / host.namespace
        (etc / "ssh").mkdir(parents=True)
        (etc / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{other.address} {other.name}\n" for other in self.all)
        )
        (etc / "ssh" / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self._folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile {self._folder}/known_hosts\n  LogLevel ERROR\n"
            # Without it an ssh to a host that went away waits for ever, and pdsh with it.
            f"  ServerAliveInterval 3\n  ServerAliveCountMax 3\n"
        )
        settings = self._folder / f"sshd_config_{host.name}"
        settings.write_text(
            f"ListenAddress {host.address}:22\nHostKey {self._folder}/host_key\nStrictModes no\nUsePAM no\n"
            f"AuthorizedKeysFile {self._folder}/user_key.pub\nPidFile none\nPasswordAuthentication no\n"
            f"PermitRootLogin prohibit-password\n"
        )
        log = self._folder / f"sshd_{host.name}.log"
        server = host.start(str(shutil.which("sshd", path=_PATH)), "-D", "-e", "-f", str(settings), log=log)
        deadline = time.monotonic() + 30
        while "Server listening" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def cut(self, host: Host) -> None:
        """Take the host's link down at the switch: the other host sees nothing but silence."""
        _ip("-n", self._switch, "link", "set", host.port, "down")

    def mend(self, host: Host) -> None:
        _ip("-n", self._switch, "link", "set", host.port, "up")

    def destroy(self) -> None:
        for namespace in (self.a.namespace, self.b.namespace, self._switch):
            _remove(namespace)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts that reach each other by ssh without a password. Skips where they cannot be made."""
    _skip_where_impossible()
    for namespace in _leftovers():
        _remove(namespace)
    hosts = TwoHosts(tmp_path_factory.mktemp("hosts"))
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.destroy()


def _skip_where_impossible() -> None:
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on PATH")
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        done = subprocess.run(
            ["ip", "netns", "exec", probe, "unshare", "--uts", "true"], capture_output=True, text=True, env=_tools()
        )
        _ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"root may not make network namespaces here: {error.stderr.strip()}")
    if done.returncode != 0:
        pytest.skip(f"root may not enter network namespaces here: {done.stderr.strip()}")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd run by root refuses to start without it


def _leftovers() -> list[str]:
    """Namespaces of earlier test runs that were killed: their names hold the pid that made them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, env=_tools()).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.startswith(f"{_PREFIX}-")]
    return [name for name in names if not psutil.pid_exists(int(name.split("-")[1]))]


def _remove(namespace: str) -> None:
    """End what runs in a namespace and take it away, with its folder; does nothing where it is not there."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, env=_tools())
    processes = []
    for pid in map(int, listed.stdout.split()):
        with contextlib.suppress(psutil.Error):
            processes.append(psutil.Process(pid))
            processes[-1].kill()
    psutil.wait_procs(processes, timeout=10)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, env=_tools())
    shutil.rmtree(_ETC / namespace, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, env=_tools())


def _tools() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}
