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
    measured = [measure_picture(data, limits) for data in pictures.values()]
    schema = pa.schema([INVENTORY_SCHEMA.field(name) for name in _GUARD])
    guard = pa.Table.from_pylist([{name: row.get(name) for name in _GUARD} for row in measured], schema)

    def thumbnails(indices: np.ndarray) -> list[bytes | None]:
        return read_rows(store, ["thumbnail"], rows[indices]).column("thumbnail").to_pylist()

    upright = held.column("phash").combine_chunks().flatten().to_numpy().reshape(len(rows), -1)[:, 0]
    # No hash of a picture has all its bits set, so this one is near none.
    centres = pc.fill_null(held.column("center_phash"), 2**64 - 1).to_numpy()
    found = find_leaks(np.ascontiguousarray(upright), centres, thumbnails, guard, select)
    names, sources = list(pictures), held.column("source").to_pylist()
    return sorted(Exposure(names[m.guard], sources[m.row], m.how, m.correlation) for m in found)
