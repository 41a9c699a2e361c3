"""What a rank does before and around training: join the others, and never outlive its launcher."""

import contextlib
import datetime
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from infra.errors import Refusal
from infra.extensions import prepare_extensions
from infra.launcher import LOST, PREEMPTED, end_with_parent, free_port
from training.rendezvous import Meeting
from training.watchdog import Watchdog

__all__ = ["LAUNCHED", "LOST", "PREEMPTED", "Ranks", "StopRequest", "end_well_or_blame", "join"]

LAUNCHED = "RANK" in os.environ


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None), compare=False)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, tracks and writes."""
        return self.rank == 0


@functools.cache
def join() -> Ranks:
    """Enter the process group that the ``deepspeed`` launcher describes (a group of one without it), once a process.

    On CPU the shared-memory op of DeepSpeed is compiled first, under a lock that a dying process
    cannot leave behind. On Linux the kernel is asked to end this rank when its launcher dies, since
    the launcher does not take its ranks along. From here on the watchdog ends this process when
    another rank or its host is gone.

    Raises:
        MeetingError: the ranks cannot meet as they were started.
        ExtensionError: the op cannot be built.
    """
    global _watchdog
    if LAUNCHED:
        end_with_parent()
    else:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    with _out_of_reach("mlflow"):
        import deepspeed
        from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    meeting = Meeting(accelerator.communication_backend_name()) if int(os.environ["WORLD_SIZE"]) > 1 else None
    if meeting is not None:
        meeting.gather()
    prepare_extensions()
    with meeting.first_exchange() if meeting is not None else contextlib.nullcontext():
        # The watchdog is quicker, and knows when a wait of hours is in order.
        deepspeed.init_distributed(timeout=datetime.timedelta(hours=24), verbose=False)
        _unlink_shared_buffer()
    _watchdog = Watchdog(meeting)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        # Ranks share the cores; a rank that takes them all slows every rank down.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, _watchdog)


# What `join` started, for the one place that sees every error of a rank and has no ranks at hand.
_watchdog = Watchdog(None)


@contextlib.contextmanager
def end_well_or_blame() -> Iterator[None]:
    """Around a rank's whole work: an error ends the ranks of all hosts, with its reason and its exit code.

    Without it a rank that fails leaves the others in a collective, where they wait for it.
    """
    try:
        yield
    except Exception as error:
        if not _watchdog.watches:
            raise
        if not isinstance(error, Refusal):
            traceback.print_exc()
        code = _watchdog.blame(error)
        sys.stdout.flush()
        # Past the interpreter's own end, which waits for (or aborts in) collectives that nobody will answer.
        os._exit(code)
    _watchdog.close()


@contextlib.contextmanager
def _out_of_reach(module: str) -> Iterator[None]:
    """For DeepSpeed's autotuner, which imports MLflow where it can: two seconds of each rank, for nothing."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _unlink_shared_buffer() -> None:
    """Take away the name of this rank's buffer in shared memory, 66 MiB that DeepSpeed's op for CPU never frees.

    What is mapped stays until the last rank that maps it ends, however it ends; the name alone would outlive it.
    """
    dist.barrier()
    rendezvous = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{rendezvous}").unlink(missing_ok=True)


class StopRequest:
    """Set by SIGTERM or SIGINT; ranks agree on it at a step boundary, because signals reach them at different times.

    The death of ``deepspeed`` itself counts too, and on a host that was reached by ssh the end of that connection: both
    leave the node's launcher, the parent of the ranks, behind as an orphan that would train on unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self._asked = False
        # Asked on the host, which runs ahead of a GPU and need not wait for it.
        self._group = dist.new_group(backend="gloo") if device.type != "cpu" else None
        self._launchers = _launchers() if LAUNCHED else []
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop. Every rank must call it at the same step."""
        abandoned = any(_parent(child) != parent for child, parent in self._launchers)
        asked = torch.tensor([float(self._asked or abandoned)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())


def _launchers() -> list[tuple[int, int]]:
    """Pairs of child and parent, from this rank up to what a person or a scheduler started.

    That is ``deepspeed`` where it runs on this host, else the sshd that was told to start the node's launcher. Further
    up, a person may log out.
    """
    node_launcher = os.getppid()
    pairs = [(os.getpid(), node_launcher), (node_launcher, _parent(node_launcher))]
    if not _is_sshd_below(pairs[-1][1]):
        return pairs
    while not _name(pairs[-1][1]).startswith("sshd"):
        pairs.append((pairs[-1][1], _parent(pairs[-1][1])))
    return pairs


def _is_sshd_below(pid: int) -> bool:
    """Whether ``pid`` is no ``deepspeed``, and stands under an sshd with nothing but shells in between."""
    try:
        process = psutil.Process(pid)
        if any(Path(part).name == "deepspeed" for part in process.cmdline()[:3]):
            return False
        return any(_name(p.pid).startswith("sshd") for p in [process, *process.parents()[:2]])
    except psutil.Error:
        return False


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""
