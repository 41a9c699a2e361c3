"""Contact sheets: the thumbnails of the pictures to show, as many as the page has room for."""

import base64
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg

from datagen.report.corpus import Corpus, Outcome, Shown
from datagen.report.funnel import position
from datagen.report.words import plural, reason_meaning, reason_title
from datagen.scan.inventory import read_inventory, read_rows
from infra.storage import Store

# Characters of all pictures of a page together; with all else it stays below 5 MB.
_ROOM = 3_800_000


class Image(NamedTuple):
    """A JPEG inside the page, its size in pixels, and what it says to those who cannot see it."""

    uri: str
    width: int
    height: int
    alt: str


class Entry(NamedTuple):
    """A picture with what is said of it, and beside it the one that it repeats, if any.

    ``partner`` is empty when there is none, or when it was taken down.
    """

    name: str
    image: Image | None
    detail: str
    partner: str
    partner_image: Image | None


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Pictures with one verdict and reason; ``count`` is how many there are, ``entries`` those shown."""

    verdict: str
    reason: str
    title: str
    meaning: str
    count: int
    entries: list[Entry]
    paired: bool

    @property
    def hidden(self) -> int:
        """How many are not shown."""
        return self.count - len(self.entries)


def sheets(corpus: Corpus, store: Store) -> list[Sheet]:
    """A sheet for every verdict and reason, in the order of the funnel; none for what was taken down."""
    order = sorted((outcome for outcome in corpus.shown if outcome[1] != "removed"), key=lambda of: position(*of))
    groups = {outcome: corpus.shown[outcome] for outcome in order}
    flat = [shown for group in groups.values() for shown in group]
    own = _thumbnails(store, [shown.row for shown in flat])
    partners = _partner_thumbnails(corpus, store, flat)
    room = _ROOM
    entries: dict[Outcome, list[Entry]] = {outcome: [] for outcome in groups}
    for turn in itertools.zip_longest(*groups.values()):
        for outcome, shown in zip(groups, turn):
            if shown is None:
                continue
            entry = _entry(shown, own.get(shown.row), partners)
            room -= sum(len(image.uri) for image in (entry.image, entry.partner_image) if image)
            if room > 0:
                entries[outcome].append(entry)
    return [
        Sheet(
            verdict=verdict,
            reason=reason,
            title=reason_title(reason) if reason else verdict.capitalize(),
            meaning=reason_meaning(reason),
            count=corpus.count(verdict, reason),
            entries=entries[verdict, reason],
            paired=any(shown.partner for shown in groups[verdict, reason]),
        )
        for verdict, reason in groups
    ]


def _entry(shown: Shown, thumbnail: bytes | None, partners: dict[str, bytes | None]) -> Entry:
    partner = shown.partner if shown.partner in partners else ""
    told = [shown.detail] if shown.detail else []
    if shown.distance is not None:
        told.append(f"{shown.distance} of 64 hash bits differ")
    if shown.correlation is not None:
        told.append(f"correlation {shown.correlation:.3f}")
    if shown.tiles:
        told.append(plural(shown.tiles, "tile"))
    return Entry(
        name=shown.source,
        image=_image(thumbnail, shown.source),
        detail=", ".join(told),
        partner=partner,
        partner_image=_image(partners[partner], partner) if partner else None,
    )


def _partner_thumbnails(corpus: Corpus, store: Store, shown: Sequence[Shown]) -> dict[str, bytes | None]:
    """The thumbnail of every picture that is repeated: of the corpus, or of the leak guard."""
    of_corpus = _thumbnails(store, list(corpus.partners.values()))
    found = {source: of_corpus.get(row) for source, row in corpus.partners.items()}
    wanted = {one.partner for one in shown if one.partner} - set(found)
    if wanted:
        sources = read_inventory(store, ["source"], guard=True).column("source").to_pylist()
        rows = {source: i for i, source in enumerate(sources) if source in wanted}
        of_guard = _thumbnails(store, list(rows.values()), guard=True)
        found |= {source: of_guard.get(row) for source, row in rows.items()}
    return found


def _thumbnails(store: Store, rows: list[int], *, guard: bool = False) -> dict[int, bytes | None]:
    wanted = np.unique(np.array(rows, dtype=np.int64))
    found = read_rows(store, ["thumbnail"], wanted, guard=guard).column("thumbnail").to_pylist()
    return dict(zip(wanted.tolist(), found))


def _image(jpeg: bytes | None, name: str) -> Image | None:
    if jpeg is None:
        return None
    height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return Image(uri, width, height, f"Thumbnail of {name}")
