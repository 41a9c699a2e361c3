"""What goes into which shard, decided before any pixel is read.

Pictures come in an order seeded by (seed, sha256 of the file), their tiles are dealt evenly to the shards in that
order, and the order inside a shard is seeded again by the sample's key. So any shard is a fair sample of its batch,
while the tiles of a picture stay in one shard (two at a border): it is decoded once, and taking it down touches one.

Batches are dealt one after the other, so that what `add` brings changes no shard that is there. A picture taken down
is dealt as if it were still there and then left out, so that only its own shards change.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datagen.config import DatagenConfig, PackConfig
from datagen.dataset import PACK_FOLDER, SELECTION, DatasetError, canonical_json, read_table
from datagen.scan.inventory import read_manifest, read_part
from datagen.select.tiles import Box
from datagen.source.listing import Member, Picture
from infra.storage import NotFoundError, Store

# Part of every shard's fingerprint: raise it when the same plan gives other bytes, and shards are packed again.
FORMAT_VERSION = 2
# What a photograph costs as PNG; measured on 512x512 crops.
_PNG_BITS_PER_PIXEL = 15.0
_DIGESTS_AT_A_TIME = 65536  # as Python objects they are several times as large

_INVENTORY_COLUMNS = [
    *("source", "root", "key", "container", "offset", "bytes", "version", "licence", "caption", "sha256"),
    *("format", "bits_per_pixel", "conversions"),
]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One planned sample: a crop of a picture."""

    key: str
    source: str
    source_sha256: str
    licence: str
    caption: str | None
    conversions: tuple[str, ...]
    box: Box


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard as a Ray task builds it. ``pictures``: the files that its samples are cut from, by source."""

    name: str
    samples: tuple[Sample, ...]
    pictures: dict[str, Picture]
    max_pixels: int
    settings: PackConfig
    store: Store

    @property
    def fingerprint(self) -> str:
        """Changes when the shard's bytes may."""
        samples = [dataclasses.asdict(sample) for sample in self.samples]
        identity = [FORMAT_VERSION, self.settings.crop, self.settings.png_compression, samples]
        return hashlib.sha256(canonical_json(identity)).hexdigest()

    @property
    def sidecar(self) -> str:
        """Store key of the shard's share of samples.parquet: the marker that the shard is finished."""
        return sidecar_key(self.name)


class Share(NamedTuple):
    """The samples of one shard, as positions in the plan's sample arrays."""

    name: str
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """The content of every shard, as arrays over the pictures ``[P]`` and their samples ``[S]``.

    ``pictures``: inventory columns of the pictures that have samples. ``owner``: int64 ``[S]``, the picture of each
    sample; ``boxes``: int32 ``[S, 4]`` x, y, width, height. Taken-down samples are in no share.
    """

    pictures: pa.Table
    owner: np.ndarray
    boxes: np.ndarray
    shares: tuple[Share, ...]
    config: DatagenConfig
    store: Store

    @property
    def names(self) -> list[str]:
        """Shard names in order."""
        return [share.name for share in self.shares]

    @property
    def count(self) -> int:
        """Samples in all shards."""
        return sum(len(share.samples) for share in self.shares)

    def shards(self, names: Sequence[str] | None = None) -> Iterator[ShardPlan]:
        """The plan of each shard, or of some, one at a time."""
        for share in self.shares:
            if names is None or share.name in names:
                yield self._shard(share)

    def _shard(self, share: Share) -> ShardPlan:
        owners = self.owner[share.samples]
        needed, places = np.unique(owners, return_inverse=True)
        rows = self.pictures.take(pa.array(needed)).to_pylist()
        samples = [
            _sample(rows[place], Box(*box)) for place, box in zip(places.tolist(), self.boxes[share.samples].tolist())
        ]
        samples.sort(key=lambda sample: shuffle_key(self.config.seed, sample.key))
        return ShardPlan(
            name=share.name,
            samples=tuple(samples),
            pictures={row["source"]: _picture(row) for row in rows},
            max_pixels=round(self.config.scan.max_megapixels * 1e6),
            settings=self.config.pack,
            store=self.store,
        )


