"""What the scan costs a picture, in ratios: to the bare decode, to a naive pass, and to a download tool's resize path.

    python benchmarks/datagen_scan.py [--folder PHOTOGRAPHS] [--pictures 4] [--repeats 7] [--img2dataset PYTHON]

Photographs (by default the embedded corpus) are cut up and laid out as 3-megapixel pictures, 2000x1500, JPEG of quality
95 with 4:2:0 chroma. Everything runs in this process on one thread. Times are process CPU time, so that other work on
the machine counts little; what is compared is measured in turns, and ratios are taken turn by turn.

img2dataset needs an older OpenCV than ours, so it stands beside: PYTHON is the interpreter of an environment that holds
it (python -m venv D && D/bin/pip install img2dataset) and resizes the same files in its turn.
"""

import argparse
import contextlib
import hashlib
import io
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from datagen.config import ScanConfig
from datagen.picture.decode import PictureError, decode, read_header
from datagen.picture.niqe import load_model, niqe
from datagen.picture.perceptual_hash import ORIENTATIONS, area_mean, center_hash, grey_thumb, hashes, orient
from datagen.picture.quality import luma, measure
from datagen.scan.row import measure_picture
from datagen.source.embedded import corpus_files

WIDTH, HEIGHT, TILE, QUALITY = 2000, 1500, 250, 95
LIMITS = ScanConfig()
RESIZER = "img2dataset's Resizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="photographs of at least 250 pixels a side")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="of an environment that holds it")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    files = mosaics(tiles(options.folder), options.pictures)
    size = sum(map(len, files)) / len(files)
    print(f"{len(files)} pictures of {WIDTH}x{HEIGHT}, JPEG quality {QUALITY}, {size / 1e6:.2f} MB each on average")
    verdicts = {measure_picture(data, LIMITS)["verdict"] for data in files}
    if verdicts != {"measured"}:
        raise SystemExit(f"the scan refuses some of them: {verdicts}")
    with contextlib.ExitStack() as stack:
        peers = {}
        if options.img2dataset:
            peers[RESIZER] = stack.enter_context(img2dataset(options.img2dataset, files))
        report(cpu_times(stages() | passes(), files, options.repeats, peers))


def tiles(folder: Path | None) -> list[np.ndarray]:
    """Squares of 250 pixels, RGB, out of all photographs that are no less sharp than the curation demands."""
    if folder:
        contents = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
    else:
        contents = list((corpus_files("pictures") | corpus_files("held_out")).values())
    found = []
    for data in contents:
        try:
            pixels, _ = decode(data, read_header(data, 10**8))
        except PictureError:
            continue
        if min(pixels.shape[:2]) < TILE or measure(luma(pixels)).laplacian_variance < 50:
            continue
        for y in range(0, pixels.shape[0] - TILE + 1, TILE):
            found += [pixels[y : y + TILE, x : x + TILE] for x in range(0, pixels.shape[1] - TILE + 1, TILE)]
    if not found:
        raise SystemExit("no photograph there")
    return found


def mosaics(squares: list[np.ndarray], count: int) -> list[bytes]:
    """JPEG files laid out of the squares, in an order drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        picture = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
        for y in range(0, HEIGHT, TILE):
            for x in range(0, WIDTH, TILE):
                picture[y : y + TILE, x : x + TILE] = squares[rng.integers(len(squares))]
        files.append(simplejpeg.encode_jpeg(picture, QUALITY, "RGB", "420"))
    return files


def stages() -> dict[str, Callable[[bytes], object]]:
    """The stages of the scan on their own; what they need from one another is made beforehand."""
    model = load_model(None)
    limit = round(LIMITS.max_megapixels * 1e6)
    made: dict[bytes, tuple] = {}

    def of(data: bytes) -> tuple:
        if data not in made:
            pixels, _ = decode(data, read_header(data, limit))
            grey = luma(pixels)
            made[data] = pixels, grey, measure(grey).cells
        return made[data]

    def grey_of(data: bytes) -> np.ndarray:
        return of(data)[1]

    return {
        "sha256 of the file": lambda data: hashlib.sha256(data).digest(),
        "header": lambda data: read_header(data, limit),
        "decode, strict, with the header": lambda data: decode(data, read_header(data, limit)),
        "sha256 of the pixels": lambda data: hashlib.sha256(of(data)[0].data).digest(),
        "luma": lambda data: luma(of(data)[0]),
        "seven measures and their maps": lambda data: measure(grey_of(data)),
        "NIQE": lambda data: niqe(grey_of(data), model, LIMITS.niqe_patches, of(data)[2]),
        "eight hashes": lambda data: hashes(grey_thumb(grey_of(data))),
        "hash of the centre": lambda data: center_hash(grey_of(data)),
        "thumbnail, by area_mean": lambda data: area_mean(of(data)[0], 160, 120),
    }


def passes() -> dict[str, Callable[[bytes], object]]:
    return {
        "bare decode": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "full pass": lambda data: measure_picture(data, LIMITS),
        "naive pass": naive,
        "resize path": resize_path,
    }


def naive(data: bytes) -> tuple:
    """The first thing that comes to mind, with fewer measures: Pillow, float64 filters, a hash of every orientation."""
    grey = Image.open(io.BytesIO(data)).convert("RGB").convert("L")
    levels = np.asarray(grey)
    sharpness = cv2.Laplacian(levels, cv2.CV_64F).var()
    across, down = cv2.Sobel(levels, cv2.CV_64F, 1, 0), cv2.Sobel(levels, cv2.CV_64F, 0, 1)
    flat = (np.sqrt(across**2 + down**2) < 16).mean()
    thumb = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    found = []
    for orientation in range(ORIENTATIONS):
        low = cv2.dct(np.ascontiguousarray(orient(thumb, orientation)))[:8, :8]
        found.append(low > np.median(low))
    return sharpness, flat, found, hashlib.sha256(data).hexdigest()


_IMG2DATASET = """
import io, pathlib, sys, time
from img2dataset.resizer import Resizer
files = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
resizer = Resizer(image_size=256, resize_mode="keep_ratio_largest", resize_only_if_bigger=True)
for _ in sys.stdin:
    start = time.process_time()
    faults = [resizer(io.BytesIO(data))[-1] for data in files]
    seconds = time.process_time() - start
    assert not any(faults), faults
    print(seconds, flush=True)
