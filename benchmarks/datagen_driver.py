"""What the driver of a curation pays for each picture and each sample, whatever the number of workers.

    python benchmarks/datagen_driver.py [--pictures 200000] [--inventory DIR]

--inventory: the output of a scan and select, for which shards are planned (benchmarks/datagen_select.py --folder DIR
leaves simulated ones of any size).
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil
import pyarrow as pa

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import SAMPLES_SCHEMA, SHARDS_SCHEMA, dataset_id
from datagen.pack.plan import plan_shards
from datagen.scan.scan import cut
from datagen.source.batches import read_batches, write_batches
from datagen.source.listing import Picture
from infra.config import load_config
from infra.storage import open_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--inventory")
    given = parser.parse_args()
    count = given.pictures
    with tempfile.TemporaryDirectory(prefix="ird-bench-") as folder:
        store = open_store(folder)
        pictures = _costs("listing", count, lambda: [_picture(i) for i in range(count)])
        pieces = cut(pictures, 0, ScanConfig(), store, frozenset())
        _costs("fingerprints of the pieces", count, lambda: [piece.part for piece in pieces])
        _costs("comparing listings", count, lambda: set(pictures))
        _costs("listing put on record", count, lambda: write_batches(store, [pictures]))
        size = sum(entry.size for entry in store.list())
        print(f"{'':32}{size / count:8.1f} bytes on record")
        _costs("listing read back", count, lambda: read_batches(store))
    samples = pa.Table.from_pylist([_sample(i) for i in range(count // 10)], schema=SAMPLES_SCHEMA)
    _costs("dataset id, a sample", count // 10, lambda: dataset_id(SHARDS_SCHEMA.empty_table(), samples))
    if given.inventory:
        config = load_config(DatagenConfig, None, [f"out={given.inventory}"])
        start, memory = time.process_time(), psutil.Process().memory_info().rss
        plan = plan_shards(config, open_store(given.inventory))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory
        used = time.process_time() - start
        print(f"plan of {plan.count} samples: {used:.1f} CPU s, at the peak {grown / plan.count:.0f} bytes a sample")


def _costs(what: str, count: int, work: Callable[[], Any]) -> Any:
    process = psutil.Process()
    memory, start = process.memory_info().rss, time.process_time()
    made = work()
    used = time.process_time() - start
    print(f"{what:32}{used / count * 1e6:8.1f} us each{(process.memory_info().rss - memory) / count:8.0f} bytes each")
    return made


def _picture(i: int) -> Picture:
    key = f"part-{i // 10000:05d}/{i:09d}.jpg"
    return Picture(f"source-0/{key}", "s3://bucket/raw/laion-hr", key, 1_150_000 + i, f"{i:032x}", "CC-BY-4.0")


def _sample(i: int) -> dict[str, Any]:
    text = {"key": f"{i:020x}-0-0-512-512", "shard": "ird-000000.tar", "member": f"{i:020x}-0-0-512-512.jpg"}
    text |= {"sha256": f"{i:064x}", "source": f"source-0/{i:09d}.jpg", "source_sha256": f"{i:064x}"}
    return {name: text.get(name, i % 1000) for name in SAMPLES_SCHEMA.names}


if __name__ == "__main__":
    main()
