"""What `datagen select` costs on a corpus of N pictures: CPU and memory by phase, and that it finds what was planted.

    python benchmarks/datagen_select.py                            (200 000 rows)
    python benchmarks/datagen_select.py --rows 200000 2000000      (and how the cost grows)

The inventory is simulated, the rest is real. Measures, sizes and quality maps are those of random crops of real
photographs (the embedded corpus, or --photographs DIR), resampled with noise; thumbnails are mixtures of three such
crops, turned and shifted, and hashes are theirs. Planted are copies by file, copies by pixels, near copies (turned,
brightened, noisy) and copies of evaluation pictures. Thumbnails are 48 pixels wide instead of 160, to spare the disk:
about 2 kB a row. Inventories that --folder holds already are used again.
Wall time says little on a busy machine; CPU time and ratios hold.
"""

import argparse
import collections
import contextlib
import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import datagen.select.select as selection
import datagen.select.sweep as sweeping
from datagen.config import DatagenConfig, ScanConfig, TileConfig
from datagen.dataset import INVENTORY, INVENTORY_FOLDER, SELECTION, write_json
from datagen.picture.decode import decode, read_header
from datagen.picture.perceptual_hash import ORIENTATIONS, THUMB, correlation, grey_thumb, orient
from datagen.picture.quality import WHOLE_PICTURE_MEASURES, luma
from datagen.scan.inventory import INVENTORY_SCHEMA, SCHEMA_VERSION
from datagen.scan.row import measure_picture
from datagen.source.embedded import corpus_files
from infra.storage import open_store

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "china.jpg", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "rocket.jpg"),
)
MEASURED_CROPS = 160
POOL = 2000
ROWS_PER_PART = 256
BLOCK = ROWS_PER_PART * 64
GUARD = 100
# Shares of the rows.
SAME_FILE, SAME_PIXELS, NEAR, LEAK = 0.01, 0.005, 0.04, 0.0005

