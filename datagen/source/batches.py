"""The listings of a corpus on record: which pictures the first build had, and which each ``add`` brought."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datagen.dataset import LISTING_FOLDER, write_table
from datagen.source.listing import Member, Picture
from infra.storage import Store

_SPAN = pa.struct([("offset", pa.int64()), ("size", pa.int64())])
LISTING_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("source", "root", "key")),
        ("size", pa.int64()),
        *((name, pa.string()) for name in ("version", "licence", "fault", "container")),
        ("offset", pa.int64()),
        ("text", _SPAN),
        ("json", _SPAN),
    ]
)


def read_batches(store: Store) -> list[list[Picture]]:
    """The pictures of every batch in order; empty when nothing was scanned yet, or the record is unreadable."""
    keys = sorted(entry.key for entry in store.list(f"{LISTING_FOLDER}/"))
    try:
        tables = [pq.read_table(io.BytesIO(store.read(key)), schema=LISTING_SCHEMA) for key in keys]
    except pa.ArrowInvalid:
        return []
    return [[_picture(row) for row in table.to_pylist()] for table in tables]


def write_batches(store: Store, batches: Sequence[Sequence[Picture]]) -> None:
    """Put the listings on record, and take away those of batches that are no more."""
    keys = [f"{LISTING_FOLDER}/batch-{index:04d}.parquet" for index in range(len(batches))]
    for key, pictures in zip(keys, batches):
        write_table(store, key, pa.Table.from_pylist([_row(picture) for picture in pictures], schema=LISTING_SCHEMA))
    for entry in list(store.list(f"{LISTING_FOLDER}/")):
        if entry.key not in keys:
            store.delete(entry.key)


def _row(picture: Picture) -> dict[str, Any]:
    row = dataclasses.asdict(picture)
    member = row.pop("member")
    if member is None:
        return row
    spans = {name: dict(zip(("offset", "size"), member[name])) if member[name] else None for name in ("text", "json")}
    return {**row, "container": member["container"], "offset": member["offset"], **spans}


def _picture(row: dict[str, Any]) -> Picture:
    names = ("source", "root", "key", "size", "version", "licence", "fault")
    member = None
    if row["container"] is not None:
        text, json = (tuple(row[name].values()) if row[name] else None for name in ("text", "json"))
        member = Member(row["container"], row["offset"], text, json)
    return Picture(**{name: row[name] for name in names}, member=member)
