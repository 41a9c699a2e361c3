"""What a stage says of itself: losses, rates, where the time of a step goes, memory, device hours, energy.

On a GPU the parts of a step are timed by events on its stream, which nobody waits for until a line is logged.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

PARTS = ("data_wait", "forward", "backward", "optimizer", "tracking")


@dataclass
class Spent:
    """Over all ranks and restarts. On a GPU an hour is one of its clock, on a CPU one of its cores at work."""

    device_hours: float = 0.0
    joules: float = 0.0  # as far as the devices tell


class Meter:
    """Gathers between two log lines. Every rank has one and reads it at the same steps."""

    def __init__(self, device: torch.device, spent: Spent) -> None:
        self._device, self._spent = device, spent
        self._cuda = device.type == "cuda"
        self._energy = _energy_counter(device)
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._patches = self._steps = 0
        self._marks = self._now()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times one of ``PARTS``: on the device what it computes, on the host what it waits for."""
        if self._cuda and name in ("forward", "backward", "optimizer"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is not training, such as a validation, counts in no rate and no hour."""
        began = self._now()
        yield
        self._marks = tuple(mark + now - then for mark, now, then in zip(self._marks, self._now(), began))  # type: ignore[assignment]

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Take in one part's metrics: detached scalars, with the same names on every rank."""
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value)

    def stepped(self, patches: int) -> None:
        """One optimizer step was done, on ``patches`` patches over all ranks."""
        self._steps += 1
        self._patches += patches

    def read(self) -> dict[str, float]:
        """Means since the last reading over steps and ranks, rates, and sums so far. A collective."""
        names = sorted(self._sums)
        own = [torch.stack(self._sums[name]).float().mean() for name in names]
        means = torch.stack(own) if own else torch.zeros(0, device=self._device)
        dist.all_reduce(means)
        for name, begin, end in self._events:  # the reduction above has been waited for by whoever reads it
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
        before, self._marks = self._marks, self._now()
        wall, device, joules = (now - then for now, then in zip(self._marks, before))
        sums = torch.tensor([device, joules], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        self._spent.device_hours += sums[0].item() / 3600
        self._spent.joules += sums[1].item()
        logged = dict(zip(names, (means / dist.get_world_size()).tolist()))
        logged["images_per_second"] = self._patches / wall
        logged["step_ms"] = 1000 * wall / max(self._steps, 1)
        logged |= {f"{name}_ms": 1000 * seconds / max(self._steps, 1) for name, seconds in self._seconds.items()}
        logged["data_wait_share"] = self._seconds["data_wait"] / wall
        logged["peak_memory_mib"] = _peak_memory(self._device) / 2**20
        logged["device_hours"] = self._spent.device_hours
        if self._spent.joules:
            logged["energy_kwh"] = self._spent.joules / 3.6e6
        self._sums, self._events, self._patches, self._steps = {}, [], 0, 0
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return logged

    def _now(self) -> tuple[float, float, float]:
        wall = time.perf_counter()
        return wall, wall if self._cuda else time.process_time(), self._energy()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def _energy_counter(device: torch.device) -> Any:
    """A function that gives the joules a GPU has used since its driver was loaded; always 0 where nobody tells."""
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # no NVML, no permission, or a device that does not count
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    return lambda: 0.0


def progress_line(stage: str, done: int, steps: int, seconds_a_step: float, logged: Mapping[str, float]) -> str:
    """One line for people, with the time that is left."""
    left = int(seconds_a_step * (steps - done))
    losses = "  ".join(f"{name} {value:.4f}" for name, value in logged.items() if name.startswith("loss"))
    rates = f"{logged['images_per_second']:.1f} patches/s  data wait {logged['data_wait_share']:.0%}"
    for name, words in (("samples_lost", "samples lost"), ("steps_skipped", "steps skipped")):
        rates += f"  {logged[name]:.0f} {words}" if logged.get(name) else ""
    return f"{stage} {done}/{steps}  {losses}  {rates}  {left // 60}m{left % 60:02d}s left"
