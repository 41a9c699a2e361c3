"""What an index of N samples costs: building it once a machine, opening it again, and memory by process.

    python benchmarks/index_scale.py                              (8 million rows)
    python benchmarks/index_scale.py --rows 1000000 8000000       (and how the cost grows)

The tables are simulated (keys, places and hashes of the right kind, 1,000 samples a shard), what reads them is real.
Each figure is of a process of its own. Private memory is what the process alone holds (USS); the pages of the index
are the kernel's, shared by all processes that map it. Wall time says little on a busy machine; CPU time holds.
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.dataset import DATASET, SAMPLES, SAMPLES_SCHEMA, SHARDS, SHARDS_SCHEMA
from infra.storage import open_store
from training.data.index import Index, open_index
from training.data.plan import SampleOrder

SAMPLES_PER_SHARD = 1000
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8_000_000])
    parser.add_argument("--folder", type=Path, help="where to keep tables and index; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for rows in options.rows:
            measure_index(Path(folder, str(rows)), rows)


def measure_index(folder: Path, rows: int) -> None:
    """Print what building, opening and using an index of ``rows`` samples costs."""
    write_tables(folder / "dataset", rows)
    tables = (folder / "dataset" / SAMPLES).stat().st_size
    built = in_a_process(build, folder)
    opened = in_a_process(open_again, folder)
    read = in_a_process(read_parquet, folder)
    size = sum(path.stat().st_size for path in (folder / "cache").glob("*/*.arrow"))
    print(f"{rows:,} samples: samples.parquet {tables / _MIB:,.0f} MiB, index {size / _MIB:,.0f} MiB")
    print(f"  build once    {built['cpu']:8.2f} s CPU, peak memory {built['peak']:6.0f} MiB above the start")
    print(f"  open again    {opened['cpu'] * 1000:8.2f} ms CPU, private memory {opened['private']:+.1f} MiB")
    print(f"  resume        {opened['resume'] * 1000:8.2f} ms CPU more, to the sample at a position mid-epoch")
    print(f"  all columns   {opened['touched']:+8.1f} MiB private, {opened['dirty']:+.1f} MiB of it written to")
    print("                while another process has them in use too")
    print(f"  the same columns read from samples.parquet: {read['cpu']:.2f} s CPU, {read['private']:+,.0f} MiB private")
    print(f"  opening is {read['cpu'] / opened['cpu']:,.0f} times faster than reading the table")


def in_a_process(work: Callable[[Path], dict[str, float]], folder: Path) -> dict[str, float]:
    """Run ``work(folder)`` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(there, work, folder))
    process.start()
    there.close()
    answer: dict[str, float] = here.recv()
    process.join()
    return answer


def _send(pipe: Connection, work: Callable[[Path], dict[str, float]], folder: Path) -> None:
    pipe.send(work(folder))


def build(folder: Path) -> dict[str, float]:
    before, start = peak_mib(), time.process_time()
    open_index(open_store(folder / "dataset"), folder / "cache")
    return {"cpu": time.process_time() - start, "peak": peak_mib() - before}


def open_again(folder: Path) -> dict[str, float]:
    private, dirty, start = private_mib(), dirty_mib(), time.process_time()
    index = open_index(open_store(folder / "dataset"), folder / "cache")
    opened = time.process_time() - start
    after = private_mib()
    start = time.process_time()
    position = len(index) + len(index) // 2
    index.key(SampleOrder(index.first, 0, 16).at(position)[1])
    resume = time.process_time() - start
    # Pages that one process alone has mapped count as its own, so another has them in use at the same time.
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    neighbour = context.Process(target=_hold, args=(index, ready, done))
    neighbour.start()
    ready.wait()
    touch(index)
    figures = {"touched": private_mib() - private, "dirty": dirty_mib() - dirty}
    done.set()
    neighbour.join()
    return {"cpu": opened, "private": after - private, "resume": resume, **figures}


def _hold(index: Index, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    touch(index)
    ready.set()
    done.wait()


def touch(index: Index) -> None:
    """Read every page of the index."""
    for values in (index.offset, index.size, index.json_offset, index.json_size):
        values.sum()
    assert index.sha256 is not None
    int(index.sha256[:, 0].max())
    for sample in range(0, len(index), 64):  # A page holds some hundred keys.
        index.key(sample)


def read_parquet(folder: Path) -> dict[str, float]:
    private, start = private_mib(), time.process_time()
    columns = ["key", "shard", "offset", "size", "json_offset", "json_size", "sha256"]
    table = pq.read_table(folder / "dataset" / SAMPLES, columns=columns)
    figures = {"cpu": time.process_time() - start, "private": private_mib() - private}
    assert table.num_rows
    return figures


def write_tables(folder: Path, rows: int) -> None:
    """A dataset of ``rows`` samples without its shards."""
    folder.mkdir(parents=True)
    shards = -(-rows // SAMPLES_PER_SHARD)
    names = [f"ird-{shard:06d}.tar" for shard in range(shards)]
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(folder / SAMPLES, SAMPLES_SCHEMA, compression="zstd") as writer:
        for first in range(0, shards, 100):
            tables = [
                _samples_of(name, min(SAMPLES_PER_SHARD, rows - (first + number) * SAMPLES_PER_SHARD), rng)
                for number, name in enumerate(names[first : first + 100])
            ]
            writer.write_table(pa.concat_tables(tables).combine_chunks())
    counts = np.full(shards, SAMPLES_PER_SHARD)
    counts[-1] = rows - SAMPLES_PER_SHARD * (shards - 1)
    described = {"name": names, "sha256": _hashes(rng, shards), "bytes": [300_000_000] * shards, "samples": counts}
    pq.write_table(pa.table(described, schema=SHARDS_SCHEMA), folder / SHARDS)
    files = {}
    for name in (SAMPLES, SHARDS):
        with open(folder / name, "rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    identity = hashlib.sha256(files[SAMPLES].encode()).hexdigest()
    (folder / DATASET).write_text(json.dumps({"id": identity, "files": files}))


def _samples_of(shard: str, count: int, rng: np.random.Generator) -> pa.Table:
    sizes = rng.integers(150_000, 400_000, count)
    taken = (512 + sizes + 511) // 512 * 512 + 3072
    offsets = 512 + np.concatenate([[0], np.cumsum(taken)[:-1]])
    hashes = _hashes(rng, count)
    columns = {
        "key": [f"{sha256[:20]}-0-0-512-512" for sha256 in hashes],
        "shard": [shard] * count,
        "member": [f"{sha256[:20]}-0-0-512-512.png" for sha256 in hashes],
        "offset": offsets,
        "size": sizes,
        "json_offset": offsets + taken - 2560,
        "json_size": np.full(count, 2000),
        "sha256": hashes,
        "source": [f"web/{sha256[:12]}.jpg" for sha256 in hashes],
        "source_sha256": hashes,
        **{name: np.full(count, 512, np.int32) for name in ("x", "y", "width", "height")},
        **{
            name: rng.random(count, np.float32)
            for name in ("laplacian_variance", "flat_fraction", "noise", "blockiness", "entropy")
        },
    }
    return pa.table(columns, schema=SAMPLES_SCHEMA)


def _hashes(rng: np.random.Generator, count: int) -> list[str]:
    text = rng.bytes(32 * count).hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def private_mib() -> float:
    return psutil.Process().memory_full_info().uss / _MIB


def dirty_mib() -> float:
    return sum(area.private_dirty for area in psutil.Process().memory_maps()) / _MIB


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
