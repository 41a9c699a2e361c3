"""Verify: from the output alone, proof that nothing was lost on the way and nothing was damaged since."""

import concurrent.futures
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datagen.dataset import (
    SELECTION,
    DatasetError,
    dataset_id,
    read_dataset_json,
    read_removed,
    read_samples,
    read_shards,
    read_table,
    sha256_of_object,
    shard_key,
)
from datagen.progress import Progress
from datagen.remove import remembered
from datagen.scan.inventory import read_inventory
from datagen.select.select import count_verdicts
from infra.storage import NotFoundError, Store

_THREADS = 4  # Hashing releases the interpreter lock, and a bucket answers several requests at once.


class Check(NamedTuple):
    """One thing proved, or the first few reasons why it is not."""

    name: str
    proved: str
    faults: list[str]


def verify(store: Store) -> list[Check]:
    """Run every check on a dataset; it holds when no check has faults.

    Raises:
        DatasetError: there is no dataset to check, or a table that the others are checked against is damaged.
    """
    description = read_dataset_json(store)
    shards, samples = read_shards(store), read_samples(store)
    try:
        selection = read_table(store, SELECTION)
        inventory = read_inventory(store, ["source", "sha256", "verdict"])
        removed = read_removed(store)
    except (NotFoundError, pa.ArrowInvalid, KeyError) as error:
        raise DatasetError(f"{store.uri}: {error}; `python -m datagen build` renews it") from None
    return [
        _check_files(store, description),
        _check_accounting(description, inventory, selection),
        _check_identity(description, shards, samples),
        _check_keys(samples),
        _check_sources(inventory, selection, samples),
        _check_removed(store, removed, samples),
        _check_shards(store, shards, samples),
    ]


def table(checks: list[Check]) -> str:
    """The checks as text, one line each, with up to five faults of each below it."""
    lines = []
    for check in checks:
        lines.append(f"{'FAILED' if check.faults else 'ok':<7}{check.name:<32}{check.proved}")
        lines += [f"         - {fault}" for fault in check.faults[:5]]
        if len(check.faults) > 5:
            lines.append(f"         - and {len(check.faults) - 5} more")
    return "\n".join(lines)


def _check_files(store: Store, description: dict[str, Any]) -> Check:
    files: dict[str, str] = description["files"]

    def fault_of(key: str) -> str | None:
        return _differs(store, key, files[key], "build")

    return Check("tables are unchanged", f"{len(files)} files", list(_faults(fault_of, sorted(files))))


def _check_accounting(description: dict[str, Any], inventory: pa.Table, selection: pa.Table) -> Check:
    counts = count_verdicts(selection)
    rejected, failed = sum(counts["rejected"].values()), sum(counts["failed"].values())
    faults = []
    if inventory.num_rows != counts["kept"] + rejected + failed:
        faults.append(f"{inventory.num_rows} inputs, but {counts['kept']} + {rejected} + {failed} verdicts")
    if inventory.column("source") != selection.column("source"):
        faults.append("inventory and selection do not list the same pictures")
    listed = description["totals"]
    if any(listed[name] != counts[name] for name in ("inputs", "kept", "rejected", "failed")):
        faults.append("dataset.json counts differ from the selection's")
    reasoned = pc.not_equal(pc.fill_null(selection.column("reason"), ""), "")
    if pc.any(pc.equal(reasoned, pc.equal(selection.column("verdict"), "kept"))).as_py():
        faults.append("a picture is rejected without a reason, or kept with one")
    proved = f"{inventory.num_rows} inputs = {counts['kept']} kept + {rejected} rejected + {failed} failed"
    return Check("every input accounted for", proved, faults)


def _check_identity(description: dict[str, Any], shards: pa.Table, samples: pa.Table) -> Check:
    actual = dataset_id(shards, samples)
    faults = [] if actual == description["id"] else [f"dataset.json says {description['id']}, the tables give {actual}"]
    return Check("dataset id", actual[:16], faults)


def _check_keys(samples: pa.Table) -> Check:
    keys = samples.column("key")
    counts = pc.value_counts(keys)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()
    faults = [f"{entry['values']} occurs {entry['counts']} times" for entry in twice]
    dotted = keys.filter(pc.match_substring(keys, ".")).to_pylist()
    faults += [f"{key} holds a dot, at which WebDataset would split it" for key in dotted]
    return Check("keys are unique", f"{len(keys)} keys", faults)


