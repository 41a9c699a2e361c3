"""What the search for near duplicates costs: time, memory, pairs, and the share of planted copies that it finds.

``python benchmarks/datagen_neighbours.py`` takes 100 thousand, one and two million pictures (about six minutes of one
core), ``--large`` also ten million (ten minutes more, 3 GB), ``--sizes N …`` any. Hashes are those of blends: a mix of
three photographs' crops has the mix of their DCT coefficients, so that hashes crowd as those of photographs do and
are not random bits. The photographs are those under ``--pictures DIR`` or else under IRD_REAL_DATA. The alternatives,
run on a sample of the queries and scaled to all, are all against all, and the four bands of 16 bits, probed with
every bit flipped, of Norouzi et al. (CVPR 2012).
"""

import argparse
import functools
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from datagen.picture.perceptual_hash import ORIENTATIONS, THUMB, grey_thumb, hashes
from datagen.select.neighbours import near_pairs_among

PLANTED = 1000  # Copies at each distance up to the radius.
BLENDED = 3  # Crops a picture: of fewer, millions of pictures would be near copies of each other.
LEAST_PHOTOGRAPHS = 100
EQUAL = 1000  # Pictures of one and the same hash, as near-constant ones have.


def photographs(folder: str) -> list[np.ndarray]:
    """Grey pictures, uint8 ``[H, W]``."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    decoded = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in files]
    usable = [picture for picture in decoded if picture is not None and min(picture.shape) >= THUMB]
    if len(usable) < LEAST_PHOTOGRAPHS:
        found = f"{len(usable)} pictures under {folder!r}"
        raise SystemExit(f"{found}: give a folder of {LEAST_PHOTOGRAPHS} or more, or IRD_REAL_DATA")
    return usable


def crop_coefficients(pictures: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """The 8x8 lowest DCT coefficients, float32 ``[count, 8, 8]``, of random crops."""
    coefficients = np.empty((count, 8, 8), dtype=np.float32)
    for row in coefficients:
        picture = pictures[rng.integers(len(pictures))]
        height, width = (int(max(THUMB, side * rng.uniform(0.3, 1.0))) for side in picture.shape)
        y, x = rng.integers(picture.shape[0] - height + 1), rng.integers(picture.shape[1] - width + 1)
        row[:] = cv2.dct(grey_thumb(picture[y : y + height, x : x + width]).astype(np.float32))[:8, :8]
    return coefficients


def hashes_of(coefficients: np.ndarray) -> np.ndarray:
    """What ``perceptual_hash.hashes`` says, uint64 ``[N, 8]``, of coefficients ``[N, 8, 8]``."""
    odd = np.where(np.arange(8) % 2, -1.0, 1.0).astype(np.float32)
    result = np.empty((len(coefficients), ORIENTATIONS), dtype=np.uint64)
    for orientation in range(ORIENTATIONS):
        turned = coefficients
        if orientation & 1:
            turned = turned * odd
        if orientation & 2:
            turned = turned * odd[:, None]
        if orientation & 4:
            turned = turned.transpose(0, 2, 1)
        values = turned.reshape(len(turned), 64).copy()
        median = np.partition(values[:, 1:], 31, axis=1)[:, 31]
        bits = values > median[:, None]
        bits[:, 0] = False
        result[:, orientation] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return result


def synthesise(
    pictures: list[np.ndarray], size: int, radius: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 ``[size, 8]`` and the planted pairs among them, int64 ``[P, 3]`` rows (first, second, distance)."""
    bank = crop_coefficients(pictures, 20_000, rng)
    rows = np.empty((size, ORIENTATIONS), dtype=np.uint64)
    for start in range(0, size, 100_000):
        count = min(100_000, size - start)
        weights = rng.uniform(0.7, 1.3, (BLENDED, count, 1, 1)).astype(np.float32)
        crops = bank[rng.integers(len(bank), size=(BLENDED, count))]
        rows[start : start + count] = hashes_of((weights * crops).sum(axis=0))
    copies = PLANTED * (radius + 1)
    second = np.arange(size - copies, size)
    first = rng.choice(size - copies - EQUAL, copies, replace=False)
    distance = np.repeat(np.arange(radius + 1), PLANTED)
    flips = np.zeros(copies, dtype=np.uint64)
    for copy in range(copies):
        bits = rng.choice(64, distance[copy], replace=False).astype(np.uint64)
        flips[copy] = np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    rows[second, 0] = rows[first, rng.integers(ORIENTATIONS, size=copies)] ^ flips
    rows[size - copies - EQUAL : size - copies] = rows[size - copies - EQUAL]
    return rows, np.stack([first, second, distance], axis=1)


