"""Pictures that kill, hang or starve the process that measures them; workers and drivers that are killed."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import read_json
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory
from datagen.scan.isolated import IsolatedMeasure
from datagen.scan.row import measure_picture
from datagen.scan.scan import Piece, cut, scan, scan_piece
from datagen.source.listing import list_pictures
from infra.cluster import ClusterError
from infra.storage import open_store
from tests.datagen.conftest import ROOT
from tests.datagen.scan.faulty_scores import BLUE, GREEN, RED

MakeConfig = Callable[..., DatagenConfig]
SCORES = "tests.datagen.scan.faulty_scores"


def png(seed: int, corner: tuple[int, ...] = (9, 9, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    pixels[0, 0] = corner
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def write_pictures(folder: Path, count: int, guilty: Mapping[int, tuple[int, ...]] | None = None) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(png(i, (guilty or {}).get(i, (9, 9, 9))))
    return folder


def settings(source: Path, score: str, pieces: int = 4, *more: str) -> list[str]:
    scan_settings = [f"scan.pictures_per_piece={pieces}", "scan.seconds_per_picture=5.0"]
    return [f"source={source}", "leak_guard=[]", f"scan.scores.it={SCORES}:{score}", *scan_settings, *more]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_inventory(open_store(out), INVENTORY_SCHEMA.names).to_pylist()


def part_bytes(out: Path) -> dict[str, bytes]:
    store = open_store(out)
    return {entry.key: store.read(entry.key) for entry in store.list("curation/inventory/")}


def test_guilty_pictures_are_rows_and_the_others_are_as_ever(
    ray_cluster: None, tmp_path: Path, make_config: MakeConfig
) -> None:
    source = write_pictures(tmp_path / "pictures", 7, {0: RED, 1: GREEN, 3: BLUE})
    facts = scan(config := make_config(tmp_path / "out", settings(source, "die")), open_store(config.out))
    assert (facts["inputs"], facts["work"]["images"]) == (7, 7)
    rows = rows_of(tmp_path / "out")
    guilty = {row["key"]: row["error"].split(",")[0] for row in rows if row["reason"] == "worker_died"}
    assert guilty == {
        "00.png": "its process was ended by SIGKILL (as the kernel does when memory runs out)",
        "01.png": "ended its process with exit code 3",
        "03.png": "its process was ended by SIGSEGV",
    }
    died = [row for row in rows if row["key"] in guilty]
    assert {(row["verdict"], row["stage"], row["sha256"] is None) for row in died} == {("failed", "decode", False)}
    # The same files under a score that harms nobody.
    scan(other := make_config(tmp_path / "other", settings(source, "brightness")), open_store(other.out))
    calm = rows_of(tmp_path / "other")
    assert {row["verdict"] for row in calm} == {"measured"}
    assert [row for row in rows if row not in died] == [row for row in calm if row["key"] not in guilty]
    before = read_json(open_store(config.out), "curation/inventory.json")
    assert "work" not in scan(config, open_store(config.out))
    assert read_json(open_store(config.out), "curation/inventory.json") == before


def test_when_every_picture_dies_none_is_condemned(ray_cluster: None, tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_pictures(tmp_path / "pictures", 2)
    config = make_config(tmp_path / "out", settings(source, "die_all"))
    with pytest.raises(ClusterError, match=r"every picture that was tried .* exit code 1"):
        scan(config, open_store(config.out))
    assert part_bytes(tmp_path / "out") == {}


def test_memory_is_taken_only_up_to_the_limit() -> None:
    limits = ScanConfig(scores={"it": f"{SCORES}:eat_memory"})
    with IsolatedMeasure(limits, 400 * 1024**2) as measure:
        died = measure(png(0, RED), limits)
        assert (died["reason"], died["error"]) == (
            "worker_died",
            "out of memory: took more than 0.4 GB, 2 times out of 2",
        )
        innocent = measure(png(1), limits)
        assert (measure.died, measure.survived) == (1, 1)
    assert innocent["verdict"] == "measured"
    plain = measure_picture(png(1), limits)
    assert innocent["pixel_sha256"] == plain["pixel_sha256"] and innocent["scores"] == plain["scores"]


def test_the_process_goes_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from datagen.config import ScanConfig\n"
        "from datagen.scan.isolated import IsolatedMeasure\n"
        "from tests.datagen.scan.test_faults import png\n"
        "with IsolatedMeasure(ScanConfig(), 10**9) as measure:\n"
        "    measure(png(0), ScanConfig())\n"
        "    print(measure._process.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = int(done.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process outlived its owner"
        time.sleep(0.05)


def test_an_undisturbed_part_and_one_taken_picture_by_picture_have_the_same_bytes(tmp_path: Path) -> None:
    limits = ScanConfig()
    config = DatagenConfig(source=[{"uri": str(write_pictures(tmp_path / "pictures", 3))}], out="x")
    pictures = tuple(list_pictures(config.source)[0])
    parts = []
    for suspected in (False, True):
        store = open_store(tmp_path / str(suspected))
        done = scan_piece(Piece(pictures, 0, limits, store, suspected=suspected))
        parts.append((done.key, store.read(done.key)))
    assert parts[0] == parts[1]


def workers() -> list[psutil.Process]:
    """Ray workers at a scan task, of this test's own cluster: descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::scan_piece" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_workers_killed_from_outside_change_nothing(ray_cluster: None, tmp_path: Path, make_config: MakeConfig) -> None:
    source = write_pictures(tmp_path / "pictures", 12)
    calm = make_config(tmp_path / "calm", settings(source, "slowly"))
    scan(calm, open_store(calm.out))
    killed, over, chance = [], threading.Event(), random.Random(5)

    def kill_now_and_then() -> None:
        while not over.wait(chance.uniform(0.2, 0.9)) and len(killed) < 3:
            for process in chance.sample(found := workers(), min(1, len(found))):
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill_now_and_then, daemon=True)
    killer.start()
    try:
        hunted = make_config(tmp_path / "hunted", settings(source, "slowly"))
        scan(hunted, open_store(hunted.out))
    finally:
        over.set()
        killer.join(60)
    assert killed
    assert part_bytes(tmp_path / "hunted") == part_bytes(tmp_path / "calm")
    assert all(row["verdict"] == "measured" for row in rows_of(tmp_path / "hunted"))


