"""Which variant to take when somebody says how long a picture may last: the deepest that fits, by measurement."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.config import ConfigError
from infra.files import write_atomically
from pipeline.inference import LoadedModel
from training.models import DyNetConfig, variants_of
from training.models.cost import measure_latency

AUTO = "auto"
_SIDE = 256  # of the picture that is measured, pixels
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True)
class Choice:
    """A variant, and why it was taken."""

    variant: str
    why: str


class BudgetError(ConfigError):
    """No variant fits. The message says what the smallest needs."""


def parse_bytes(text: str) -> int:
    """``2G``, ``512M``, ``1.5GiB`` or a number of bytes.

    Raises:
        ConfigError: the text is no such thing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"--budget-mem {text!r}: expected a size such as 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2]])


def measured_table(model: LoadedModel, cache: Path, notify: Callable[[str], None]) -> dict[str, float]:
    """Seconds that each variant takes for a picture of ``_SIDE`` x ``_SIDE`` on this machine, smallest first.

    Measured once, which takes seconds a variant, and kept in ``cache`` by machine and model.
    """
    machine = _machine(model)
    identity = json.dumps([machine, model.config.model_dump(mode="json")], sort_keys=True)
    file = cache / f"{model.config.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        return dict(json.loads(file.read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        pass
    names = variants_of(model.config)
    notify(f"measuring {', '.join(names)} on this machine, once: {machine}")
    seconds = {name: measure_latency(model.config, name, _SIDE, _SIDE, runs=3, budget=6.0) for name in names}
    table = dict(sorted(seconds.items(), key=lambda row: row[1]))
    write_atomically(file, json.dumps({"machine": machine, "side": _SIDE, "seconds": table}, indent=2).encode())
    return table


def choose_variant(
    model: LoadedModel, table: Mapping[str, float], height: int, width: int, budget_ms: float | None
) -> Choice:
    """The deepest variant whose time for a picture of this size, in proportion to its pixels, is within the budget.

    Raises:
        BudgetError: even the smallest takes longer.
    """
    expected = {name: 1000 * seconds * height * width / _SIDE**2 for name, seconds in table.items()}
    names = [name for name in _by_depth(model) if budget_ms is None or expected[name] <= budget_ms]
    if not names:
        name, milliseconds = min(expected.items(), key=lambda row: row[1])
        raise BudgetError(
            f"{width}x{height}: {name}, the fastest variant, takes about {milliseconds:.0f} ms, the budget is "
            f"{budget_ms:g} ms"
        )
    rows = ", ".join(f"{name} {milliseconds:.0f} ms" for name, milliseconds in expected.items())
    limit = "no budget" if budget_ms is None else f"budget {budget_ms:g} ms"
    return Choice(names[-1], f"{names[-1]} ({rows} expected for {width}x{height}; {limit})")


def check_choice(model: LoadedModel) -> None:
    """Refuse a budget for a model that has nothing to choose from.

    Raises:
        ConfigError: its variants are no depths.
    """
    if not isinstance(model.config, DyNetConfig):
        raise ConfigError(
            f"variant auto and --budget-ms choose among depths, which {model.config.name} has not; "
            f"its variants: {', '.join(variants_of(model.config))}"
        )


def _by_depth(model: LoadedModel) -> list[str]:
    config = model.config
    assert isinstance(config, DyNetConfig)
    return sorted(config.variants, key=lambda name: sum(config.variants[name]))


def _machine(model: LoadedModel) -> str:
    device = next(model.network.parameters()).device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
