"""What the leak guard finds, what it takes for a leak and is none, and what it costs.

    python benchmarks/datagen_leaks.py [recall] [false] [cost] [--pictures 40]

Recall is by how much of each side a crop keeps, for corpus pictures that are crops of evaluation pictures, that contain
them, and that are whole copies; all are flipped or rotated at random, and either left so or also brightened, resized
and saved as JPEG. With IRD_REAL_DATA on its photographs, else on those that ship inside the dependencies.
"""

import argparse
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from datagen.config import ScanConfig, SelectConfig
from datagen.picture.decode import decode, read_header
from datagen.picture.perceptual_hash import orient
from datagen.scan.row import measure_picture
from datagen.select.leaks import Match, find_leaks
from datagen.source.embedded import corpus_files

BINS = ((0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1.0))
SCAN, SELECT = ScanConfig(niqe_patches=0), SelectConfig()


def photographs() -> dict[str, bytes]:
    folder = os.environ.get("IRD_REAL_DATA")
    if folder:
        paths = [*Path(folder).glob("bsd400/*.jpg"), *Path(folder).glob("benchmarks/*/*.png")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}
    files = corpus_files("pictures") | corpus_files("held_out")
    return {name: data for name, data in sorted(files.items()) if "_" not in name and name != "text.png"}


def pixels(data: bytes) -> np.ndarray:
    return decode(data, read_header(data, 10**8))[0]