def banded(queries: np.ndarray, base: np.ndarray, radius: int) -> np.ndarray:
    """The pairs (flat query, base index), int64 ``[K, 2]`` with repeats, by four bands probed with up to one flip."""
    found = []
    flips = [0, *(1 << bit for bit in range(16))] if radius >= 4 else [0]
    for band in range(4):
        shift, mask = np.uint64(16 * band), np.uint64(0xFFFF)
        keys = ((base >> shift) & mask).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        wanted = ((queries.reshape(-1) >> shift) & mask).astype(np.int64)
        for flip in flips:
            first = np.searchsorted(keys, wanted ^ flip, side="left")
            count = np.searchsorted(keys, wanted ^ flip, side="right") - first
            query = np.repeat(np.arange(len(wanted)), count)
            within = np.arange(len(query)) - np.repeat(np.cumsum(count) - count, count)
            candidate = order[np.repeat(first, count) + within]
            near = np.bitwise_count(queries.reshape(-1)[query] ^ base[candidate]) <= radius
            found.append(np.stack([query[near], candidate[near]], axis=1))
    return np.concatenate(found)


def all_against_all(queries: np.ndarray, base: np.ndarray, radius: int) -> np.ndarray:
    """The pairs (flat query, base index), int64 ``[K, 2]``."""
    found = []
    for number, query in enumerate(queries.reshape(-1)):
        near = np.flatnonzero(np.bitwise_count(base ^ query) <= radius)
        found.append(np.stack([np.full(len(near), number), near], axis=1))
    return np.concatenate(found)


def search(file: str, planted_file: str, radius: int) -> dict[str, float]:
    """One search in a fresh process, so that its peak memory is its own."""
    rows, planted = np.load(file), np.load(planted_file)
    start = time.process_time()
    representatives, pairs = near_pairs_among(rows, radius)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    keys = pairs[:, 0] * len(rows) + pairs[:, 1]
    ends = np.sort(representatives[planted[:, :2]], axis=1)
    wanted = ends[:, 0] * len(rows) + ends[:, 1]
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = (ends[:, 0] == ends[:, 1]) | ((keys[at] == wanted) & (pairs[at, 3] <= planted[:, 2]))
    return {
        "seconds": seconds,
        "peak": peak,
        "input": rows.nbytes,
        "pairs": len(pairs),
        "groups": len(np.unique(representatives)),
        "recall": float(found.mean()),
    }


def scaled_seconds(scheme: Callable[..., np.ndarray], rows: np.ndarray, radius: int, sample: int) -> float:
    """CPU seconds of all the queries, from those of a sample."""
    queries, base = rows[:: max(1, len(rows) // sample)], np.ascontiguousarray(rows[:, 0])
    start = time.process_time()
    scheme(queries, base, radius)
    return (time.process_time() - start) * len(rows) / len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also ten million pictures")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000, 2_000_000])
    parser.add_argument("--radius", type=int, default=6)
    parser.add_argument("--pictures", default=os.environ.get("IRD_REAL_DATA", ""), help="a folder of photographs")
    arguments = parser.parse_args()
    pictures = photographs(arguments.pictures)
    check_hashes(pictures[0])
    print(f"near_pairs_among, radius {arguments.radius} bits, one process, CPU seconds; peak is the process's")
    print(f"{'pictures':>10} {'CPU s':>8} {'us each':>8} {'law':>5} {'peak MB':>8} {'input MB':>8} ", end="")
    print(f"{'groups':>9} {'pairs':>9} {'recall':>7}")
    before: tuple[int, float] | None = None
    alternatives = []
    for size in arguments.sizes + [10_000_000] * arguments.large:
        rows, planted = synthesise(pictures, size, arguments.radius, np.random.default_rng(size))
        with tempfile.TemporaryDirectory() as folder:
            np.save(file := f"{folder}/rows.npy", rows)
            np.save(planted_file := f"{folder}/planted.npy", planted)
            rows = rows if size <= 1_000_000 else rows[:0]
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result = pool.apply(search, (file, planted_file, arguments.radius))
        seconds = result["seconds"]
        law = np.log(seconds / before[1]) / np.log(size / before[0]) if before else float("nan")
        before = (size, seconds)
        print(f"{size:10,d} {seconds:8.1f} {seconds / size * 1e6:8.1f} {law:5.2f} {result['peak'] / 1e6:8.0f} ", end="")
        print(f"{result['input'] / 1e6:8.0f} {result['groups']:9,d} {result['pairs']:9,d} {result['recall']:7.4f}")
        if result["recall"] < 1.0:
            raise SystemExit(f"{size} pictures: planted copies were missed")
        schemes = {"four bands, one flip": functools.partial(scaled_seconds, banded, sample=2000)}
        if size <= 100_000:
            schemes["all against all"] = functools.partial(scaled_seconds, all_against_all, sample=1000)
        if size <= 1_000_000:
            for name, cost in schemes.items():
                alternatives.append(f"{size:,} pictures: {name} / this = {cost(rows, arguments.radius) / seconds:.1f}")
    print("\n".join(alternatives))


def check_hashes(picture: np.ndarray) -> None:
    """The batch above and the package's own function must agree, or the figures mean nothing."""
    thumb = grey_thumb(picture)
    coefficients = cv2.dct(thumb.astype(np.float32))[None, :8, :8]
    if not np.array_equal(hashes_of(coefficients)[0], hashes(thumb)):
        raise SystemExit("the benchmark's hashes differ from those of datagen.picture.perceptual_hash")


if __name__ == "__main__":
    main()
