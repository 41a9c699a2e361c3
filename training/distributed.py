"""What a rank does before and around training: join the others, and never outlive its launcher."""

import ctypes
import datetime
import os
import signal
import sys
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist

PREEMPTED = 75  # exit code of a run that was told to stop and has saved: rerun it (EX_TEMPFAIL)
_PR_SET_PDEATHSIG = 1


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
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    from infra.extensions import prepare_extensions

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        from infra.launcher import free_port

        os.environ["MASTER_PORT"] = str(free_port())
    prepare_extensions()

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(timeout=datetime.timedelta(minutes=10), verbose=False)
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


class StopRequest:
    """Set by SIGTERM or SIGINT; ranks agree on it at a step boundary, because signals reach them at different times."""

    def __init__(self) -> None:
        self._asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank has been asked to stop. Every rank must call it at the same step."""
        asked = torch.tensor([float(self._asked)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over all ranks. Every rank must call it at the same step."""
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