def plan_shards(config: DatagenConfig, store: Store) -> Plan:
    """Every shard's content, from selection and inventory alone.

    Raises:
        DatasetError: there is no selection of this inventory, or nothing was kept.
    """
    try:
        selection = read_table(store, SELECTION, ["source", "verdict", "batch", "tiles"])
    except NotFoundError:
        raise DatasetError(f"{store.uri}: no selection; `python -m datagen select` makes it") from None
    tiles = selection.column("tiles").combine_chunks()
    counts = pc.fill_null(pc.list_value_length(tiles), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    dealt = np.flatnonzero(counts)
    if not len(dealt):
        raise DatasetError(f"{store.uri}: no picture was kept; {SELECTION} says why, thresholds are in the config")
    flat = tiles.flatten()
    names = ("x", "y", "width", "height")
    boxes = np.stack([flat.field(name).to_numpy(zero_copy_only=False) for name in names], axis=1)
    first = np.cumsum(counts) - counts
    pictures = _pictures(store, selection.column("source"), dealt)
    batch = selection.column("batch").to_numpy()[dealt]
    kept = pc.equal(selection.column("verdict"), "kept").to_numpy()[dealt]
    order = _picture_order(pictures, batch, config.seed)
    owner = np.repeat(order, counts[dealt][order])
    # Position of each dealt sample in `boxes`: its picture's first, and on from there.
    run = np.arange(len(owner)) - np.repeat(
        np.cumsum(counts[dealt][order]) - counts[dealt][order], counts[dealt][order]
    )
    boxes = boxes[first[dealt][owner] + run]
    shares: list[Share] = []
    for number in np.unique(batch):
        samples = np.flatnonzero(batch[owner] == number)
        weights = _weights(pictures, owner[samples], boxes[samples], config.pack)
        for part in _deal(samples, weights, config.pack):
            name = f"ird-{len(shares):06d}.tar"
            shares.append(Share(name, part[kept[owner[part]]]))
    full = tuple(share for share in shares if len(share.samples))
    if not full:
        raise DatasetError(f"{store.uri}: every picture was taken down, nothing is left to pack")
    return Plan(pictures, owner, boxes, full, config, store)


def plan_identity(config: DatagenConfig, store: Store) -> str:
    """Changes whenever some shard may: a hash over what the plan is made from."""
    parts = [part["sha256"] for part in read_manifest(store)["parts"]]
    selection = hashlib.sha256(store.read(SELECTION)).hexdigest()
    settings = config.pack.model_dump(mode="json")
    return hashlib.sha256(canonical_json([FORMAT_VERSION, config.seed, settings, selection, parts])).hexdigest()


def sidecar_key(name: str) -> str:
    """Store key of a shard's share of samples.parquet."""
    return f"{PACK_FOLDER}/{name.removesuffix('.tar')}.parquet"


def shuffle_key(seed: int, content: str) -> bytes:
    """What samples and pictures are ordered by."""
    return hashlib.sha256(f"{seed}:{content}".encode()).digest()


def _pictures(store: Store, sources: pa.ChunkedArray, dealt: np.ndarray) -> pa.Table:
    """Inventory columns of the rows ``dealt``, int64, ascending; ``sources``: what the selection has for all rows.

    In one piece, because rows of a column in pieces are found by putting it together anew each time; and never twice,
    because it is most of the memory that a plan takes.
    """
    pieces: dict[str, list[pa.Array]] = {name: [] for name in _INVENTORY_COLUMNS}
    first = 0
    for part in read_manifest(store)["parts"]:
        rows = read_part(store, part["key"], _INVENTORY_COLUMNS)
        end = first + rows.num_rows
        if sources.slice(first, rows.num_rows) != rows.column("source"):
            break
        here = dealt[np.searchsorted(dealt, first) : np.searchsorted(dealt, end)] - first
        for name, column in zip(_INVENTORY_COLUMNS, rows.take(pa.array(here)).columns):
            pieces[name] += column.chunks
        first = end
    else:
        if first == len(sources):
            return pa.table({name: pa.concat_arrays(pieces.pop(name)) for name in _INVENTORY_COLUMNS})
    raise DatasetError(f"{store.uri}/{SELECTION}: not of this inventory; `python -m datagen select` renews it")


def _picture_order(pictures: pa.Table, batch: np.ndarray, seed: int) -> np.ndarray:
    # numpy compares fixed-size bytes like strings and would drop trailing zeros; big-endian numbers sort as the digest.
    words = np.empty((pictures.num_rows, 4), dtype=">u8")
    for first in range(0, len(words), _DIGESTS_AT_A_TIME):
        some = pictures.column("sha256").slice(first, _DIGESTS_AT_A_TIME).to_pylist()
        digests = b"".join(shuffle_key(seed, sha256) for sha256 in some)
        words[first : first + len(some)] = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    return np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0], batch))


def _weights(pictures: pa.Table, owner: np.ndarray, boxes: np.ndarray, config: PackConfig) -> np.ndarray:
    """What each sample takes of a shard: 1, or its estimated bytes."""
    if config.bytes_per_shard is None:
        return np.ones(len(owner))
    bits = pictures.column("bits_per_pixel").to_numpy().astype(np.float64)
    jpeg = pc.is_in(pictures.column("format"), pa.array(["JPEG", "MPO"])).to_numpy()
    if config.crop == "png":
        bits = np.where(jpeg, np.maximum(bits, _PNG_BITS_PER_PIXEL), bits)
    return bits[owner] * boxes[:, 2] * boxes[:, 3] / 8


def _deal(samples: np.ndarray, weights: np.ndarray, config: PackConfig) -> list[np.ndarray]:
    limit = config.bytes_per_shard or config.samples_per_shard
    ends = np.cumsum(weights)
    count = max(1, int(np.ceil(ends[-1] / limit)))
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right")
    return [part for part in np.split(samples, edges) if len(part)]


def _sample(row: dict[str, Any], box: Box) -> Sample:
    return Sample(
        key="-".join([row["sha256"][:20], *(str(value) for value in box)]),
        source=row["source"],
        source_sha256=row["sha256"],
        licence=row["licence"],
        caption=row["caption"],
        conversions=tuple(row["conversions"]),
        box=box,
    )


def _picture(row: dict[str, Any]) -> Picture:
    member = None if row["container"] is None else Member(row["container"], row["offset"])
    names = ("source", "root", "key", "version", "licence")
    return Picture(**{name: row[name] for name in names}, size=row["bytes"], member=member)
