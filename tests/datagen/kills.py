"""Soak: builds whose workers, driver or whole cluster are killed at random moments, until the bytes are compared.

    python -m tests.datagen.kills --kills 200 --seed 1

Every build goes on in the same folder until it ends by itself; then shards, tables and id must be those of a build
that nobody disturbed, and ``verify`` must find nothing.
"""

import argparse
import collections
import contextlib
import io
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

from datagen.dataset import SAMPLES, read_dataset_json
from datagen.source.embedded import corpus_files
from datagen.verify import verify
from infra.storage import open_store

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "datagen" / "demo.yaml"
# Mean seconds between a sight of work and the next kill.
PAUSE = 0.6
# Seconds that one build may take.
LIMIT = 400.0
# In turn, so that a short soak has all of them; each but a worker costs a start of Ray.
VICTIMS = ("worker",) * 4 + ("driver",) + ("worker",) * 4 + ("cluster",)


def make_crowd(folder: Path, count: int = 60) -> Path:
    """Photographs enough for a kill to land in the middle of something."""
    originals = [Image.open(io.BytesIO(corpus_files("pictures")[name])) for name in ("astronaut.png", "grass.png")]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = originals[index % 2].convert("RGB")
        left, top = 6 * (index // 2), 5 * (index // 2)
        image.crop((left, top, left + 300, top + 280)).resize((900, 840)).save(folder / f"{index:02d}.jpg", quality=95)
    return folder


def settings(crowd: Path, out: Path) -> list[str]:
    """Of a build of the crowd in many small tasks."""
    many = [f"source={crowd}", f"out={out}", "leak_guard=[]", "num_cpus=2", "scan.pictures_per_piece=2"]
    # Enlarged photographs are smooth; what is kept matters less here than that it is the same.
    return [*many, "select.min_laplacian_variance=1.0", "tiles.min_laplacian_variance=1.0", "pack.samples_per_shard=6"]


def command(crowd: Path, out: Path) -> list[str]:
    """The build, as one types it."""
    return [sys.executable, "-m", "datagen", "build", "--config", str(DEMO), *settings(crowd, out)]


def contents(out: Path) -> dict[str, bytes | str]:
    """What must be the same whatever happened: shards, samples table, dataset id."""
    store = open_store(out)
    files: dict[str, bytes | str] = {entry.key: store.read(entry.key) for entry in store.list("shards/")}
    return {**files, SAMPLES: store.read(SAMPLES), "id": read_dataset_json(store)["id"]}


def soak(
    kills: int, seed: int, folder: Path, crowd: Path, expected: dict[str, bytes | str]
) -> collections.Counter[str]:
    """Kill ``kills`` times over as many builds as that takes; returns how often each victim fell, by phase.

    Raises:
        AssertionError: a build failed, or ended with other bytes.
    """
    rng = random.Random(seed)
    done: collections.Counter[str] = collections.Counter()
    number = 0
    while done.total() < kills:
        out = folder / f"out-{number:03d}"
        number += 1
        while not _run(command(crowd, out), out, rng, done, kills):
            pass
        assert contents(out) == expected, f"seed {seed}, {out}: other bytes after {dict(done)}"
        faults = [fault for check in verify(open_store(out)) for fault in check.faults]
        assert not faults, f"seed {seed}, {out}: {faults}"
    return done


def _run(arguments: list[str], out: Path, rng: random.Random, done: collections.Counter[str], kills: int) -> bool:
    """Run a build and kill at it; true when it ended well by itself."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log)
        try:
            ended = _strike(process, rng, done, kills)
        except BaseException:
            with contextlib.suppress(psutil.NoSuchProcess):
                _kill("cluster", process, "", rng)
            log.seek(0)
            print(log.read().decode()[-4000:])
            raise
        log.seek(0)
        assert not ended or process.returncode == 0, f"a build failed by itself:\n{log.read().decode()[-4000:]}"
        return ended


def _strike(process: subprocess.Popen[bytes], rng: random.Random, done: collections.Counter[str], kills: int) -> bool:
    """Kill at a build until that ends it, or it ends by itself: true."""
    ends = time.monotonic() + LIMIT
    while process.poll() is None:
        assert time.monotonic() < ends, f"a build did not end within {LIMIT:.0f} s"
        # Only tasks at work are worth a kill: the start of Ray is most of a short build. Half fall in each step.
        task = "scan_piece" if done.total() < kills / 2 else "pack_shard"
        if done.total() >= kills or not _workers(process, task):
            time.sleep(0.1)
            continue
        time.sleep(rng.expovariate(1 / PAUSE))
        victim = VICTIMS[done.total() % len(VICTIMS)]
        if process.poll() is None and _kill(victim, process, task, rng):
            done[f"{victim} in {task}"] += 1
            if victim != "worker":
                process.wait(60)
                return False
    return True


def _kill(victim: str, process: subprocess.Popen[bytes], task: str, rng: random.Random) -> bool:
    """Kill a victim of that kind; false when there was none any more."""
    driver = psutil.Process(process.pid)
    if victim == "worker":
        busy = _workers(process, task)
        targets = rng.sample(busy, min(1, len(busy)))
    else:
        targets = [driver, *(driver.children(recursive=True) if victim == "cluster" else [])]
    for target in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            target.send_signal(signal.SIGKILL)
    return bool(targets)


def _workers(process: subprocess.Popen[bytes], task: str) -> list[psutil.Process]:
    """Those at work on a task of that name."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in family if f"ray::{task}" in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> None:
    """Soak by hand; prints what was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ird-kills-") as name:
        folder = Path(name)
        crowd = make_crowd(folder / "crowd")
        subprocess.run(command(crowd, folder / "undisturbed"), cwd=ROOT, check=True, capture_output=True, timeout=LIMIT)
        done = soak(given.kills, given.seed, folder, crowd, contents(folder / "undisturbed"))
    print(f"{done.total()} kills in {time.monotonic() - start:.0f} s, every build ended with the same bytes")
    for what, count in sorted(done.items()):
        print(f"{count:>6}  {what}")


if __name__ == "__main__":
    main()
