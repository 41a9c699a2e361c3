"""The promises of the whole: same bytes on any number of workers, wherever the pictures lie, whatever was killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from datagen.build import build
from datagen.config import DatagenConfig
from datagen.dataset import SELECTION, read_dataset_json, read_table
from datagen.source.embedded import corpus_files, materialise
from datagen.verify import verify
from infra.storage import open_store
from tests.datagen.conftest import DEMO, ROOT, run_datagen, shard_bytes
from tests.support.s3 import S3Server


def test_one_worker_and_another_folder_give_the_same_bytes_and_id(built: Path, tmp_path: Path) -> None:
    pictures = materialise(tmp_path / "elsewhere")
    out = tmp_path / "out"
    done = run_datagen(
        *("build", "--config", str(DEMO), f"source={pictures / 'pictures'}", f"out={out}"),
        *(f"leak_guard=[{pictures / 'held_out'}]", "num_cpus=1", "scan.pictures_per_piece=5"),
    )
    assert done.returncode == 0, done.stderr
    assert shard_bytes(out) == shard_bytes(built)
    assert read_dataset_json(open_store(out))["id"] == read_dataset_json(open_store(built))["id"]
    assert str(out) in done.stdout and "inputs = " in done.stdout


def test_pictures_and_dataset_in_a_bucket_give_the_same_bytes(
    built: Path, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.take_over(monkeypatch)
    bucket = s3_server.bucket_from(materialise(tmp_path / "corpus"))
    out = f"s3://{s3_server.new_bucket()}/set"
    settings = [f"source=s3://{bucket}/pictures", f"leak_guard=s3://{bucket}/held_out", f"out={out}", "num_cpus=2"]
    done = run_datagen("build", "--config", str(DEMO), *settings, environment=s3_server.environment)
    assert done.returncode == 0, done.stderr
    store = open_store(out)
    assert {entry.key: store.read(entry.key) for entry in store.list("shards/")} == shard_bytes(built)
    assert read_dataset_json(store)["id"] == read_dataset_json(open_store(built))["id"]


def test_the_summary_tells_what_the_report_needs(built: Path) -> None:
    summary = json.loads((built / "curation" / "summary.json").read_text())
    assert set(summary) == {"scan", "select", "pack", "verify"}
    assert all(summary[step]["seconds"] > 0 for step in summary)
    assert summary["scan"]["work"]["images_per_second"] > 0
    assert summary["scan"]["cluster"]["CPU"] == 2.0
    counts = summary["select"]
    assert counts["inputs"] == counts["kept"] + sum(counts["rejected"].values()) + sum(counts["failed"].values())


@pytest.mark.slow
def test_the_leak_between_set5_and_bsd400_is_found(
    ray_cluster: None, real_data: Path, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    guards = [real_data / "benchmarks" / name for name in ("set5", "cbsd68")]
    config = make_config(
        tmp_path,
        [f"source={real_data / 'bsd400'}", f"leak_guard=[{guards[0]}, {guards[1]}]", "scan.pictures_per_piece=32"],
    )
    store = build(config)
    rows = read_table(store, SELECTION).to_pylist()
    leaks = {row["source"]: row["partner"] for row in rows if row["reason"] == "leak"}
    assert leaks == {"source-0/302003.jpg": "guard-0/img_005.png"}
    assert sum(row["verdict"] == "kept" for row in rows) > 390


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty photographs, enough for a kill to land in the middle."""
    folder = tmp_path_factory.mktemp("crowd")
    originals = [
        name for name in sorted(corpus_files("pictures")) if name in ("astronaut.png", "grass.png", "china.jpg")
    ]
    for index in range(40):
        image = Image.open(io.BytesIO(corpus_files("pictures")[originals[index % 3]])).convert("RGB")
        left, top = 11 * (index // 3), 7 * (index // 3)
        image.crop((left, top, left + 300, top + 280)).resize((900, 840)).save(folder / f"{index:02d}.jpg", quality=95)
    return folder


def crowd_command(crowd: Path, out: Path) -> list[str]:
    settings = [f"source={crowd}", f"out={out}", "leak_guard=[]", "num_cpus=2", "scan.pictures_per_piece=2"]
    # Enlarged photographs are smooth; what is kept matters less here than that it is the same.
    settings += ["select.min_laplacian_variance=1.0", "tiles.min_laplacian_variance=1.0", "pack.samples_per_shard=6"]
    return [sys.executable, "-m", "datagen", "build", "--config", str(DEMO), *settings]


def wait_for(folder: Path, process: subprocess.Popen[bytes], count: int = 2) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if folder.is_dir() and sum(not path.name.startswith(".tmp-") for path in folder.iterdir()) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"no file appeared in {folder} while the build ran (exit code {process.poll()})")


@pytest.fixture(scope="module")
def undisturbed(crowd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(crowd_command(crowd, out), cwd=ROOT, check=True, timeout=300, capture_output=True)
    return out


@pytest.mark.slow
def test_a_driver_killed_in_scan_and_in_pack_goes_on_to_the_same_bytes(
    crowd: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for folder in ("curation/inventory", "shards"):
        process = subprocess.Popen(crowd_command(crowd, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            wait_for(out / folder, process)
        finally:
            process.kill()
            process.wait()
        assert not (out / "dataset.json").exists()
    done = subprocess.run(crowd_command(crowd, out), cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "curation" / "summary.json").read_text())
    assert summary["pack"]["work"]["shards_found_packed"] >= 1
    assert shard_bytes(out) == shard_bytes(undisturbed)
    assert (out / "samples.parquet").read_bytes() == (undisturbed / "samples.parquet").read_bytes()


@pytest.mark.slow
def test_killed_workers_cost_nothing_but_time(crowd: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(crowd_command(crowd, out), cwd=ROOT, stderr=subprocess.DEVNULL)
    killed = []
    for task, folder in (("scan_piece", "curation/inventory"), ("pack_shard", "shards")):
        wait_for(out / folder, process, count=1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and not any(t == task for t, _ in killed):
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    title = " ".join(child.cmdline())
                except psutil.Error:
                    continue
                if title.startswith(f"ray::{task}"):
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append((task, child.pid))
                    break
    assert process.wait(timeout=300) == 0
    assert [task for task, _ in killed] == ["scan_piece", "pack_shard"]
    assert shard_bytes(out) == shard_bytes(undisturbed)
    assert not any(check.faults for check in verify(open_store(out)))
