"""Which evaluation pictures a finished dataset shows: the leak guard, run backwards from a dataset that is there."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datagen.config import ScanConfig, SelectConfig
from datagen.dataset import read_samples
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory, read_rows
from datagen.scan.row import measure_picture
from datagen.select.leaks import find_leaks
from infra.storage import Store

_GUARD = ["verdict", "phash", "thumbnail"]


class Exposure(NamedTuple):
    """An evaluation picture that a dataset shows."""

    name: str
    source: str  # of the picture in the dataset
    how: str  # "copy", "crop of …"
    correlation: float


def exposed(store: Store, pictures: Mapping[str, bytes], select: SelectConfig) -> list[Exposure]:
    """Those of ``pictures`` (encoded files by name) that samples of the dataset in ``store`` were cut from, by name.

    Copies and crops are found as ``datagen.select.leaks`` does, under the thresholds of ``select``; only pictures that
    were packed count, since what the guard kept out was not trained on.

    Raises:
        DatasetError: there is no finished dataset, or it came without its inventory (``curation/``).
    """
    packed = pc.unique(read_samples(store).column("source"))
    corpus = read_inventory(store, ["source", "phash", "center_phash"])
    rows = np.flatnonzero(pc.is_in(corpus.column("source"), packed).to_numpy(zero_copy_only=False))
    held = corpus.take(pa.array(rows))
    limits = ScanConfig()
    measured = {name: measure_picture(data, limits) for name, data in pictures.items()}
    schema = pa.schema([INVENTORY_SCHEMA.field(name) for name in _GUARD])

    def thumbnails(indices: np.ndarray) -> list[bytes | None]:
        return read_rows(store, ["thumbnail"], rows[indices]).column("thumbnail").to_pylist()

    upright = held.column("phash").combine_chunks().flatten().to_numpy().reshape(len(rows), -1)[:, 0]
    # No hash of a picture has all its bits set, so this one is near none.
    centres = pc.fill_null(held.column("center_phash"), 2**64 - 1).to_numpy()
    sources = held.column("source").to_pylist()
    found: list[Exposure] = []
    names = list(pictures)
    while names:  # a picture of the dataset is matched with one of them; others that it shows come in the next round
        guard = pa.Table.from_pylist([{key: measured[name].get(key) for key in _GUARD} for name in names], schema)
        matches = find_leaks(np.ascontiguousarray(upright), centres, thumbnails, guard, select)
        if not matches:
            break
        found += [Exposure(names[match.guard], sources[match.row], match.how, match.correlation) for match in matches]
        matched = {match.guard for match in matches}
        names = [name for number, name in enumerate(names) if number not in matched]
    return sorted(found)