"""


@contextlib.contextmanager
def img2dataset(python: str, files: list[bytes]) -> Iterator[Callable[[], float]]:
    """CPU seconds that the package's own Resizer (256, longer side, area, JPEG 95) takes for all files, each call."""
    with tempfile.TemporaryDirectory(prefix="ird-benchmark-") as folder:
        for number, data in enumerate(files):
            Path(folder, f"{number:04d}.jpg").write_bytes(data)
        command = [python, "-W", "ignore", "-c", _IMG2DATASET, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin and child.stdout
            asked, answers = child.stdin, child.stdout

            def seconds() -> float:
                print(file=asked, flush=True)
                return float(answers.readline())

            yield seconds
            asked.close()


def resize_path(data: bytes) -> bytes:
    """What img2dataset does to every picture, here with our OpenCV: decode, longer side to 256 by area, encode."""
    picture = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    scale = 256 / max(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def cpu_times(
    work: dict[str, Callable[[bytes], object]],
    files: list[bytes],
    repeats: int,
    peers: dict[str, Callable[[], float]],
) -> dict[str, list[float]]:
    """CPU seconds a picture, one figure a turn; ``peers`` count those of all files themselves."""
    times: dict[str, list[float]] = {name: [] for name in [*work, *peers]}
    for turn in range(-1, repeats):
        for name, function in work.items():
            start = time.process_time()
            for data in files:
                function(data)
            # The first turn warms caches up.
            if turn >= 0:
                times[name].append((time.process_time() - start) / len(files))
        for name, seconds in peers.items():
            spent = seconds() / len(files)
            if turn >= 0:
                times[name].append(spent)
    return times


def report(times: dict[str, list[float]]) -> None:
    megapixels = WIDTH * HEIGHT / 1e6
    print(f"\n{'CPU time a picture':32}{'ms':>8}{'least':>8}{'most':>8}{'MP/s a core':>14}")
    for name, seconds in times.items():
        low, middle, high = (f(seconds) * 1e3 for f in (min, statistics.median, max))
        print(f"{name:32}{middle:8.2f}{low:8.2f}{high:8.2f}{megapixels / middle * 1e3:14.1f}")
    print(f"\n{'ratio':52}{'median':>8}{'least':>8}{'most':>8}")
    for name, above, below in (
        ("full pass / bare decode", "full pass", "bare decode"),
        ("naive pass / full pass", "naive pass", "full pass"),
        ("img2dataset's resize path, our OpenCV / full pass", "resize path", "full pass"),
        (f"{RESIZER} / full pass", RESIZER, "full pass"),
        (f"{RESIZER} / bare decode", RESIZER, "bare decode"),
    ):
        if above not in times:
            continue
        ratios = [a / b for a, b in zip(times[above], times[below])]
        print(f"{name:52}{statistics.median(ratios):8.2f}{min(ratios):8.2f}{max(ratios):8.2f}")
    extra = zip(times["NIQE"], times["sha256 of the pixels"])
    equal = [full - score - pixels for full, (score, pixels) in zip(times["full pass"], extra)]
    for name, ratios in (
        ("without NIQE and pixel hash / bare decode", [a / b for a, b in zip(equal, times["bare decode"])]),
        ("naive pass, which has neither, / that", [a / b for a, b in zip(times["naive pass"], equal)]),
    ):
        print(f"{name:52}{statistics.median(ratios):8.2f}{min(ratios):8.2f}{max(ratios):8.2f}")


if __name__ == "__main__":
    main()
