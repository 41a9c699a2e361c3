"""``report.html``: one file that holds all it shows, for any state that a curation is in."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup, escape

from datagen.dataset import code_version
from datagen.report import histogram
from datagen.report.corpus import SourceTotals
from datagen.report.facts import Facts
from datagen.report.funnel import fate_by_size, funnel
from datagen.report.pictures import sheets
from datagen.report.words import CONVERSIONS, duration, measure_words, plain, plural, size
from infra.storage import Store
from infra.templates import templates

TEMPLATES = Path(__file__).parent / "templates"

_SECTIONS = (
    *(("funnel", "Funnel"), ("sizes", "Sizes"), ("measures", "Measures"), ("kept", "Kept"), ("rejected", "Rejected")),
    *(("copies", "Duplicates and leaks"), ("failed", "Failed"), ("sources", "Sources"), ("conversions", "Formats")),
    *(("shards", "Shards"), ("work", "Throughput")),
)
_COPIES = ("leak", "exact_duplicate", "near_duplicate")
_SHARDS_AT_EITHER_END = 50


class Source(NamedTuple):
    """A source and one licence of its pictures."""

    name: str
    uri: str
    licence: str
    totals: SourceTotals


def page(facts: Facts, store: Store) -> str:
    """The HTML. Thumbnails are read here, of the pictures shown only."""
    corpus = facts.corpus
    everything = sheets(corpus, store)
    shown = {name: [s for s in everything if s.verdict == name] for name in ("kept", "measured", "rejected", "failed")}
    charts = [
        histogram.chart(name, measure_words(name), counted, corpus.limits.get(name, []))
        for name, counted in corpus.histograms.items()
    ]
    shards, hidden = _both_ends(facts.shards)
    return (
        _environment()
        .get_template("report.html")
        .render(
            style=(TEMPLATES / "report.css").read_text(),
            box=histogram,
            sections=_SECTIONS,
            headline=facts.headline,
            problems=facts.problems,
            dataset=facts.dataset,
            place=store.uri,
            facts=_header_facts(facts),
            corpus=corpus,
            kept=facts.kept,
            funnel=funnel(corpus),
            members=_members(facts.dataset),
            fates=fate_by_size(facts.config),
            charts=charts,
            good=shown["kept"] + shown["measured"],
            rejected=[sheet for sheet in shown["rejected"] if sheet.reason not in _COPIES],
            copies=[sheet for sheet in shown["rejected"] if sheet.reason in _COPIES],
            failed=shown["failed"],
            removed=corpus.count("rejected", "removed"),
            guard_pictures=facts.summary.get("select", {}).get("guard_pictures", 0),
            unusable=facts.summary.get("select", {}).get("guard_pictures_unusable", []),
            guards=[source.uri for source in facts.config.leak_guard],
            sources=sources_of(facts),
            formats=corpus.formats.most_common(),
            conversions=[(CONVERSIONS.get(name, plain(name)), n) for name, n in corpus.conversions.most_common()],
            shards=shards,
            shards_hidden=hidden,
            work=_work(facts.summary),
            verify=facts.summary.get("verify"),
            version=code_version(),
        )
    )


def sources_of(facts: Facts) -> list[Source]:
    """Sources in their order, each with the licences of its pictures."""
    return [
        Source(name, facts.places.get(name, ""), licence, totals)
        for (name, licence), totals in facts.corpus.sources.items()
    ]


def breakable(name: str) -> Markup:
    """A file name, escaped, that may be broken where a reader would break it."""
    return Markup(re.sub(r"([_./-])", r"\1<wbr>", str(escape(name))))


def _environment() -> Environment:
    environment = templates(TEMPLATES)
    environment.filters |= {"plural": plural, "size": size, "duration": duration, "breakable": breakable}
    environment.filters["share"] = lambda part, whole: f"{part / max(1, whole):.1%}"
    return environment


def _header_facts(facts: Facts) -> list[tuple[str, str]]:
    found = [("Pictures found", f"{facts.corpus.inputs:,}")]
    found.append(("Kept" if facts.corpus.selected else "Measured", f"{facts.kept:,}"))
    if facts.dataset:
        totals = facts.dataset["totals"]
        found += [("Samples", f"{totals['samples']:,}"), ("Shards", f"{totals['shards']:,}, {size(totals['bytes'])}")]
        found.append(("Packed by version", facts.dataset["code_version"]))
    return found


def _members(dataset: dict[str, Any]) -> str:
    return ", ".join(f"{n:,} {suffix}" for suffix, n in dataset.get("format", {}).get("members", {}).items())


def _both_ends(shards: list[dict[str, Any]]) -> tuple[list[dict[str, Any] | None], int]:
    """The shards to list, with None where some are left out, and how many are."""
    hidden = max(0, len(shards) - 2 * _SHARDS_AT_EITHER_END)
    if not hidden:
        return list(shards), 0
    return [*shards[:_SHARDS_AT_EITHER_END], None, *shards[-_SHARDS_AT_EITHER_END:]], hidden


def _work(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the last runs did that found something to do."""
    told = []
    if work := summary.get("scan", {}).get("work"):
        rates = f"{work['images_per_second']:,.1f} a second, {work['megapixels_per_second']:,.1f} megapixels/s"
        told.append(("Scan", f"{plural(work['images'], 'picture')} in {duration(work['seconds'])}: {rates}"))
        if found := work.get("images_found_scanned"):
            told.append(("Found scanned", plural(found, "picture")))
    if select := summary.get("select"):
        told.append(("Select", f"{plural(select['inputs'], 'picture')} in {duration(select['seconds'])}"))
    if work := summary.get("pack", {}).get("work"):
        rate = f"{work['megabytes_per_second']:,.1f} MB/s"
        told.append(("Pack", f"{plural(work['shards'], 'shard')} in {duration(work['seconds'])}: {rate}"))
    for step in ("pack", "scan"):
        if cluster := summary.get(step, {}).get("cluster"):
            memory = f", {size(cluster['memory'])} of memory" if "memory" in cluster else ""
            told.append(("Ray cluster", f"{cluster.get('CPU', 0):g} CPUs{memory}"))
            break
    return told
