"""CPU, memory, disk, network and GPUs of a host, as metrics of the run that works on it.

Every host has a spool of its own in the run's folder, so that hosts do not write into one file over a network, and a
server that is away costs no sample. A process beside the run takes the samples; training has no part in it.
"""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.tracking.client import TrackingConfig, tracking_uri
from infra.tracking.monitor import start_monitor
from infra.tracking.spool import Sessions, Spool, line_of
from infra.tracking.tracker import start_of

INTERVAL = 10.0  # seconds
_MIB, _GIB = 1024**2, 1024**3


class HostMetrics:
    """Records this host as ``system/HOST/…`` in the run of a folder, until ``stop`` or the end of this process.

    To be made by one process a host (local rank 0), whichever makes the run; the folder has to be shared by all hosts.
    Metrics: cpu_percent, memory_gib, memory_percent, disk_read_mib_s, disk_write_mib_s, network_in_mib_s,
    network_out_mib_s, and of each GPU gpu_N_percent, gpu_N_memory_gib, gpu_N_watts, gpu_N_celsius. Their step is the
    number of the sample, over all restarts.
    """

    def __init__(self, settings: TrackingConfig, folder: Path, *, interval: float = INTERVAL) -> None:
        """Begin; never raises.

        Args:
            settings, folder: those of the run's ``Tracker``.
            interval: seconds between two samples.
        """
        self._spool = Spool(folder, f"system-{host_name()}")
        self._session = ""
        if not settings.enabled:
            return
        session = secrets.token_hex(8)
        with contextlib.suppress(OSError):  # a full disk has been said by the run itself
            self._append("start", start_of(session, "", settings))
            start_monitor(self._spool, tracking_uri(settings), interval)
            self._session = session

    def stop(self) -> None:
        """End the samples; what was taken is still delivered."""
        if self._session:
            with contextlib.suppress(OSError):
                self._append("end", {"session": self._session, "status": "", "exit": ""})
            self._session = ""

    def _append(self, kind: str, body: dict[str, Any]) -> None:
        descriptor = self._spool.open()
        try:
            os.write(descriptor, line_of(time.time_ns() // 1_000_000, kind, body))
        finally:
            os.close(descriptor)


def host_name() -> str:
    """The name of this host, as far as it can be a file name and part of a metric's."""
    return re.sub(r"[^\w-]", "_", os.uname().nodename.partition(".")[0], flags=re.ASCII) or "host"


def sample_host(spool: Spool, interval: float) -> None:
    """Append a sample to the spool every ``interval`` seconds, for ever."""
    step = max(Sessions(spool).last_steps.values(), default=0)
    descriptor = spool.open()
    host = host_name()
    for values in _samples(interval):
        step += 1
        named = {f"system/{host}/{name}": value for name, value in values.items()}
        if not spool.path.exists():
            return
        with contextlib.suppress(OSError):
            os.write(descriptor, line_of(time.time_ns() // 1_000_000, "metrics", named, step))


def _samples(interval: float) -> Iterator[dict[str, float]]:
    gpus = _gpus()
    psutil.cpu_percent()  # the first call only begins the measurement
    before, since = _counters(), time.monotonic()
    while True:
        time.sleep(interval)
        now, counters = time.monotonic(), _counters()
        memory = psutil.virtual_memory()
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_gib": (memory.total - memory.available) / _GIB,
            "memory_percent": memory.percent,
        }
        values |= {name: (counters[name] - before[name]) / _MIB / (now - since) for name in counters if name in before}
        before, since = counters, now
        for number, gpu in enumerate(gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in _of_gpu(gpu).items()}
        yield values


def _counters() -> dict[str, float]:
    """Bytes so far. Containers hide some of them."""
    counts: dict[str, float] = {}
    with contextlib.suppress(OSError, RuntimeError):
        if (disk := psutil.disk_io_counters()) is not None:
            counts |= {"disk_read_mib_s": disk.read_bytes, "disk_write_mib_s": disk.write_bytes}
    with contextlib.suppress(OSError, RuntimeError):
        if (network := psutil.net_io_counters()) is not None:
            counts |= {"network_in_mib_s": network.bytes_recv, "network_out_mib_s": network.bytes_sent}
    return counts


def _gpus() -> list[Any]:
    """NVML's handles of this host's GPUs; none where there is no driver of NVIDIA's."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no library, no driver, no right to use it: NVML has an exception for each
        return []


def _of_gpu(gpu: Any) -> dict[str, float]:
    import pynvml

    values: dict[str, float] = {}
    for name, read in (
        ("percent", lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu),
        ("memory_gib", lambda: pynvml.nvmlDeviceGetMemoryInfo(gpu).used / _GIB),
        ("watts", lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
        ("celsius", lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
    ):
        with contextlib.suppress(pynvml.NVMLError):  # not every device knows everything (MIG)
            values[name] = float(read())
    return values
