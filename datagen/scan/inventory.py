"""The inventory: one row a picture, in parquet parts that tasks publish one by one, and a manifest that lists them."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datagen.dataset import INVENTORY, INVENTORY_FOLDER, DatasetError, read_json, write_json
from datagen.picture.quality import WHOLE_PICTURE_MEASURES
from infra.storage import Store

# Part of every part's fingerprint: raise it when a row's meaning changes, and old parts are scanned again.
SCHEMA_VERSION = 2

INVENTORY_SCHEMA = pa.schema(
    [
        ("source", pa.string()),  # <source name>/<key>
        ("root", pa.string()),  # uri of the source; root/key is the file
        ("key", pa.string()),
        ("container", pa.string()),  # key of the tar that the picture is a member of; else null
        ("offset", pa.int64()),  # of the member's data in it
        ("licence", pa.string()),
        ("caption", pa.string()),  # what came along in a tar: <key>.txt, or "caption" of <key>.json
        ("fields", pa.string()),  # <key>.json, as canonical JSON
        ("batch", pa.int32()),  # 0 is the first build; each `add` is one more, and leaves the shards of those before
        ("bytes", pa.int64()),
        ("version", pa.string()),  # etag, or modification time in ns
        ("sha256", pa.string()),  # of the file's bytes
        ("pixel_sha256", pa.string()),  # of the upright sRGB pixels, uint8, row by row
        ("verdict", pa.string()),  # measured | rejected (by rule) | failed (damage)
        ("stage", pa.string()),  # how far it came: read | header | decode | measure
        ("reason", pa.string()),  # empty when measured
        ("error", pa.string()),
        ("format", pa.string()),
        ("width", pa.int32()),  # of the upright picture, pixels
        ("height", pa.int32()),
        ("mode", pa.string()),  # colour mode as stored
        ("jpeg_quality", pa.int32()),  # IJG equivalent; null unless JPEG
        ("subsampling", pa.string()),
        ("bits_per_pixel", pa.float32()),  # of the file
        ("conversions", pa.list_(pa.string())),
        *((name, pa.float32()) for name in WHOLE_PICTURE_MEASURES),  # datagen.picture.quality.measure
        ("niqe", pa.float32()),  # datagen.picture.niqe.niqe; null when not measured
        ("scores", pa.map_(pa.string(), pa.float32())),  # learned scores of the user's own, scan.scores
        # The quality map: every measure by cell of quality.CELL pixels, row by row.
        *((f"cell_{name}", pa.list_(pa.float32())) for name in WHOLE_PICTURE_MEASURES),
        ("phash", pa.list_(pa.uint64())),  # eight, by orientation; fixed-size lists do not survive parquet with nulls
        ("center_phash", pa.uint64()),  # upright, of the central window of half the width and height
        ("grey_thumb", pa.binary()),  # 32x32 luma, row by row; null once taken down
        ("thumbnail", pa.binary()),  # JPEG, at most 160 pixels a side; null once taken down
    ]
)

# What of a row shows the picture, or was said about it: it goes when a picture is taken down.
REMEMBERING = ("grey_thumb", "thumbnail", "caption", "fields")


def forget(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a picture that was taken down."""
    return {**row, **dict.fromkeys(REMEMBERING)}


def read_manifest(store: Store) -> dict[str, Any]:
    """``{"schema_version", "parts": [{"key", "rows", "sha256", "batch"}], "guard_parts": […], "inputs", …}``.

    Raises:
        DatasetError: nothing was scanned here yet, or by a version with other columns.
    """
    manifest = read_json(store, INVENTORY)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = "an inventory of another version" if manifest else "no inventory"
        raise DatasetError(f"{store.uri}: {found}; `python -m datagen scan` makes it")
    return manifest


def write_manifest(store: Store, manifest: dict[str, Any]) -> None:
    """Say which parts count, and take away all others."""
    write_json(store, INVENTORY, manifest)
    wanted = {part["key"] for part in [*manifest["parts"], *manifest["guard_parts"]]}
    for key in [entry.key for entry in store.list(f"{INVENTORY_FOLDER}/") if entry.key not in wanted]:
        store.delete(key)


def read_inventory(store: Store, columns: Sequence[str], *, guard: bool = False) -> pa.Table:
    """The inventory of the corpus, or of the leak guard, in the order of the listing, batch after batch.

    Raises:
        DatasetError: nothing was scanned here yet.
    """
    schema = pa.schema([INVENTORY_SCHEMA.field(name) for name in columns])
    parts = read_manifest(store)["guard_parts" if guard else "parts"]
    tables = [read_part(store, part["key"], columns) for part in parts]
    return pa.concat_tables([schema.empty_table(), *tables])


def read_rows(store: Store, columns: Sequence[str], indices: np.ndarray, *, guard: bool = False) -> pa.Table:
    """Some columns of some rows, int64 ``[K]`` positions in the inventory, in the order asked for.

    Only the parts that hold them are read, one at a time: for the few rows whose thumbnails are needed.
    """
    parts = read_manifest(store)["guard_parts" if guard else "parts"]
    edges = np.cumsum([0, *(part["rows"] for part in parts)])
    order = np.argsort(indices, kind="stable")
    ascending = indices[order]
    cuts = np.searchsorted(ascending, edges)
    found = [pa.schema([INVENTORY_SCHEMA.field(name) for name in columns]).empty_table()]
    for part, edge, first, last in zip(parts, edges, cuts, cuts[1:]):
        if first < last:
            found.append(read_part(store, part["key"], columns).take(pa.array(ascending[first:last] - edge)))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return pa.concat_tables(found).take(pa.array(places))


def read_part(store: Store, key: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One part of the inventory, or some columns of it.

    Raises:
        NotFoundError, StorageError: it is gone, or the store is away.
        DatasetError: it is damaged.
    """
    data = store.read(key)
    try:
        return pq.read_table(io.BytesIO(data), columns=None if columns is None else list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        again = "`python -m datagen scan` makes it again"
        raise DatasetError(f"{store.uri}/{key}: damaged ({error}); {again}") from None
