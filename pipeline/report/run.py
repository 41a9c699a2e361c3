"""Facts about a run as a whole: its stages, what they cost, the machine, the registered model."""

import json
import os
import platform
import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from infra.errors import without_password
from infra.launcher import read_marker
from infra.tracking import TrackingConfig, tracking_uri
from pipeline.stages import RECORD, read_record

GIB = 2**30

# The stages of ``pipeline.demo`` that do work, in their order. The report itself is not among them: it is not over.
STAGES = {
    "corpus": "Corpus",
    "dataset": "Curation and sharding",
    "pretrain": "DyNet co-pretraining",
    "finetune": "DyNet fine-tuning",
    "edsr": "EDSR",
    "mzsr_large_scale": "MZSR large-scale",
    "mzsr_meta": "MZSR meta-transfer",
    "evaluate": "Evaluation",
    "register": "Registration",
    "restore": "Pull and restore",
}
TRAININGS = ("pretrain", "finetune", "edsr", "mzsr_large_scale", "mzsr_meta")


@dataclass(frozen=True)
class StageFacts:
    """What one stage cost. ``state``: done, unfinished or not run yet; ``memory`` in bytes, 0 when not measured."""

    name: str
    label: str
    title: str
    state: str
    seconds: float
    memory: int
    seconds_share: float  # of the longest stage
    memory_share: float  # of the largest stage


@dataclass(frozen=True)
class RunFacts:
    """What the head of the page says."""

    name: str
    folder: str
    stages: list[StageFacts]
    done: int
    seconds: float
    memory: int
    finished: datetime | None
    code: str
    machine: list[tuple[str, str]]


@dataclass(frozen=True)
class RegistryFacts:
    """The registered model and the commands that use it, ready for a shell."""

    model: str
    version: str
    commands: list[tuple[str, str]]


def run_facts(root: Path) -> RunFacts:
    """Facts from the stage records below ``root``; a stage without a record has not run."""
    records = {name: read_record(root / name) for name in STAGES}
    longest = max((float(r.get("seconds") or 0) for r in records.values()), default=0.0) or 1.0
    largest = max((int(r.get("peak_memory") or 0) for r in records.values()), default=0) or 1
    stages = []
    for name, label in STAGES.items():
        record = records[name]
        seconds, memory = float(record.get("seconds") or 0), int(record.get("peak_memory") or 0)
        state = "done" if record.get("done") else "unfinished" if record else "not run yet"
        title = str(record.get("title", label))
        stages.append(StageFacts(name, label, title, state, seconds, memory, seconds / longest, memory / largest))
    done = [stage for stage in stages if stage.state == "done"]
    finished = max(((root / stage.name / RECORD).stat().st_mtime for stage in done), default=None)
    return RunFacts(
        name=root.name,
        folder=str(root),
        stages=stages,
        done=len(done),
        seconds=sum(stage.seconds for stage in stages),
        memory=max((stage.memory for stage in stages), default=0),
        finished=datetime.fromtimestamp(finished).astimezone() if finished else None,
        code=_code_of(root),
        machine=machine_facts(),
    )


def machine_facts() -> list[tuple[str, str]]:
    """(what, value) of the machine this process runs on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    system = f"{platform.system()} {platform.machine()}"
    return [
        ("Processor", f"{_processor()}, {cores} core{'' if cores == 1 else 's'} usable"),
        ("Memory", f"{psutil.virtual_memory().total / GIB:.1f} GiB"),
        ("GPU", ", ".join(gpus) or "none"),
        ("System", f"{system}, Python {platform.python_version()}, PyTorch {torch.__version__}"),
    ]


def registry_facts(root: Path) -> RegistryFacts | None:
    """The model that stage ``register`` made; None when it has not run."""
    record = read_record(root / "register")
    if not record.get("done"):
        return None
    model, version = str(record["model"]), str(record["version"])
    uri = without_password(str(record.get("uri") or tracking_uri(TrackingConfig())))
    quoted = shlex.quote(model)
    code = (
        "import mlflow\n"
        f"model = mlflow.pyfunc.load_model({model!r})\n"
        'restored = model.predict(images, params={"variant": "small"})  # images: uint8 [N, H, W, 3]'
    )
    commands = [
        ("Tell the commands below where the registry is", f"export MLFLOW_TRACKING_URI={shlex.quote(uri)}"),
        ("Restore a picture, or all pictures of a folder", f"ird restore --model {quoted} --variant small IN OUT"),
        ("Keep a copy that needs no server", f"ird registry pull {quoted} --out models/"),
        ("From Python", code),
        ("Look at runs, curves and versions in a browser", _ui_command(uri)),
    ]
    return RegistryFacts(model, version, commands)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty when the file is not there."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found


def _ui_command(uri: str) -> str:
    # A server has its own page; only a database needs one started.
    return f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def _code_of(root: Path) -> str:
    """Code versions that the finished trainings recorded; more than one when a run was resumed with other code."""
    found = [str((read_marker(root / name / "out") or {}).get("code", "")) for name in TRAININGS]
    return ", ".join(dict.fromkeys(code for code in found if code))


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
