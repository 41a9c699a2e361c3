"""What the tables of a curation say, read part by part: counts, histograms, and which pictures to show."""

import collections
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datagen.config import DatagenConfig, Limits, SelectConfig
from datagen.dataset import SELECTION, read_removed
from datagen.report.histogram import Histogram, Limit
from datagen.report.words import MEASURES, measure_words
from datagen.scan.inventory import read_manifest
from datagen.select.gates import bounds, measure_columns, measures
from datagen.select.select import read_parts
from infra.storage import Store

SHOWN_A_REASON = 24
KEPT_SHOWN = 48

_ROWS_AT_A_TIME = 65536
_LAST = 2**64 - 1
_SELECTION_COLUMNS = ("source", "sha256", "verdict", "reason", "detail", "partner", "distance", "correlation", "tiles")

Outcome = tuple[str, str]  # verdict, reason


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture to show. ``row``: its place in the inventory."""

    row: int
    source: str
    detail: str
    partner: str = ""
    distance: int | None = None
    correlation: float | None = None
    tiles: int = 0


@dataclasses.dataclass
class SourceTotals:
    """What one source gave under one licence."""

    pictures: int = 0
    kept: int = 0
    bytes: int = 0
    megapixels_kept: float = 0.0


@dataclasses.dataclass
class Corpus:
    """A pass over the tables.

    ``outcomes``: pictures by who judged (scan or select), verdict and reason; verdict ``measured`` until there is a
    selection. ``shown``: some pictures of each verdict and reason, a fair sample that is the same every time.
    ``partners``: inventory row of each source that some shown picture repeats.
    """

    inputs: int = 0
    selected: bool = False
    stale: bool = False  # The selection is of another inventory.
    outcomes: collections.Counter[tuple[str, str, str]] = dataclasses.field(default_factory=collections.Counter)
    shown: dict[Outcome, list[Shown]] = dataclasses.field(default_factory=dict)
    partners: dict[str, int] = dataclasses.field(default_factory=dict)
    histograms: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    limits: dict[str, list[Limit]] = dataclasses.field(default_factory=dict)
    sources: dict[tuple[str, str], SourceTotals] = dataclasses.field(default_factory=dict)
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    conversions: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def count(self, verdict: str, reason: str | None = None) -> int:
        """Pictures with a verdict, for one reason or for any."""
        return sum(n for (_, v, r), n in self.outcomes.items() if v == verdict and reason in (None, r))


def read_corpus(config: DatagenConfig, store: Store) -> Corpus:
    """Read inventory and selection once.

    Pictures that were taken down are counted, and are in nothing else.

    Raises:
        DatasetError: nothing was scanned here yet.
    """
    manifest = read_manifest(store)
    corpus = Corpus(inputs=sum(part["rows"] for part in manifest["parts"]))
    removed = pa.array(sorted(read_removed(store)), pa.string())
    judged: np.ndarray | None = None
    outcomes: list[Outcome] = []
    if store.exists(SELECTION):
        judged, outcomes, chosen = _read_selection(store, removed)
        if len(judged) == corpus.inputs:
            corpus.selected, corpus.shown = True, chosen
        else:
            corpus.stale, judged = True, None
    _read_inventory(config, store, corpus, removed, judged, outcomes)
    return corpus


def _read_selection(store: Store, removed: pa.Array) -> tuple[np.ndarray, list[Outcome], dict[Outcome, list[Shown]]]:
    """The outcome of every row, int16 ``[N]`` places in the list of outcomes, and the pictures to show."""
    codes, outcomes, samples, start = [np.empty(0, np.int16)], [], _Samples(), 0
    for batch in _batches(store):
        names = list(zip(batch.column("verdict").to_pylist(), batch.column("reason").to_pylist()))
        outcomes += [outcome for outcome in dict.fromkeys(names) if outcome not in outcomes]
        place = {outcome: i for i, outcome in enumerate(outcomes)}
        codes.append(np.array([place[name] for name in names], dtype=np.int16))
        gone = pc.is_in(batch.column("sha256"), removed).to_numpy(zero_copy_only=False)
        samples.take(batch, codes[-1], outcomes, ~gone & np.array([reason != "removed" for _, reason in names]), start)
        start += batch.num_rows
    return np.concatenate(codes), outcomes, samples.shown()


def _batches(store: Store) -> Iterator[pa.Table]:
    with tempfile.TemporaryDirectory(prefix="ird-report-") as folder:
        path = Path(folder) / "selection.parquet"
        store.download(SELECTION, path)
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=list(_SELECTION_COLUMNS)):
                yield pa.table(batch)


class _Samples:
    """Of each outcome the pictures whose sha256 is the least: as good as drawn by lot, and the same every time."""

    def __init__(self) -> None:
        self._best: dict[Outcome, list[tuple[int, Shown]]] = {}

    def take(
        self, batch: pa.Table, codes: np.ndarray, outcomes: list[Outcome], eligible: np.ndarray, start: int
    ) -> None:
        """Take in rows of the selection or of the inventory, the first of which is row ``start``."""
        order = _lots(batch.column("sha256"))
        for code in np.unique(codes[eligible]).tolist():
            outcome = outcomes[code]
            best = self._best.setdefault(outcome, [])
            number = KEPT_SHOWN if outcome[0] == "kept" else SHOWN_A_REASON
            rows = np.flatnonzero(eligible & (codes == code))
            if len(best) == number:
                rows = rows[order[rows] < best[-1][0]]
            rows = rows[np.argsort(order[rows], kind="stable")[:number]]
            found = batch.take(pa.array(rows)).to_pylist()
            best += [(int(order[i]), _shown(row, start + int(i))) for i, row in zip(rows, found)]
            best.sort(key=lambda pair: (pair[0], pair[1].row))
            del best[number:]

    def shown(self) -> dict[Outcome, list[Shown]]:
        """The pictures by outcome, in order of their row."""
        return {
            outcome: [shown for _, shown in sorted(best, key=lambda pair: pair[1].row)]
            for outcome, best in self._best.items()
        }


def _lots(sha256: pa.ChunkedArray) -> np.ndarray:
    """The first 64 bits of hex digests, uint64 ``[N]``; the greatest number where there is none."""
    digits = pc.fill_null(pc.utf8_slice_codeunits(sha256, 0, 16), f"{_LAST:x}").to_pylist()
    return np.frombuffer(bytes.fromhex("".join(digits)), dtype=">u8").astype(np.uint64)


def _shown(row: dict[str, Any], place: int) -> Shown:
    return Shown(
        row=place,
        source=row["source"],
        detail=row.get("detail") or "",
        partner=row.get("partner") or "",
        distance=row.get("distance"),
        correlation=row.get("correlation"),
        tiles=len(row.get("tiles") or []),
    )


def _read_inventory(
    config: DatagenConfig,
    store: Store,
    corpus: Corpus,
    removed: pa.Array,
    judged: np.ndarray | None,
    outcomes: list[Outcome],
) -> None:
    gauged = _with_all_scores(config)
    gates = bounds(config.select)
    names = [*MEASURES, *(f"score_{name}" for name in gauged.scores)]
    histograms = {name: Histogram(measure_words(name).log) for name in names}
    wrong = [0] * len(gates)
    samples = _Samples()
    wanted = pa.array(
        [shown.partner for group in corpus.shown.values() for shown in group if shown.partner], pa.string()
    )
    columns = ["source", "licence", "sha256", "verdict", "reason", "error", "bytes", "format", "conversions"]
    start = 0
    for part in read_parts(store, [*columns, *measure_columns(gauged)]):
        stop = start + part.num_rows
        scanned = list(zip(part.column("verdict").to_pylist(), part.column("reason").to_pylist()))
        told = scanned if judged is None else [outcomes[code] for code in judged[start:stop].tolist()]
        corpus.outcomes.update((_judge(verdict, outcome), *outcome) for (verdict, _), outcome in zip(scanned, told))
        gone = pc.is_in(part.column("sha256"), removed).to_numpy(zero_copy_only=False)
        if judged is None:
            codes, known = _codes(scanned)
            samples.take(part.append_column("detail", part.column("error")), codes, known, ~gone, start)
        values = _all_measures(part, gauged)
        for name, histogram in histograms.items():
            histogram.add(values[name][~gone])
        for i, gate in enumerate(gates):
            wrong[i] += int(gate.rejects(values[gate.measure][~gone]).sum())
        kept = np.array([outcome[0] in ("kept", "measured") for outcome in told], dtype=bool)
        _count_origins(corpus, part, kept, values["megapixels"])
        if len(wanted):
            found = np.flatnonzero(pc.is_in(part.column("source"), wanted).to_numpy(zero_copy_only=False) & ~gone)
            names_found = part.column("source").take(pa.array(found)).to_pylist()
            corpus.partners |= dict(zip(names_found, (start + found).tolist()))
        start = stop
    if judged is None:
        corpus.shown = samples.shown()
    corpus.histograms = {name: histogram for name, histogram in histograms.items() if histogram.count}
    for gate, number in zip(gates, wrong):
        if not np.isnan(gate.limit):
            corpus.limits.setdefault(gate.measure, []).append(Limit(gate.limit, gate.lower, number))


def _judge(scanned: str, outcome: Outcome) -> str:
    """Who said the verdict: the scan, or the selection over what it measured (and over take-downs)."""
    return "scan" if scanned != "measured" and outcome[1] != "removed" else "select"


def _codes(names: list[Outcome]) -> tuple[np.ndarray, list[Outcome]]:
    known = list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(known)}
    return np.array([place[name] for name in names], dtype=np.int16), known


def _with_all_scores(config: DatagenConfig) -> SelectConfig:
    """The selection's settings with every score that the scan takes, limits or none."""
    scores = {**{name: Limits() for name in config.scan.scores}, **config.select.scores}
    return config.select.model_copy(update={"scores": scores})


