"""What packing costs, as ratios to copying bytes and to packing PNG tiles, in one run on one core.

    python benchmarks/datagen_pack.py [FOLDER OF PHOTOGRAPHS] [--count 24]

CPU time of the process; repeats interleaved, medians.
"""

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import cv2
from mosaics import mosaics

from datagen.build import run_steps
from datagen.config import DatagenConfig
from datagen.pack.plan import plan_shards
from datagen.pack.shard import pack_shard
from infra.config import load_config
from infra.storage import open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="ird-bench-") as name:
        root = Path(name)
        (root / "in").mkdir()
        for index, data in enumerate(mosaics(given.folder, given.count)):
            (root / "in" / f"{index:04d}.jpg").write_bytes(data)
        configs = {crop: _scanned(root, crop) for crop in ("lossless_jpeg", "png")}
        seconds: dict[str, list[float]] = {}
        sizes: dict[str, int] = {}
        for _ in range(given.repeats):
            for crop, config in configs.items():
                used, size = _pack(config)
                seconds.setdefault(f"pack {crop}", []).append(used)
                sizes[f"pack {crop}"] = size
            for what, task in (("copy", _copy), ("copy and sha256", _copy_and_hash)):
                used, size = task(root / "in", root / "copies")
                seconds.setdefault(what, []).append(used)
                sizes[what] = size
        source = sizes["copy"]
        print(f"{given.count} JPEGs of 3 MP, {source / 1e6:.1f} MB; medians of {given.repeats} (spread)")
        print(f"{'':<20}{'MB out':>8}{'CPU s':>8}{'MB in/s':>9}{'spread':>8}  ratio to copy")
        base = statistics.median(seconds["copy"])
        for what, times in seconds.items():
            middle = statistics.median(times)
            spread = (max(times) - min(times)) / middle
            speed = source / 1e6 / middle
            print(f"{what:<20}{sizes[what] / 1e6:>8.1f}{middle:>8.2f}{speed:>9.1f}{spread:>8.0%}  {middle / base:.1f}")
        ratio = statistics.median(seconds["pack png"]) / statistics.median(seconds["pack lossless_jpeg"])
        print(f"packing PNG tiles takes {ratio:.2f}x the CPU time of lossless JPEG tiles, ", end="")
        print(f"{sizes['pack png'] / sizes['pack lossless_jpeg']:.2f}x the bytes")


def _scanned(root: Path, crop: str) -> DatagenConfig:
    settings = [f"source={root / 'in'}", f"out={root / crop}", "num_cpus=2", f"pack.crop={crop}"]
    config = load_config(DatagenConfig, None, [*settings, "select.max_blockiness=100.0", "select.duplicate_radius=0"])
    run_steps(config, ["scan", "select"])
    return config


def _pack(config: DatagenConfig) -> tuple[float, int]:
    store = open_store(config.out)
    for entry in list(store.list("curation/pack/")):
        store.delete(entry.key)
    start = time.process_time()
    done = [pack_shard(plan) for plan in plan_shards(config, store).shards()]
    return time.process_time() - start, sum(shard.bytes for shard in done)


def _copy(source: Path, target: Path) -> tuple[float, int]:
    shutil.rmtree(target, ignore_errors=True)
    start = time.process_time()
    shutil.copytree(source, target)
    return time.process_time() - start, sum(path.stat().st_size for path in target.iterdir())


def _copy_and_hash(source: Path, target: Path) -> tuple[float, int]:
    start = time.process_time()
    _, size = _copy(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
    return time.process_time() - start, size


if __name__ == "__main__":
    main()
