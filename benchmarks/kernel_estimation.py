"""How far the estimated blur of a picture lies from the one it was blurred with, on known blurs; and CPU time.

    IRD_REAL_DATA=… python -m benchmarks.kernel_estimation [--folder DIR]

For each blur and picture: the largest error of an entry of the covariance (px^2), and the distance of the kernels (L1,
between 0 and 2); beside them those of the round blur of 2 px^2 that is assumed when nothing is known. Prints means.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from datagen.degradations.kernels import MZSR_SIZE, gaussian_kernel
from datagen.degradations.sensor import quantise
from datagen.picture.region import decode_whole
from training.adaptation import shrink_blurred
from training.benchmark import to_batch
from training.kernel_estimation import estimate_kernel

_BLURS = {
    "0.2": (0.2, 0.2, 0.0),
    "1.0": (1.0, 1.0, 0.0),
    "2.0": (2.0, 2.0, 0.0),
    "3.5": (3.5, 3.5, 0.0),
    "4,1,-0.5": (4.0, 1.0, -0.5),
    "4.5,2,0.8": (4.5, 2.0, 0.8),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("IRD_REAL_DATA", ".")) / "benchmarks" / "set5"
    parser.add_argument("--folder", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [to_batch(decode_whole(path.read_bytes())) for path in sorted(options.folder.glob("*.png"))]
    guess = gaussian_kernel(MZSR_SIZE, 2.0, 2.0)
    result, seconds = {}, 0.0
    for name, blur in _BLURS.items():
        kernel = gaussian_kernel(MZSR_SIZE, *blur)
        errors = []
        for picture in pictures:
            low = quantise(shrink_blurred(picture, kernel.float(), 2))
            started = time.process_time()
            found = estimate_kernel(low, 2)
            seconds += time.process_time() - started
            errors.append([*_errors(found, kernel), *_errors(guess, kernel)])
        means = torch.tensor(errors).mean(dim=0).tolist()
        keys = ("covariance", "kernel", "covariance_of_guess", "kernel_of_guess")
        result[name] = {key: round(value, 3) for key, value in zip(keys, means)}
    print(json.dumps({"seconds_a_picture": round(seconds / len(_BLURS) / len(pictures), 2), **result}, indent=2))


def _errors(found: Tensor, kernel: Tensor) -> tuple[float, float]:
    offsets = torch.arange(MZSR_SIZE, dtype=torch.float64) - MZSR_SIZE // 2
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    difference = found - kernel
    entries = [abs(float((difference * a * b).sum())) for a, b in ((x, x), (x, y), (y, y))]
    return max(entries), float(difference.abs().sum())


if __name__ == "__main__":
    main()
