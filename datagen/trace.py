"""Trace: from a picture to what became of it, and to the samples and shards that hold it."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datagen.dataset import DATASET, SELECTION, read_dataset_json, read_samples, read_table
from datagen.picture.decode import PictureError, decode, read_header
from datagen.picture.perceptual_hash import grey_thumb, hashes
from datagen.picture.quality import luma
from datagen.scan.inventory import read_inventory
from infra.storage import Store

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAMPLE_KEY = re.compile(r"([0-9a-f]{20})(-\d+){4}")
_COLUMNS = ["source", "root", "key", "sha256", "pixel_sha256", "licence", "batch"]
# Bits of 64 within which a picture that is in the corpus under another name is still recognised.
_NEAR = 6


def read_names(store: Store) -> pa.Table:
    """By what pictures of the inventory can be named: the columns that :func:`find_pictures` looks in."""
    return read_inventory(store, _COLUMNS)


def find_pictures(inventory: pa.Table, target: str) -> pa.Table:
    """The rows of the pictures that ``target`` names exactly.

    Args:
        inventory: from :func:`read_names`.
        target: a uri or path, a source name (``source-0/a.jpg``), the sha256 of a file or of its pixels, a sample key,
            or the path of a local file, which is found by its content under whatever name.
    """
    if _SHA256.fullmatch(target):
        names = ("sha256", "pixel_sha256")
        return inventory.filter(
            pc.or_(*(pc.fill_null(pc.equal(inventory.column(name), target), False) for name in names))
        )
    if match := _SAMPLE_KEY.fullmatch(target):
        return inventory.filter(pc.fill_null(pc.starts_with(inventory.column("sha256"), match[1]), False))
    uris = pc.binary_join_element_wise(inventory.column("root"), inventory.column("key"), "/")
    named = {target, str(Path(target).expanduser().absolute())}
    by_name = pc.or_(pc.is_in(uris, pa.array(sorted(named))), pc.equal(inventory.column("source"), target))
    if pc.any(by_name).as_py() or not Path(target).is_file():
        return inventory.filter(by_name)
    sha256 = hashlib.sha256(Path(target).read_bytes()).hexdigest()
    return inventory.filter(pc.fill_null(pc.equal(inventory.column("sha256"), sha256), False))


def trace(store: Store, targets: Sequence[str]) -> tuple[str, bool]:
    """What became of each target, as text, and whether all were found.

    A local file that is in the corpus neither by name nor by content is looked for by its perceptual hash.
    """
    lines: list[str] = []
    everything = True
    inventory = read_names(store)
    for target in targets:
        found = find_pictures(inventory, target)
        described = _describe(store, found)
        if not found.num_rows:
            described = [f"  like {near}" for near in _near(store, target)]
            everything &= bool(described)
        lines += [target, *(described or [f"  not in this corpus{did_you_mean(inventory, target)}"])]
    return "\n".join(lines), everything


def did_you_mean(inventory: pa.Table, target: str) -> str:
    """What to add to the refusal of a target: the pictures, a few at most, whose file has that name; or nothing."""
    sources, name = inventory.column("source"), target.rstrip("/").rpartition("/")[2]
    like = sources.filter(pc.ends_with(sources, f"/{name}")).to_pylist()[:3]
    return f" under that name; did you mean {' or '.join(like)}?" if like else ""


def _describe(store: Store, found: pa.Table) -> list[str]:
    if not found.num_rows:
        return []
    verdicts = _by_source(read_table(store, SELECTION), found) if store.exists(SELECTION) else {}
    samples: dict[str, list[dict[str, Any]]] = {}
    dataset = ""
    if store.exists(DATASET):
        dataset = read_dataset_json(store)["id"]
        held = read_samples(store)
        for row in held.filter(pc.is_in(held.column("source"), found.column("source"))).to_pylist():
            samples.setdefault(row["source"], []).append(row)
    lines = []
    for row in found.to_pylist():
        verdict = verdicts.get(row["source"], {})
        reason = (
            f" ({verdict['reason']}: {verdict['partner'] or verdict['detail'] or ''})" if verdict.get("reason") else ""
        )
        lines += [
            f"  {row['source']}  {verdict.get('verdict', 'not judged')}{reason}",
            f"    file     {row['root']}/{row['key']}",
            f"    sha256   {row['sha256']}",
            f"    licence  {row['licence'] or 'not given'}",
        ]
        if samples.get(row["source"]):
            lines.append(f"    dataset  {dataset}  {store.uri}")
        lines += [
            f"    sample   {sample['key']}  in shards/{sample['shard']}, bytes {sample['offset']} to "
            f"{sample['offset'] + sample['size']}"
            for sample in samples.get(row["source"], [])
        ]
    return lines


def _by_source(selection: pa.Table, found: pa.Table) -> dict[str, dict[str, Any]]:
    rows = selection.filter(pc.is_in(selection.column("source"), found.column("source")))
    return {row["source"]: row for row in rows.drop_columns(["tiles"]).to_pylist()}


def _near(store: Store, target: str) -> list[str]:
    """Corpus pictures within a few bits of a local picture, in any orientation, nearest first."""
    if not Path(target).is_file():
        return []
    data = Path(target).read_bytes()
    try:
        pixels, _ = decode(data, read_header(data, 178_000_000))
    except PictureError:
        return []
    inventory = read_inventory(store, ["source", "phash"])
    inventory = inventory.filter(pc.is_valid(inventory.column("phash")))
    corpus = inventory.column("phash").combine_chunks().flatten().to_numpy().reshape(-1, 8)[:, 0]
    query = hashes(grey_thumb(luma(pixels)))
    distance = np.bitwise_count(corpus[:, None] ^ query[None]).min(axis=1)
    names = inventory.column("source")
    return [
        f"{names[i].as_py()} ({distance[i]} of 64 bits)"
        for i in np.argsort(distance, kind="stable")
        if distance[i] <= _NEAR
    ][:20]
