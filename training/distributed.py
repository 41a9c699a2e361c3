"""What a rank does before and around training: join the others, and never outlive its launcher."""

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from infra.extensions import prepare_extensions
from infra.launcher import end_with_parent, free_port

PREEMPTED = 75  # exit code of a run that was told to stop and has saved: rerun it (EX_TEMPFAIL)
LAUNCHED = "RANK" in os.environ


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, tracks and writes."""
        return self.rank == 0


def join() -> Ranks:
    """Enter the process group that the ``deepspeed`` launcher describes (a group of one without it).

    On CPU the shared-memory op of DeepSpeed is compiled first, under a lock that a dying process
    cannot leave behind. On Linux the kernel is asked to end this rank when its launcher dies, since
    the launcher does not take its ranks along.
    """
    if LAUNCHED:
        end_with_parent()
    else:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    with _out_of_reach("mlflow"):
        prepare_extensions()

        import deepspeed
        from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(timeout=datetime.timedelta(minutes=10), verbose=False)
    _unlink_shared_buffer()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        # Ranks share the cores; a rank that takes them all slows every rank down.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


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

    The death of ``deepspeed`` itself counts too: it leaves the node's launcher, the parent of the ranks, behind as an
    orphan that would train on unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self._asked = False
        # Asked on the host, which runs ahead of a GPU and need not wait for it.
        self._group = dist.new_group(backend="gloo") if device.type != "cpu" else None
        self._launcher = _grandparent() if LAUNCHED else 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank has been asked to stop. Every rank must call it at the same step."""
        abandoned = LAUNCHED and _grandparent() != self._launcher
        asked = torch.tensor([float(self._asked or abandoned)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())


def _grandparent() -> int:
    try:
        return psutil.Process(os.getppid()).ppid()
    except psutil.Error:
        return 0
