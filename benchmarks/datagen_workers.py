"""Two workers over one, and the fixed cost of a job.

    python benchmarks/datagen_workers.py [FOLDER OF PHOTOGRAPHS] [--count 96]

Wall time of whole builds in processes of their own, one and two workers in turns; a build of a single picture is the
fixed cost (start of Python and Ray, planning, tables), and is also shown taken off.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mosaics import mosaics

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ird-bench-") as name:
        root = Path(name)
        for folder, count in (("many", given.count), ("one", 1)):
            (root / folder).mkdir()
            for index, data in enumerate(mosaics(given.folder, count)):
                (root / folder / f"{index:04d}.jpg").write_bytes(data)
        times: dict[str, list[float]] = {}
        for repeat in range(given.repeats):
            for label, folder, workers in (("fixed", "one", 1), ("one worker", "many", 1), ("two workers", "many", 2)):
                seconds = _build(root / folder, root / f"{label}-{repeat}", workers)
                times.setdefault(label, []).append(seconds)
        for label, seconds in times.items():
            print(f"{label:<12} {statistics.median(seconds):6.1f} s   ({', '.join(f'{s:.1f}' for s in seconds)})")
        fixed, one, two = (statistics.median(seconds) for seconds in times.values())
        print(f"two over one: {one / two:.2f}; without the fixed cost: {(one - fixed) / (two - fixed):.2f}")


def _build(source: Path, out: Path, workers: int) -> float:
    command = [sys.executable, "-m", "datagen", "build", f"source={source}", f"out={out}", f"num_cpus={workers}"]
    command += ["scan.pictures_per_piece=4", "pack.samples_per_shard=64", "select.max_blockiness=100.0"]
    command += ["select.duplicate_radius=0"]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - start


if __name__ == "__main__":
    main()