def _all_measures(part: pa.Table, config: SelectConfig) -> dict[str, np.ndarray]:
    """Those of the gates and those of the size, float64 ``[N]``, NaN where a picture has none."""
    values = measures(part, config)
    return {
        **values,
        "megapixels": values["width"] * values["height"] / 1e6,
        "kilobytes": pc.divide(part.column("bytes").cast(pa.float64()), 1000.0).to_numpy(),
    }


def _count_origins(corpus: Corpus, part: pa.Table, kept: np.ndarray, megapixels: np.ndarray) -> None:
    """Sources and licences of all pictures, formats and conversions of those that are kept."""
    source = pc.list_element(pc.split_pattern(part.column("source"), "/", max_splits=1), 0)
    table = pa.table(
        {
            "source": source,
            "licence": pc.fill_null(part.column("licence"), ""),
            "bytes": part.column("bytes"),
            "kept": kept.astype(np.int64),
            "megapixels": np.where(kept, np.nan_to_num(megapixels), 0.0),
        }
    )
    sums = [("kept", "sum"), ("bytes", "sum"), ("megapixels", "sum"), ("source", "count")]
    for row in table.group_by(["source", "licence"]).aggregate(sums).to_pylist():
        totals = corpus.sources.setdefault((row["source"], row["licence"]), SourceTotals())
        totals.pictures += row["source_count"]
        totals.kept += row["kept_sum"]
        totals.bytes += row["bytes_sum"] or 0
        totals.megapixels_kept += row["megapixels_sum"]
    of_kept = part.select(["format", "conversions"]).filter(pa.array(kept))
    corpus.formats.update(of_kept.column("format").to_pylist())
    corpus.conversions.update(pc.list_flatten(of_kept.column("conversions")).to_pylist())
