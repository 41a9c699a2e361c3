"""Take-down: a picture and its copies leave the shards, and nothing from which they could be seen stays behind.

The list of what was taken down (sha256 and name, no pixels) is part of the dataset. Rows on it keep their hash and
measures, so that the other pictures stay dealt to shards as they were and copies found later are still refused, but
lose thumbnails, caption and fields.
"""

import hashlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from datagen.dataset import (
    REMOVED,
    SELECTION,
    DatasetError,
    canonical_json,
    read_removed,
    read_table,
    read_take_downs,
    write_json,
    write_table,
)
from datagen.scan.inventory import INVENTORY_SCHEMA, REMEMBERING, forget, read_manifest, read_part, write_manifest
from datagen.trace import did_you_mean, find_pictures, read_names
from infra.storage import Store


def take_down(store: Store, targets: Sequence[str], note: str) -> list[str]:
    """Put pictures, and every copy of them that the selection knows, on the list, and strip their inventory rows.

    Select and pack then rewrite the shards concerned. Safe to repeat after an interruption.

    Args:
        targets: what :func:`datagen.trace.find_pictures` takes.
        note: why, for the record.

    Returns:
        the sources taken down, new ones and those that were on the list already.

    Raises:
        DatasetError: a target is not a picture of this corpus; then nothing was changed.
    """
    sources: dict[str, str] = {}
    inventory = read_names(store)
    for target in targets:
        found = find_pictures(inventory, target)
        if not found.num_rows:
            hint = did_you_mean(inventory, target)
            raise DatasetError(f"{store.uri}: {target!r} is no picture of this corpus{hint}; nothing was taken down")
        sources |= dict(zip(found.column("source").to_pylist(), found.column("sha256").to_pylist()))
    if None in sources.values():
        unread = [source for source, sha256 in sources.items() if sha256 is None]
        raise DatasetError(f"{store.uri}: {unread[0]} was never read, so no sample holds it; nothing was taken down")
    copies, dealt = _as_judged(store, list(sources))
    listed = {picture["source"]: picture for picture in read_take_downs(store)}
    for source, sha256 in {**sources, **copies}.items():
        # Whether its tiles were dealt to shards must outlive its thumbnails, from which that was judged.
        entry = {"sha256": sha256, "source": source, "note": note, "dealt": source in dealt}
        listed.setdefault(source, entry)
    write_json(store, REMOVED, {"pictures": [listed[source] for source in sorted(listed)]})
    _strip(store, read_removed(store))
    return sorted({**sources, **copies})


def remembered(store: Store, removed: frozenset[str]) -> list[str]:
    """Sources on the list whose inventory row still shows the picture."""
    parts = read_manifest(store)["parts"]
    tables = [read_part(store, part["key"], ["source", "sha256", *REMEMBERING]) for part in parts]
    return [source for table in tables for source in _showing(table, removed).column("source").to_pylist()]


def _showing(table: pa.Table, removed: frozenset[str]) -> pa.Table:
    listed = table.filter(pc.is_in(table.column("sha256"), pa.array(sorted(removed), pa.string())))
    shows = pa.array([False] * listed.num_rows, pa.bool_())
    for name in REMEMBERING:
        shows = pc.or_(shows, pc.is_valid(listed.column(name)))
    return listed.filter(shows)


def _as_judged(store: Store, sources: list[str]) -> tuple[dict[str, str], set[str]]:
    """Of the last selection: the copies refused in favour of ``sources``, with their sha256, and the pictures kept."""
    if not store.exists(SELECTION):
        return {}, set()
    selection = read_table(store, SELECTION, ["source", "sha256", "verdict", "reason", "partner"])
    duplicate = pc.is_in(selection.column("reason"), pa.array(["exact_duplicate", "near_duplicate"]))
    of_these = pc.is_in(selection.column("partner"), pa.array(sources, pa.string()))
    copies = selection.filter(pc.and_(duplicate, of_these))
    kept = selection.filter(pc.equal(selection.column("verdict"), "kept")).column("source")
    dealt = set(kept.filter(pc.is_in(kept, pa.array(sources, pa.string()))).to_pylist())
    return dict(zip(copies.column("source").to_pylist(), copies.column("sha256").to_pylist())), dealt


def _strip(store: Store, removed: frozenset[str]) -> None:
    """Write the parts concerned anew beside the old ones; the manifest then names them in one step."""
    manifest = read_manifest(store)
    mark = hashlib.sha256(canonical_json(sorted(removed))).hexdigest()[:12]
    for part in [*manifest["parts"], *manifest["guard_parts"]]:
        table = read_part(store, part["key"])
        if _showing(table, removed).num_rows:
            rows = [forget(row) if row["sha256"] in removed else row for row in table.to_pylist()]
            part["key"] = f"{part['piece'].removesuffix('.parquet')}-{mark}.parquet"
            part["sha256"] = write_table(store, part["key"], pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA))
    write_manifest(store, manifest)