_COSINES = np.stack([cv2.dct(unit)[:8, 0] for unit in np.eye(THUMB, dtype=np.float32)[:, :, None]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--photographs", help="a folder of them; default: those that ship in the dependencies")
    parser.add_argument("--folder", help="where to put the inventories, which stay there; default: a temporary one")
    arguments = parser.parse_args()
    results: dict[int, dict[str, tuple[float, float]]] = {}
    for rows in arguments.rows:
        with _place(arguments.folder, rows) as out:
            if not (out / INVENTORY).exists():
                _in_fresh_process(simulate, out, rows, arguments.photographs)
            results[rows] = _in_fresh_process(measure_select, out, rows)
            _print(rows, results)


@contextlib.contextmanager
def _place(folder: str | None, rows: int) -> Iterator[Path]:
    if folder:
        yield Path(folder) / f"rows-{rows}"
        return
    with tempfile.TemporaryDirectory(prefix="ird-benchmark-") as temporary:
        yield Path(temporary)


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    # So that one phase's memory is not counted in another's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# --- the simulated inventory ------------------------------------------------------------------------------------------


def simulate(out: Path, rows: int, photographs: str | None) -> None:
    """Write an inventory of ``rows`` pictures, a leak guard, and ``planted.npz``."""
    start = time.process_time()
    generator = np.random.default_rng(0)
    shutil.rmtree(out, ignore_errors=True)
    store = open_store(out)
    pictures, evaluation = _photographs(photographs)
    crops = pa.Table.from_pylist(
        [_measured(_crop(pictures, generator, 256), generator) for _ in range(MEASURED_CROPS)], schema=INVENTORY_SCHEMA
    )
    greys = [luma(_crop(pictures, generator, 128)) for _ in range(POOL)]
    # Turned and shifted, so that few photographs make many unlike pictures.
    crops_32 = [
        np.roll(grey_thumb(grey), generator.integers(THUMB, size=2), (0, 1)) for grey in greys for _ in range(8)
    ]
    pool = np.stack([orient(crop, i % ORIENTATIONS) for i, crop in enumerate(crops_32)])
    shown = [_jpeg(grey) for grey in greys]
    guard = [luma(_crop(evaluation, generator, 128)) for _ in range(GUARD)]
    planted: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    parts = []
    for first in range(0, rows, BLOCK):
        count = min(BLOCK, rows - first)
        table, found = _block(first, count, crops, pool, shown, guard, generator)
        for name, pairs in found.items():
            planted[name].append(pairs + first)
        for offset in range(0, count, ROWS_PER_PART):
            part = table.slice(offset, ROWS_PER_PART)
            parts.append(_write(store, f"{INVENTORY_FOLDER}/{len(parts):08d}.parquet", part))
    guard_part = _write(store, f"{INVENTORY_FOLDER}/guard.parquet", _guard_table(guard, crops))
    np.savez(out / "planted.npz", **{name: np.concatenate(pairs) for name, pairs in planted.items()})
    manifest = {"schema_version": SCHEMA_VERSION, "inputs": rows, "parts": parts, "guard_parts": [guard_part]}
    write_json(store, INVENTORY, {**manifest, "guard_inputs": GUARD})
    size = sum(entry.size for entry in store.list(INVENTORY_FOLDER))
    print(f"{rows} rows simulated in {time.process_time() - start:.0f} s CPU: {size / 1e9:.2f} GB", file=sys.stderr)


def _photographs(folder: str | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Those that the corpus is made of, and those of the leak guard."""
    if folder:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        files = [path.read_bytes() for path in paths[:: max(1, len(paths) // 200)]]
        files, evaluation = [data for i, data in enumerate(files) if i % 10], files[::10]
    else:
        files = [corpus_files("pictures")[name] for name in PHOTOGRAPHS]
        evaluation = list(corpus_files("held_out").values())
    decoded = [[decode(data, read_header(data, 178_000_000))[0] for data in some] for some in (files, evaluation)]
    return decoded[0], decoded[1]


def _crop(pictures: list[np.ndarray], generator: np.random.Generator, least: int) -> np.ndarray:
    picture = pictures[generator.integers(len(pictures))]
    size = [min(side, int(generator.integers(min(side, least), side + 1))) for side in picture.shape[:2]]
    y, x = (int(generator.integers(side - extent + 1)) for side, extent in zip(picture.shape[:2], size))
    return np.ascontiguousarray(picture[y : y + size[0], x : x + size[1]])


def _measured(crop: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    quality = int(generator.integers(70, 98))
    data = cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return {"licence": "", **measure_picture(data.tobytes(), ScanConfig(niqe_patches=0))}


def _jpeg(grey: np.ndarray) -> bytes:
    scale = 48 / max(grey.shape)
    size = (max(16, round(grey.shape[1] * scale)), max(16, round(grey.shape[0] * scale)))
    return cv2.imencode(".jpg", cv2.resize(grey, size, interpolation=cv2.INTER_AREA))[1].tobytes()


def _block(
    first: int,
    count: int,
    crops: pa.Table,
    pool: np.ndarray,
    shown: list[bytes],
    guard: list[np.ndarray],
    generator: np.random.Generator,
) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """Rows, and by kind the planted pairs (original, copy), of leaks (row, row), counted from the block's first row."""
    parents = generator.integers(len(pool), size=(count, 3))
    weights = generator.uniform(0.7, 1.3, (count, 3)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    thumbs = sum(weights[:, i, None, None] * pool[parents[:, i]].astype(np.float32) for i in range(3))
    thumbs = np.clip(np.rint(thumbs), 0, 255).astype(np.uint8)
    thumbnails = [shown[i // ORIENTATIONS] for i in parents[:, 0]]
    numbers = first + np.arange(count)
    files, pixels = numbers.copy(), numbers.copy()
    source_crop = generator.integers(crops.num_rows, size=count)
    # Disjoint sets of rows: each planted row copies one that nothing was planted on.
    shuffled = generator.permutation(count)
    sizes = [round(count * share) for share in (SAME_FILE, SAME_PIXELS, NEAR)]
    edges = np.cumsum([0, *(2 * size for size in sizes)])
    pairs = {
        name: shuffled[start:stop].reshape(-1, 2)
        for name, start, stop in zip(("same_file", "same_pixels", "near"), edges, edges[1:])
    }
    leaks = shuffled[edges[-1] : edges[-1] + max(1, round(count * LEAK))]
    for original, copy in np.concatenate(list(pairs.values())):
        source_crop[copy] = source_crop[original]
        thumbs[copy], thumbnails[copy] = thumbs[original], thumbnails[original]
    for original, copy in pairs["same_file"]:
        files[copy] = files[original]
    for original, copy in np.concatenate([pairs["same_file"], pairs["same_pixels"]]):
        pixels[copy] = pixels[original]
    for original, copy in pairs["near"]:
        turned = orient(thumbs[original], int(generator.integers(8))).astype(np.float32)
        changed = turned * generator.uniform(0.9, 1.05) + generator.normal(0, 1.5, turned.shape)
        thumbs[copy] = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    for row in leaks:
        turned = np.ascontiguousarray(orient(guard[generator.integers(len(guard))], int(generator.integers(8))))
        thumbs[row], thumbnails[row] = grey_thumb(turned), _jpeg(turned)
    phash = _hashes(thumbs)
    table = crops.take(pa.array(source_crop))
    noise = {name: np.exp(generator.normal(0, 0.1, count)) for name in (*WHOLE_PICTURE_MEASURES, "bits_per_pixel")}
    for rows in pairs.values():
        for values in noise.values():
            values[rows[:, 1]] = values[rows[:, 0]]
    columns: dict[str, Any] = {name: table.column(name).to_numpy() * values for name, values in noise.items()}
    columns |= {name: np.minimum(columns[name], 1) for name in ("flat_fraction", "overexposed", "underexposed")}
    columns |= {"sha256": [_digest("file", n) for n in files], "pixel_sha256": [_digest("pixels", n) for n in pixels]}
    keys = [f"shard-{n // 10000:05d}/{n:012d}.jpg" for n in numbers]
    columns |= {"key": keys, "source": [f"source-0/{key}" for key in keys], "batch": np.zeros(count, np.int32)}
    columns |= {"phash": _lists(phash), "center_phash": generator.permutation(phash[:, 0])}
    columns |= {"grey_thumb": [thumb.tobytes() for thumb in thumbs], "thumbnail": thumbnails}
    for name, values in columns.items():
        index = INVENTORY_SCHEMA.get_field_index(name)
        table = table.set_column(
            index, INVENTORY_SCHEMA.field(name), pa.array(values, INVENTORY_SCHEMA.field(name).type)
        )
    return table, {**pairs, "near": _promised(pairs["near"], thumbs, phash), "leak": np.stack([leaks, leaks], axis=1)}


def _promised(pairs: np.ndarray, thumbs: np.ndarray, phash: np.ndarray) -> np.ndarray:
    """The near copies that are so alike that select promises to find them: the first of the two larger, or not."""
    limits = DatagenConfig(out="unused").select
    kept = []
    for one, other in pairs:
        for better, worse in ((one, other), (other, one)):
            distances = np.bitwise_count(phash[better] ^ phash[worse, 0])
            turned = orient(thumbs[better], int(distances.argmin()))
            near = distances.min() <= limits.duplicate_radius
            if not near or correlation(turned, thumbs[worse]) < limits.duplicate_correlation + 1e-3:
                break
        else:
            kept.append((one, other))
    return np.array(kept, dtype=np.int64).reshape(-1, 2)


def _hashes(thumbs: np.ndarray) -> np.ndarray:
    """``perceptual_hash.hashes`` of many thumbnails at once, uint64 ``[N, 8]``."""
    low = _COSINES @ thumbs.astype(np.float32) @ _COSINES.T
    odd = np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    result = np.empty((len(thumbs), ORIENTATIONS), dtype=np.uint64)
    for orientation in range(ORIENTATIONS):
        turned = low * (odd if orientation & 1 else 1) * (odd[:, None] if orientation & 2 else 1)
        values = (turned.transpose(0, 2, 1) if orientation & 4 else turned).reshape(-1, 64)
        bits = values > np.median(values[:, 1:], axis=1, keepdims=True)
        bits[:, 0] = False
        result[:, orientation] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return result


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1], rows.reshape(-1))


def _digest(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def _guard_table(guard: list[np.ndarray], crops: pa.Table) -> pa.Table:
    table = crops.take(pa.array(np.arange(len(guard)) % crops.num_rows))
    thumbs = np.stack([grey_thumb(grey) for grey in guard])
    columns: dict[str, Any] = {"source": [f"guard-0/{i:04d}.png" for i in range(len(guard))]}
    columns |= {"phash": _lists(_hashes(thumbs)), "grey_thumb": [thumb.tobytes() for thumb in thumbs]}
    columns |= {"thumbnail": [_jpeg(grey) for grey in guard], "verdict": ["measured"] * len(guard)}
    for name, values in columns.items():
        index = INVENTORY_SCHEMA.get_field_index(name)
        table = table.set_column(
            index, INVENTORY_SCHEMA.field(name), pa.array(values, INVENTORY_SCHEMA.field(name).type)
        )
    return table


def _write(store: Any, key: str, table: pa.Table) -> dict[str, Any]:
    path = Path(store.uri) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
    return {"key": key, "rows": table.num_rows, "sha256": "", "batch": 0}


# --- the measurement --------------------------------------------------------------------------------------------------


def measure_select(out: Path, rows: int) -> dict[str, tuple[float, float]]:
    """CPU seconds and peak resident MB by phase of select, and of a sweep; prints what was found of the planted."""
    # The crops are small, so smaller tiles than usual.
    store, config = open_store(out), DatagenConfig(out=str(out), tiles=TileConfig(size=256, whole_below=512))
    phases: dict[str, tuple[float, float]] = {"(libraries loaded)": (0.0, _peak())}
    _reset_peak()
    with contextlib.ExitStack() as patches:
        for name, phase in (
            ("_read_facts", "read, measure, gates"),
            ("find_leaks", "leak guard"),
            ("exact_copies", "exact duplicates"),
            ("near_copies", "near duplicates"),
        ):
            patches.enter_context(_timed(name, phase, phases))
        start = time.process_time()
        facts = selection.select(config, store)
        rest = time.process_time() - start - sum(seconds for seconds, _ in phases.values())
        phases["tiles, names, write"] = (rest, _peak())
    _reset_peak()
    start = time.process_time()
    sweeping.sweep(config, store)
    phases["(sweep)"] = (time.process_time() - start, _peak())
    print({name: facts[name] for name in ("inputs", "kept", "rejected", "tiles")}, file=sys.stderr)
    _print_found(out)
    return phases


@contextlib.contextmanager
def _timed(name: str, phase: str, phases: dict[str, tuple[float, float]]) -> Iterator[None]:
    original = getattr(selection, name)

    def timed(*arguments: Any) -> Any:
        _reset_peak()
        start = time.process_time()
        result = original(*arguments)
        phases[phase] = (time.process_time() - start, _peak())
        _reset_peak()
        return result

    setattr(selection, name, timed)
    yield
    setattr(selection, name, original)


def _print_found(out: Path) -> None:
    reasons = pq.read_table(out / SELECTION, columns=["reason"]).column("reason").to_numpy(zero_copy_only=False)
    kept = (reasons == "") | (reasons == "no_good_tile")
    for name, pairs in np.load(out / "planted.npz").items():
        missed = kept[pairs].all(axis=1) if name != "leak" else reasons[pairs[:, 0]] != "leak"
        by_gates = ~(kept | np.isin(reasons, ["leak", "exact_duplicate", "near_duplicate"]))[pairs].all(axis=1)
        note = f" (of {int(by_gates.sum())} the gates refused one or both)" if name != "leak" else ""
        print(f"planted {name:<12} {len(pairs):>8}   missed {int(missed.sum())}{note}")
    unplanted = np.isin(reasons, ["exact_duplicate", "near_duplicate", "leak"])
    for pairs in np.load(out / "planted.npz").values():
        unplanted[pairs] = False
    print(f"found that was not planted: {int(unplanted.sum())}")


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _print(rows: int, results: dict[int, dict[str, tuple[float, float]]]) -> None:
    phases = results[rows]
    smallest = min(results)
    growth = rows > smallest
    print(f"\n{rows} rows{'':<18}{'CPU s':>9}{'us/row':>9}{'peak MB':>9}{f'  CPU over {smallest}' if growth else ''}")
    total = sum(seconds for name, (seconds, _) in phases.items() if not name.startswith("("))
    before = sum(seconds for name, (seconds, _) in results[smallest].items() if not name.startswith("("))
    lines = [(name, *figures, results[smallest][name][0]) for name, figures in phases.items()]
    for name, seconds, peak, smaller in [*lines, ("select", total, max(peak for _, peak in phases.values()), before)]:
        ratio = f"{seconds / smaller:>12.1f}x" if growth and smaller else ""
        print(f"{name:<24}{seconds:>9.1f}{seconds / rows * 1e6:>9.1f}{peak:>9.0f}{ratio}")
    print(f"{rows / total:.0f} rows/s on one core\n", flush=True)


if __name__ == "__main__":
    main()
