"""Inventories to judge: the demo's, scanned in this process, and tables turned back into a store."""

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa

from datagen.config import DatagenConfig, SourceConfig
from datagen.dataset import INVENTORY, INVENTORY_FOLDER, write_json, write_table
from datagen.scan.inventory import INVENTORY_SCHEMA, SCHEMA_VERSION
from datagen.scan.row import row_of
from datagen.source.listing import list_pictures
from infra.config import load_config
from infra.storage import Store, open_store

DEMO = Path(__file__).parents[3] / "configs" / "datagen" / "demo.yaml"


def demo_config(*overrides: str) -> DatagenConfig:
    return load_config(DatagenConfig, DEMO, ["out=unused", *overrides])


@functools.cache
def demo_inventory(*, guard: bool = False) -> pa.Table:
    """What a scan of the demo's corpus, or of its leak guard, gives; without NIQE, which takes the longest."""
    limits = demo_config().scan.model_copy(update={"min_side": 16, "niqe_patches": 0})
    uri, role = ("embedded:held_out", "guard") if guard else ("embedded:pictures", "source")
    rows = [row_of(picture, limits, 0) for picture in list_pictures([SourceConfig(uri=uri)], role)[0]]
    return pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA)


def edited(table: pa.Table, *edits: dict[str, Any]) -> pa.Table:
    """One row a change, ``{"row": file name, column: value}``: the row of that name, with these values."""
    rows = {row["key"]: row for row in table.to_pylist()}
    return pa.Table.from_pylist([{**rows[edit["row"]], **edit} for edit in edits], schema=INVENTORY_SCHEMA)


def store_of(folder: Path, inventory: pa.Table, guard: pa.Table | None = None, rows_per_part: int = 5) -> Store:
    """A store that holds these inventories, cut into parts."""
    store = open_store(folder)
    parts: dict[str, list[dict[str, Any]]] = {"parts": [], "guard_parts": []}
    for name, table in (("parts", inventory), ("guard_parts", guard)):
        for start in range(0, 0 if table is None else table.num_rows, rows_per_part):
            assert table is not None
            part = table.slice(start, rows_per_part)
            key = f"{INVENTORY_FOLDER}/{name}-{start:06d}.parquet"
            sha256 = write_table(store, key, part)
            parts[name].append({"key": key, "rows": part.num_rows, "sha256": sha256, "batch": 0})
    write_json(store, INVENTORY, {"schema_version": SCHEMA_VERSION, "inputs": inventory.num_rows, **parts})
    return store
