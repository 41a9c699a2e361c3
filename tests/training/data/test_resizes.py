"""Real ranks killed in the middle of an epoch and started again in another number read on exactly where they were.

One sample of their dataset is damaged, so that what stands in for it and the count of losses are put to the test too.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest

from infra.config import load_config
from infra.launcher import free_port, read_marker, session_processes
from tests.support.dataset import REPOSITORY
from tests.support.processes import ended_within
from tests.training.data.conftest import SEED, WINDOW, loader
from training.pretrain import PretrainConfig

CONFIG = REPOSITORY / "configs/training/pretrain_demo.yaml"
STEPS = 24


def launch(out: Path, dataset: Path, ranks: int, workers: int, port: int) -> subprocess.Popen[bytes]:
    settings = ["model.dim=8", "data.patch=32", "data.batch=8", "data.crops_per_sample=2", f"data.window={WINDOW}"]
    settings += [f"seed={SEED}", "data.on_damage=skip"]
    settings += ["tracking.enabled=false", "checkpoint_every=3", f"steps={STEPS}", "schedule.kind=constant"]
    settings += [f"data.dataset={dataset}", f"data.workers={workers}", f"out={out}"]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(port), "--module", "tests.training.data.reading", "--config", str(CONFIG)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, *settings], cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in out.glob("read-*.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_then_one_then_two_read_what_one_run_reads(damaged: tuple[Path, str, str], tmp_path: Path) -> None:
    dataset, lost_key, _ = damaged
    ports, out = [free_port() for _ in range(3)], tmp_path / "run"
    out.mkdir()
    for ranks, workers, until, port in ((2, 1, 7, ports[0]), (1, 2, 15, ports[1])):
        running = launch(out, dataset, ranks, workers, port)
        try:
            deadline = time.monotonic() + 240
            while not any(line["step"] == until and line["ranks"] == ranks for line in lines(out)):
                assert running.poll() is None and time.monotonic() < deadline, out.with_suffix(".log").read_text()
                time.sleep(0.05)
        finally:
            for process in session_processes(running.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            running.wait(60)
    assert ended_within(300, launch(out, dataset, 2, 0, ports[2])) == 0, out.with_suffix(".log").read_text()

    config = load_config(PretrainConfig, CONFIG, [f"data.dataset={dataset}", f"out={out}"])
    assert config.recipe == "dynet_pretrain"  # what ``loader`` degrades by
    seen: dict[int, set[tuple[tuple[str, ...], tuple[str, ...]]]] = defaultdict(set)
    worlds: dict[int, set[int]] = defaultdict(set)
    shares: dict[tuple[int, int], dict[int, dict[str, list[str]]]] = defaultdict(dict)
    for line in lines(out):
        step, ranks = int(str(line["step"])), int(str(line["ranks"]))
        worlds[step].add(ranks)
        shares[step, ranks][int(str(line["rank"]))] = line  # type: ignore[assignment]
    for (step, ranks), parts in shares.items():
        if len(parts) == ranks:
            keys = tuple(key for rank in range(ranks) for key in parts[rank]["keys"])
            patches = tuple(patch for rank in range(ranks) for patch in parts[rank]["patches"])
            seen[step].add((keys, patches))
    # Every step was made whole, those that a kill undid a second time, and always from the same samples.
    assert sorted(seen) == list(range(STEPS)) and all(len(versions) == 1 for versions in seen.values())
    assert worlds[0] == {2} and {1} in worlds.values() and {1, 2} in worlds.values() and worlds[STEPS - 1] == {2}
    lost = 0
    for step, batch in enumerate(loader(dataset, steps=STEPS, on_damage="skip")):
        ((keys, _),) = seen[step]
        assert list(keys) == [meta["key"] for meta in batch["meta"]] and lost_key not in keys
        lost += len(batch["lost"])
    # Neither those that ended nor those that were killed have left shared memory behind.
    assert not [path for port in ports for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")]
    finished = read_marker(out)
    assert lost > 0 and finished is not None and finished["samples_lost"] == lost