def png(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".png", rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def jpeg(rgb: np.ndarray, quality: int) -> bytes:
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def cut(rgb: np.ndarray, kept: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A crop that keeps a share of each side drawn from ``kept``, at any place."""
    height, width = rgb.shape[:2]
    sides = [round(side * rng.uniform(*kept)) for side in (height, width)]
    top, left = rng.integers(0, height - sides[0] + 1), rng.integers(0, width - sides[1] + 1)
    return rgb[top : top + sides[0], left : left + sides[1]]


def publish(rgb: np.ndarray, changed: bool, rng: np.random.Generator) -> bytes:
    """The file that somebody else has of a picture: turned, and if ``changed`` brightened, resized and saved again."""
    rgb = np.stack([orient(rgb[..., i], turn) for turn in [int(rng.integers(8))] for i in range(3)], axis=-1)
    if not changed:
        return png(np.ascontiguousarray(rgb))
    height, width = rgb.shape[:2]
    scale = rng.uniform(0.6, 1.2)
    way = int(rng.choice([cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC]))
    rgb = cv2.resize(np.ascontiguousarray(rgb), (round(width * scale), round(height * scale)), interpolation=way)
    rgb = np.clip(rgb * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8), 0, 255).astype(np.uint8)
    return jpeg(rgb, int(rng.integers(60, 96)))


def inventory(files: list[bytes]) -> pa.Table:
    rows = [measure_picture(data, SCAN) for data in files]
    names = ("verdict", "phash", "center_phash", "grey_thumb", "thumbnail")
    table = {name: [row[name] for row in rows] for name in names}
    table["phash"] = [None if hashes is None else [int(value) for value in hashes] for hashes in table["phash"]]
    kinds = {"phash": pa.list_(pa.uint64()), "center_phash": pa.uint64()}
    columns = {name: pa.array(values, kinds.get(name)) for name, values in table.items()}
    return pa.table({"source": pa.array([f"picture-{i}" for i in range(len(files))]), **columns})


def search(corpus: pa.Table, guard: pa.Table) -> tuple[list[Match], int]:
    """The matches, and how many thumbnails were asked for."""
    asked = 0

    def thumbnails(rows: np.ndarray) -> list[bytes | None]:
        nonlocal asked
        asked += len(rows)
        return corpus.column("thumbnail").take(pa.array(rows)).to_pylist()

    upright = np.array([hashes[0] for hashes in corpus.column("phash").to_pylist()], dtype=np.uint64)
    return find_leaks(upright, corpus.column("center_phash").to_numpy(), thumbnails, guard, SELECT), asked


def measured(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if measure_picture(data, SCAN)["verdict"] == "measured"}


def show_recall(count: int) -> None:
    rng = np.random.default_rng(0)
    originals = [pixels(data) for data in measured(photographs()).values()]
    originals = [originals[i] for i in np.linspace(0, len(originals) - 1, min(count, len(originals))).astype(int)]
    print(f"recall, {len(originals)} pictures, by the share that a crop keeps of each side")
    print("  found of one, any           " + "  ".join(f"{a:.2f}-{b:.2f} " for a, b in BINS))
    for changed in (False, True):
        told = "brightened, resized, JPEG" if changed else "as it is"
        crops = [cut(rgb, kept, rng) for kept in BINS for rgb in originals]
        wholes = inventory([png(rgb) for rgb in originals])
        published = inventory([publish(rgb, changed, rng) for rgb in originals])
        cases = {
            "crop of it": (inventory([publish(crop, changed, rng) for crop in crops]), [wholes]),
            "contains it": (
                published,
                [inventory([png(rgb) for rgb in part]) for part in batched(crops, len(originals))],
            ),
        }
        for name, (corpus, guards) in cases.items():
            shares = [share for guard in guards for share in found_shares(corpus, guard)]
            print(f"  {name:12} {told:26}" + "  ".join(f"{share:9.3f}" for share in shares))
        print(f"  {'whole copy':12} {told:26}{found_shares(published, wholes)[0]:9.3f}")


def batched(crops: list[np.ndarray], size: int) -> list[list[np.ndarray]]:
    return [crops[start : start + size] for start in range(0, len(crops), size)]


def found_shares(corpus: pa.Table, guard: pa.Table) -> list[float]:
    """Of every ``guard.num_rows`` corpus pictures, that show the guard's in their order, the share that is found."""
    right = np.zeros(corpus.num_rows)
    for match in search(corpus, guard)[0]:
        right[match.row] = match.guard == match.row % guard.num_rows
    return right.reshape(-1, guard.num_rows).mean(axis=1).tolist()


def show_false() -> None:
    files = measured(photographs())
    names, table = list(files), inventory(list(files.values()))
    folds, asked, pairs = 4, 0, 0
    print(f"every one of {len(names)} pictures as evaluation picture against every other: matches")
    for fold in range(folds):
        inside = np.arange(len(names)) % folds == fold
        corpus, guard = np.flatnonzero(~inside), np.flatnonzero(inside)
        matches, rows = search(table.take(corpus), table.take(guard))
        asked, pairs = asked + rows, pairs + len(corpus) * len(guard)
        for match in matches:
            print(f"  {names[corpus[match.row]]} ~ {names[guard[match.guard]]}: {match}")
    print(f"  thumbnails looked at: {asked}, {asked / pairs:.1e} a pair")


def synthetic_hashes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Hashes as independent pictures would have: 31 ones at random places."""
    hashes = []
    for start in range(0, count, 1 << 17):
        draws = rng.random((min(1 << 17, count - start), 63), dtype=np.float32)
        bits = np.zeros((len(draws), 64), dtype=bool)
        bits[:, 1:] = draws > np.partition(draws, 31, axis=1)[:, 31:32]
        hashes.append(np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64))
    return np.concatenate(hashes)


def show_cost() -> None:
    rng = np.random.default_rng(1)
    pictures = [pixels(data) for data in measured(photographs()).values()]
    chosen = [pictures[i % len(pictures)] for i in range(1000)]
    # Crops, so that no two are the same picture once there are more rows than photographs.
    guard = inventory([png(cut(rgb, (0.5, 0.9), rng)) for rgb in chosen])
    thumbnail = guard.column("thumbnail").to_pylist()
    print("CPU seconds, hashes drawn at random")
    for count in (100_000, 2_000_000):
        whole, center = synthetic_hashes(count, rng), synthetic_hashes(count, rng)
        for guards in (100, 1000):
            asked = 0

            def thumbnails(rows: np.ndarray) -> list[bytes | None]:
                nonlocal asked
                asked += len(rows)
                return [thumbnail[row % len(thumbnail)] for row in rows.tolist()]

            taken = {}
            for crops in (False, True):
                asked, start = 0, time.process_time()
                config = SELECT.model_copy(update={"leak_crops": crops})
                find_leaks(whole, center, thumbnails, guard.slice(0, guards), config)
                taken[crops] = time.process_time() - start
            print(
                f"  {count:9,} pictures, {guards:4} evaluation pictures: whole copies {taken[False]:6.1f}, with crops "
                f"{taken[True]:6.1f} ({asked} thumbnails looked at)"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["recall", "false", "cost", []], default=[], help="all of them")
    parser.add_argument("--pictures", type=int, default=40)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    parts = arguments.parts or ["recall", "false", "cost"]
    if "recall" in parts:
        show_recall(arguments.pictures)
    if "false" in parts:
        show_false()
    if "cost" in parts:
        show_cost()


if __name__ == "__main__":
    main()
