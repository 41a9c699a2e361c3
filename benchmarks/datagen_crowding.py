"""How closely perceptual hashes crowd by chance: near pairs among all pairs of pictures that have nothing in common.

    IRD_REAL_DATA=… python -m benchmarks.datagen_crowding [--pictures DIR] [--inventory DIR]

The cost of ``datagen select`` grows with it, so that a simulated corpus says something of a real one only if it is
alike. Looked at are random crops of the photographs of a folder, pairs of one photograph left out; and with
``--inventory`` the rows of one that ``benchmarks/datagen_select.py --folder DIR`` left, without what it planted.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.datagen_neighbours import crop_coefficients, hashes_of, photographs
from datagen.dataset import INVENTORY_FOLDER
from datagen.picture.perceptual_hash import ORIENTATIONS
from datagen.select.neighbours import near_pairs_among

RADIUS = 6  # bits, as ``select.duplicate_radius``


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", default=os.environ.get("IRD_REAL_DATA", ""), help="a folder of photographs")
    parser.add_argument("--crops", type=int, default=100, help="of each photograph")
    parser.add_argument("--inventory", type=Path, help="the folder of one simulated corpus")
    parser.add_argument("--rows", type=int, default=200_000, help="of the inventory, at most")
    arguments = parser.parse_args()
    pictures = photographs(arguments.pictures)
    random = np.random.default_rng(0)
    crops = [hashes_of(crop_coefficients([picture], arguments.crops, random)) for picture in pictures]
    owners = np.repeat(np.arange(len(pictures)), arguments.crops)
    _report(f"{arguments.crops} crops of {len(pictures)} photographs", np.concatenate(crops), owners)
    if arguments.inventory:
        hashes, planted = _simulated(arguments.inventory, arguments.rows)
        kept = np.flatnonzero(~planted)
        _report(f"{len(kept):,} rows of {arguments.inventory}", hashes[kept], np.arange(len(kept)))


def _report(what: str, hashes: np.ndarray, owners: np.ndarray) -> None:
    """Print how many pairs of different owners lie within the radius, of a thousand million."""
    representatives, pairs = near_pairs_among(hashes, RADIUS)
    alike = np.flatnonzero(representatives != np.arange(len(hashes)))
    first = np.concatenate([pairs[:, 0], representatives[alike]])
    second = np.concatenate([pairs[:, 1], alike])
    near = int((owners[first] != owners[second]).sum())
    sizes = np.bincount(owners)
    chances = (len(owners) ** 2 - int((sizes.astype(np.int64) ** 2).sum())) // 2
    print(f"{what}: {near:,} of {chances:,} pairs within {RADIUS} bits, {near / chances * 1e9:.1f} of 10^9")


def _simulated(folder: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 [N, 8] of the first rows, and whether anything was planted on or from each."""
    hashes: list[np.ndarray] = []
    for part in sorted((folder / INVENTORY_FOLDER).glob("[0-9]*.parquet")):
        column = pq.read_table(part, columns=["phash"]).column(0).combine_chunks()
        hashes.append(column.flatten().to_numpy().astype(np.uint64).reshape(-1, ORIENTATIONS))
        if sum(map(len, hashes)) >= rows:
            break
    found = np.concatenate(hashes)[:rows]
    planted = np.zeros(len(found), dtype=bool)
    for pairs in np.load(folder / "planted.npz").values():
        planted[pairs[pairs < len(found)]] = True
    return found, planted


if __name__ == "__main__":
    main()
