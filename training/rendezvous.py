"""Ranks find each other: a roll call before the process group is made, so that a host that is missing has a name.

Left to torch, a rank that another cannot reach makes all of them wait in silence for ten minutes, and what is said then
is an address in a C++ trace. Here every rank first writes its host and its address into rank 0's store (a TCPStore at
MASTER_ADDR:MASTER_PORT, the one that the process group itself will use), and who waits says once for what.
"""

import base64
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import psutil
import torch.distributed as dist

from infra.errors import Refusal
from infra.launcher import LOST, PROGRESS

_HELP = (
    "`ird doctor --hostfile HOSTFILE` tries ssh, the interfaces and the ports between the hosts. Usual reasons: a host "
    "whose ranks did not start, a firewall, GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) missing in .deepspeed_env. "
    "See docs/operations-multi-host.md"
)


class MeetingError(Refusal, RuntimeError):
    """The ranks cannot meet as they were started. The message says which host, what was found, and the fix."""


def seconds_of(variable: str, default: float) -> float:
    """A number of seconds from the environment.

    Raises:
        MeetingError: it is no number of seconds.
    """
    text = os.environ.get(variable, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise MeetingError(f"{variable}={text}: expected a number of seconds, for example {default:g}")
    return value


class Meeting:
    """The roll call of the ranks that the environment of a launcher describes (RANK, WORLD_SIZE, MASTER_ADDR …).

    Args:
        backend: ``gloo`` has its address checked; NCCL looks for interfaces by itself.

    Attributes:
        store: rank 0's store, for this process alone.
    """

    store: dist.TCPStore

    def __init__(self, backend: str) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._backend = backend
        self._timeout = seconds_of("IRD_JOIN_TIMEOUT", 600)

    def gather(self) -> None:
        """Write this rank into rank 0's store, and wait until every rank stands there.

        Ends the process with ``LOST`` after IRD_JOIN_TIMEOUT seconds (600), having said who is missing.

        Raises:
            MeetingError: the port is taken, or an interface is missing or leads nowhere.
        """
        mine = {"host": socket.gethostname(), **self._own_address()}
        with self._patience(self._who_is_missing):
            self.store = self._connect()
            self.store.set(f"ird/pulse/{self.rank}", "0 0 0")
            self.store.set(f"ird/member/{self.rank}", json.dumps(mine))
            if self.store.add("ird/here", 1) == self.world_size:
                self.store.set("ird/verdict of the roll call", self._fault_of_members() or "all here")
            fault = self.store.get("ird/verdict of the roll call").decode()
        if fault != "all here":
            raise MeetingError(fault)

    @contextlib.contextmanager
    def first_exchange(self) -> Iterator[None]:
        """Around what makes the process group and first sends something through it.

        Raises:
            MeetingError: ranks did not reach each other.
        """
        self.store.add("ird/ready", 1)
        with self._patience(self._what_keeps_the_exchange):
            try:
                yield
            except RuntimeError as error:
                reason = (str(error).splitlines() or [""])[0]
                raise MeetingError(f"{self._what_keeps_the_exchange()}. Found: {reason}") from error

    def _connect(self) -> dist.TCPStore:
        address, _, port = self.where.rpartition(":")
        try:
            return dist.TCPStore(
                address,
                int(port),
                self.world_size,
                is_master=self.rank == 0,
                # Longer than ours, which comes with an explanation.
                timeout=timedelta(seconds=self._timeout + 60),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            if self.rank == 0 and "EADDRINUSE" in str(error):
                fault = f"port {port} of {socket.gethostname()} is taken: choose another (--master_port, MASTER_PORT)"
            else:
                fault = f"rank {self.rank} cannot use {self.where}: {str(error).splitlines()[0]}. {_HELP}"
            raise MeetingError(fault) from None

    def _own_address(self) -> dict[str, str]:
        """Interface and address at which gloo will listen here, found as torch finds them."""
        chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        if not chosen:
            try:
                return {"interface": "", "address": socket.gethostbyname(socket.gethostname())}
            except OSError:
                return {"interface": "", "address": "127.0.0.1"}
        interfaces = psutil.net_if_addrs()
        usable = [a.address for a in interfaces.get(chosen, []) if a.family in (socket.AF_INET, socket.AF_INET6)]
        if not usable and self._backend == "gloo":
            raise MeetingError(
                f"GLOO_SOCKET_IFNAME={chosen}: {socket.gethostname()} has no such interface with an address. It has "
                f"{', '.join(sorted(interfaces))}. Give a name that all hosts share, in .deepspeed_env"
            )
        return {"interface": chosen, "address": usable[0] if usable else ""}

    def _fault_of_members(self) -> str:
        """What would make the first exchange hang although all ranks are here; "" when nothing would."""
        members = self.members()
        if self._backend != "gloo" or len({member["host"] for member in members}) < 2:
            return ""
        hosts_at: dict[str, set[str]] = {}
        for member in members:
            hosts_at.setdefault(member["address"], set()).add(member["host"])
        another = "Put GLOO_SOCKET_IFNAME=INTERFACE into .deepspeed_env: a name that all hosts share (`ip -br address`)"
        for address, hosts in sorted(hosts_at.items()):
            names = ", ".join(sorted(hosts))
            if ip_address(address.split("%")[0]).is_loopback:
                return f"{names}: the host's own name leads to {address}, where no other host reaches it. {another}"
            if len(hosts) > 1:  # as docker0 has it
                return f"{names} have the same address {address} where ranks would listen. {another}"
        return ""

    def members(self) -> list[dict[str, str]]:
        """Host, interface and address of every rank; waits for ranks that are not there."""
        return [json.loads(m) for m in self.store.multi_get([f"ird/member/{r}" for r in range(self.world_size)])]

    @contextlib.contextmanager
    def _patience(self, explain: Callable[[], str]) -> Iterator[None]:
        """Say once what is waited for, and end this process when it has been long enough."""
        done = threading.Event()
        patience = min(30.0, self._timeout / 3)

        def wait() -> None:
            if not done.wait(patience):
                say(f"{patience:.0f} s at the start: {explain()}")
                if not done.wait(self._timeout - patience):
                    say(f"gave up after {self._timeout:.0f} s (IRD_JOIN_TIMEOUT): {explain()}")
                    os._exit(LOST)

        threading.Thread(target=wait, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _who_is_missing(self) -> str:
        here = f"rank {self.rank} on {socket.gethostname()}"
        if not hasattr(self, "store"):
            return f"{here} does not reach rank 0 at {self.where}: {_reason(self.where)}. {_HELP}"
        if self.rank != 0:
            return f"{here} has reached rank 0 at {self.where} and waits for other ranks; rank 0 says which"
        # A connection of its own: that of the main thread is waiting.
        asked = self._connect()
        names = hostfile_names()
        missing = [r for r in range(self.world_size) if not asked.check([f"ird/member/{r}"])]
        shown = ", ".join(f"rank {r}{f' ({names[r]})' if r in names else ''}" for r in missing[:16])
        return (
            f"{self.world_size - len(missing)} of {self.world_size} ranks have come to {self.where}. Missing: {shown}"
            f"{' …' if len(missing) > 16 else ''}. Their hosts must reach that address and port. {_HELP}"
        )

    def _what_keeps_the_exchange(self) -> str:
        ready = self.store.add("ird/ready", 0)
        if ready < self.world_size:
            return f"{ready} of {self.world_size} ranks are ready; others compile (once a host) or import still"
        addresses = {f"{m['host']} at {m['address']} {m['interface']}".strip() for m in self.members()}
        return (
            f"all {self.world_size} ranks have met at {self.where}, but cannot exchange anything. They "
            f"listen on {', '.join(sorted(addresses))}: each must reach the others there, on any port. {_HELP}"
        )


def say(message: str) -> None:
    """A line for people, on stderr."""
    print(f"{PROGRESS}{message}", file=sys.stderr, flush=True)


def hostfile_names() -> dict[int, str]:
    """The hosts of all ranks as the hostfile calls them: only the command line of the node's launcher has them."""
    try:
        line = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return {}
    prefix = "--world_info="
    encoded = next((part.removeprefix(prefix) for part in line if part.startswith(prefix)), None)
    if encoded is None:
        return {}
    slots: dict[str, list[Any]] = json.loads(base64.urlsafe_b64decode(encoded))
    return dict(enumerate(host for host, numbers in slots.items() for _ in numbers))


def _reason(where: str) -> str:
    address, _, port = where.rpartition(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError as error:
        return str(error)
    return "it takes the connection, but does not answer"
