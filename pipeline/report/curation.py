"""Section "Curation": the funnel, and the pictures behind each of its numbers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from datagen.dataset import DATASET, SELECTION, SUMMARY, read_json, read_table
from datagen.scan.inventory import read_inventory
from infra.storage import open_store
from pipeline.report.images import Image, image_of_jpeg

# What a page can show of a large corpus; the rest is counted.
KEPT_SHOWN = 36
SHOWN_A_REASON = 6

_REASONS = {
    "leak": "Leak of an evaluation picture",
    "exact_duplicate": "Exact duplicate",
    "near_duplicate": "Near duplicate",
    "too_small": "Too small",
    "too_elongated": "Too elongated",
    "low_jpeg_quality": "Low JPEG quality",
    "low_bits_per_pixel": "Too few bits a pixel",
    "low_entropy": "Low entropy",
    "blocky": "JPEG blocks",
    "no_good_tile": "No good tile",
    "not_a_picture": "Not a picture",
    "damaged": "Damaged file",
}


@dataclass(frozen=True)
class Entry:
    """One source picture: why it was judged so, and the picture it was found to repeat, if any."""

    name: str
    thumbnail: Image | None
    detail: str
    partner: str = ""
    partner_thumbnail: Image | None = None


@dataclass(frozen=True)
class Group:
    """All pictures with one verdict and reason, the first of them shown."""

    title: str
    reason: str  # as the curation calls it; empty for what was kept
    verdict: str
    count: int
    share: float  # of the inputs
    entries: list[Entry]

    @property
    def hidden(self) -> int:
        """How many are not shown."""
        return self.count - len(self.entries)


@dataclass(frozen=True)
class Curation:
    """The section. ``groups`` are rejections and failures; ``samples``… are 0 until the shards are packed."""

    inputs: int
    kept: Group
    groups: list[Group]
    guard_pictures: int
    dataset_id: str = ""
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    format: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        """Pictures refused by a rule."""
        return sum(group.count for group in self.groups if group.verdict == "rejected")

    @property
    def failed(self) -> int:
        """Files that could not be read as pictures."""
        return sum(group.count for group in self.groups if group.verdict == "failed")

    @property
    def adds_up(self) -> bool:
        """Whether every input is accounted for exactly once, by the run's own summary."""
        return self.inputs == self.kept.count + self.rejected + self.failed


def curation(root: Path) -> Curation | None:
    """Read the selection of stage ``dataset``; None when there is none yet."""
    store = open_store(root / "dataset" / "out")
    if not store.exists(SELECTION):
        return None
    summary = read_json(store, SUMMARY)
    counts = summary["select"]
    selection = read_table(store, SELECTION).to_pylist()
    chosen = _first_of_each(selection)
    thumbnails = _Thumbnails(root)
    kept_rows = chosen.pop(("kept", ""), [])
    inputs = int(counts["inputs"])
    groups = []
    for verdict in ("rejected", "failed"):
        for reason, count in sorted(counts[verdict].items(), key=lambda item: (item[0] != "leak", -item[1])):
            entries = [_entry(row, thumbnails) for row in chosen.get((verdict, reason), [])]
            title = _REASONS.get(reason, reason.replace("_", " ").capitalize())
            groups.append(Group(title, reason, verdict, count, count / max(1, inputs), entries))
    kept_entries = [_entry(row, thumbnails) for row in kept_rows]
    kept = Group("Kept", "", "kept", int(counts["kept"]), counts["kept"] / max(1, inputs), kept_entries)
    dataset = read_json(store, DATASET)
    totals = dataset.get("totals", {})
    return Curation(
        inputs=inputs,
        kept=kept,
        groups=groups,
        guard_pictures=int(counts.get("guard_pictures", 0)),
        dataset_id=str(dataset.get("id", "")),
        samples=int(totals.get("samples", 0)),
        shards=int(totals.get("shards", 0)),
        bytes=int(totals.get("bytes", 0)),
        format=", ".join(f"{n} {kind}" for kind, n in dataset.get("format", {}).get("members", {}).items()),
        facts=_facts(summary),
    )


def _first_of_each(selection: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in selection:
        shown = chosen.setdefault((row["verdict"], row["reason"]), [])
        if len(shown) < (KEPT_SHOWN if row["verdict"] == "kept" else SHOWN_A_REASON):
            shown.append(row)
    return chosen


class _Thumbnails:
    """Thumbnails of the inventory by source, encoded for the page on demand: a corpus has more than a page shows."""

    def __init__(self, root: Path) -> None:
        store = open_store(root / "dataset" / "out")
        self._tables = [read_inventory(store, ["source", "key", "thumbnail"], guard=guard) for guard in (False, True)]
        self._places: dict[str, tuple[pa.Table, int]] = {}
        for table in reversed(self._tables):
            self._places |= {source: (table, i) for i, source in enumerate(table.column("source").to_pylist())}

    def find(self, source: str) -> tuple[str, Image | None]:
        """Name below its source's folder, and thumbnail if the picture could be decoded."""
        if source not in self._places:
            return source, None
        table, row = self._places[source]
        name, data = table.column("key")[row].as_py(), table.column("thumbnail")[row].as_py()
        return name, image_of_jpeg(data, f"Thumbnail of {name}") if data else None


def _entry(row: dict[str, Any], thumbnails: _Thumbnails) -> Entry:
    name, thumbnail = thumbnails.find(row["source"])
    tiles = len(row["tiles"] or [])
    if row["verdict"] == "kept":
        return Entry(name, thumbnail, f"{tiles} tile{'s' if tiles != 1 else ''}")
    if not row["partner"]:
        return Entry(name, thumbnail, (row["detail"] or "").replace("_", " "))
    partner, partner_thumbnail = thumbnails.find(row["partner"])
    if row["reason"] == "exact_duplicate":
        detail = "the same bytes (sha256)"
    else:
        detail = f"{row['distance']} of 64 hash bits differ, correlation {row['correlation']:.4f}"
    return Entry(name, thumbnail, detail, partner, partner_thumbnail)


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    scan, pack, verify = (summary.get(step, {}) for step in ("scan", "pack", "verify"))
    if work := scan.get("work"):
        facts.append(("Scan", f"{work['images']} pictures, {work['megapixels_per_second']:.1f} megapixels/s"))
    if work := pack.get("work"):
        facts.append(("Pack", f"{work['shards']} shards, {work['megabytes_per_second']:.1f} MB/s"))
    if verify:
        faults = verify["faults"]
        facts.append(
            ("Verify", "every shard, sample and count checked: no fault" if not faults else f"{faults} faults")
        )
    if cluster := scan.get("cluster"):
        facts.append(("Ray", f"{cluster.get('CPU', 0):g} CPUs"))
    return facts