def _check_sources(inventory: pa.Table, selection: pa.Table, samples: pa.Table) -> Check:
    """Every sample is a selected crop of a picture on record, and every selected crop is a sample."""
    names = inventory.column("source").combine_chunks()
    owner = pc.fill_null(pc.index_in(samples.column("source"), value_set=names), -1).to_numpy().astype(np.int64)
    hashes = pc.take(inventory.column("sha256"), pa.array(np.maximum(owner, 0)))
    right = (owner >= 0) & pc.fill_null(pc.equal(hashes, samples.column("source_sha256")), False).to_numpy()
    faults = [
        f"sample {row['key']}: {row['source']} with that sha256 is not in the inventory"
        for row in samples.select(["key", "source"]).filter(pa.array(~right)).to_pylist()
    ]
    kept = selection.filter(pc.equal(selection.column("verdict"), "kept"))
    tiles = kept.column("tiles").combine_chunks()
    holders = pc.index_in(kept.column("source"), value_set=names).to_numpy().astype(np.int64)
    counts = pc.list_value_length(tiles).to_numpy()
    crop = ("x", "y", "width", "height")
    corners = [tiles.flatten().field(name).to_numpy() for name in crop]
    planned = _sorted_rows([np.repeat(holders, counts), *corners])
    packed = _sorted_rows([owner, *(samples.column(name).to_numpy() for name in crop)])
    if not np.array_equal(planned, packed):
        wanted, found = set(map(tuple, planned.tolist())), set(map(tuple, packed.tolist()))
        label = [*names.to_pylist(), "a picture not on record"]
        faults += [
            f"the crop {row[1:]} of {label[row[0]]} is in a shard, but was not selected" for row in found - wanted
        ]
        faults += [f"{label[row[0]]}: the selected crop {row[1:]} is in no shard" for row in wanted - found]
        if found == wanted:
            faults.append(f"{len(packed) - len(planned)} crops are packed more than once")
    proved = f"{len(packed)} crops of {len(np.unique(owner))} pictures"
    return Check("samples and selection agree", proved, sorted(faults))


def _check_removed(store: Store, removed: frozenset[str], samples: pa.Table) -> Check:
    """No sample and no thumbnail of a picture that was taken down is left."""
    hashes = pa.array(sorted(removed), pa.string())
    held = samples.filter(pc.is_in(samples.column("source_sha256"), hashes)).column("key").to_pylist()
    faults = [f"sample {key} is of a picture that was taken down; `python -m datagen pack` drops it" for key in held]
    if removed:
        faults += [
            f"{source}: its thumbnail is still in the inventory; `python -m datagen remove` again takes it out"
            for source in remembered(store, removed)
        ]
    return Check("taken-down pictures gone", f"{len(removed)} on the list", faults)


def _sorted_rows(columns: list[np.ndarray]) -> np.ndarray:
    rows = np.stack([column.astype(np.int64) for column in columns], axis=1)
    return rows[np.lexsort(rows.T[::-1])]


def _check_shards(store: Store, shards: pa.Table, samples: pa.Table) -> Check:
    listed = shards.to_pylist()
    starts = np.cumsum([0, *(shard["samples"] for shard in listed)])
    progress = Progress("verify", len(listed), "shards")

    def fault_of(index: int) -> str | None:
        return _shard_fault(store, listed[index], samples.slice(starts[index], listed[index]["samples"]).to_pylist())

    faults = []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for fault in pool.map(fault_of, range(len(listed))):
            progress.advance(1)
            faults += [fault] if fault else []
    progress.finish()
    there = {entry.key for entry in store.list("shards/")}
    for key in sorted(there - {shard_key(shard["name"]) for shard in listed}):
        faults.append(f"{store.uri}/{key}: in no table; `python -m datagen pack` removes it")
    proved = f"{len(listed)} shards, {samples.num_rows} samples, {sum(s['bytes'] for s in listed) / 1e6:.1f} MB"
    return Check("shards and their members", proved, faults)


def _shard_fault(store: Store, shard: dict[str, Any], rows: list[dict[str, Any]]) -> str | None:
    key = shard_key(shard["name"])
    if fault := _differs(store, key, shard["sha256"], f"pack --shard {shard['name']}"):
        return fault
    data = store.read(key)
    place = f"{store.uri}/{key}"
    if len(data) != shard["bytes"] or {row["shard"] for row in rows} != {shard["name"]}:
        return f"{place}: {len(data)} bytes and {len(rows)} samples listed, shards.parquet says otherwise"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(entry.name, entry.offset_data, entry.size) for entry in tar]
    expected = [
        member
        for row in rows
        for member in (
            (row["member"], row["offset"], row["size"]),
            (f"{row['key']}.json", row["json_offset"], row["json_size"]),
        )
    ]
    if members != expected:
        return f"{place}: its members are not those of samples.parquet"
    for row in rows:
        if hashlib.sha256(data[row["offset"] : row["offset"] + row["size"]]).hexdigest() != row["sha256"]:
            return f"{place}: member {row['member']} does not have its sha256"
        metadata = json.loads(data[row["json_offset"] : row["json_offset"] + row["json_size"]])
        if (metadata["key"], metadata["sha256"], metadata["source"]) != (row["key"], row["sha256"], row["source"]):
            return f"{place}: {row['key']}.json contradicts samples.parquet"
    return None


def _differs(store: Store, key: str, sha256: str, repair: str) -> str | None:
    try:
        if sha256_of_object(store, key) == sha256:
            return None
        found = "damaged (its sha256 differs)"
    except NotFoundError:
        found = "missing"
    return f"{store.uri}/{key}: {found}; `python -m datagen {repair} out={store.uri}` makes it again, and only it"


def _faults(check: Callable[[str], str | None], keys: list[str]) -> Iterator[str]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from (fault for fault in pool.map(check, keys) if fault)