DRIVER = """
import sys
from datagen.scan.scan import scan
from infra.cluster import connect
from infra.config import load_config
from infra.storage import open_store
from datagen.config import DatagenConfig
config = load_config(DatagenConfig, None, sys.argv[1:])
with connect(2):
    print("connected", flush=True)
    scan(config, open_store(config.out))
"""


def test_a_driver_killed_while_pictures_are_taken_one_by_one(
    ray_cluster: None, tmp_path: Path, make_config: MakeConfig
) -> None:
    source = write_pictures(tmp_path / "pictures", 8, {2: RED})
    overrides = settings(source, "hang_with_the_lock", 4, "scan.seconds_per_picture=1.0")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *overrides, f"out={tmp_path / 'out'}"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not any("datagen.scan.isolated" in p for p in commands_below(driver.pid)):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait(60)
        for process in started:  # Its private cluster, which may outlive it for a while.
            if process.is_running():
                process.kill()
    scan(config := make_config(tmp_path / "out", overrides), open_store(config.out))
    calm = open_store(tmp_path / "calm")
    for piece in cut(list_pictures(config.source)[0], 0, config.scan, calm, frozenset()):
        scan_piece(dataclasses.replace(piece, suspected=True))
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "calm")
    failed = {row["key"]: row["error"] for row in rows_of(tmp_path / "out") if row["verdict"] == "failed"}
    assert failed == {"02.png": "hung: no result within 1 s, 2 times out of 2"}


def commands_below(pid: int) -> list[str]:
    commands = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            commands.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return commands
