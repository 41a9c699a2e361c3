"""``README.md``: the dataset card, with the front matter by which dataset hubs sort it."""

import re
from typing import Any

import yaml

from datagen.config import Config, DatagenConfig, PackConfig, ScanConfig, SelectConfig, TileConfig
from datagen.dataset import CONFIG, code_version
from datagen.report.facts import Facts
from datagen.report.funnel import fate_by_size, funnel
from datagen.report.page import TEMPLATES, sources_of
from datagen.report.words import CONVERSIONS, plain, plural, reason_meaning, reason_title, size
from datagen.select.gates import GATES
from infra.storage import Store
from infra.templates import templates

CARD = "README.md"
# Without it a README.md is somebody's own, and is left alone.
MARK = "<!-- Written by `python -m datagen report`. Without this line the file is left as it is. -->"

# Those of the hub's identifiers (huggingface.co/docs/hub/repositories-licenses) that pictures come under.
_LICENCES = (
    *(
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc",
        "cc0-1.0",
        "odc-by",
        "odbl",
        "pddl",
        "unlicense",
    ),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
    *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0"),
    *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_GATED = {gate.limit: f"{reason_title(gate.reason).lower()}: {reason_meaning(gate.reason)}" for gate in GATES}
_LARGER = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))


def write_card(facts: Facts, store: Store) -> list[str]:
    """Write the card, unless there is one that somebody made their own; returns the URIs written."""
    if store.exists(CARD) and MARK not in store.read(CARD).decode(errors="replace"):
        return []
    store.write(CARD, card(facts).encode())
    return [f"{store.uri}/{CARD}"]


def card(facts: Facts) -> str:
    """The card as markdown."""
    environment = templates(TEMPLATES, markup=False)
    environment.filters |= {"plural": plural, "size": size, "cell": cell, "code": code}
    return environment.get_template("card.md").render(
        front_matter=front_matter(facts),
        mark=MARK,
        headline=facts.headline,
        dataset=facts.dataset,
        corpus=facts.corpus,
        kept=facts.kept,
        sources=sources_of(facts),
        funnel=funnel(facts.corpus),
        fates=fate_by_size(facts.config),
        thresholds=thresholds(facts.config),
        conversions=[(CONVERSIONS.get(name, plain(name)), n) for name, n in facts.corpus.conversions.most_common()],
        guards=[source.uri for source in facts.config.leak_guard],
        guard_pictures=facts.summary.get("select", {}).get("guard_pictures", 0),
        crops=facts.config.select.leak_crops,
        removed=facts.removed,
        verify=facts.summary.get("verify"),
        config_file=CONFIG,
        version=code_version(),
    )


def front_matter(facts: Facts) -> str:
    """YAML between the ``---`` lines."""
    known, others = _licences([licence for _, licence in facts.corpus.sources])
    names: list[str] = known + (["other"] if others else [])
    fields: dict[str, Any] = {
        "pretty_name": "Curated pictures for image restoration",
        "license": (names[0] if len(names) == 1 else names) if names else "unknown",
    }
    if others:
        fields["license_name"] = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") for name in others)
    fields |= {
        "task_categories": ["image-to-image"],
        "size_categories": [_size_category(facts.dataset.get("totals", {}).get("samples", 0))],
        "tags": ["image-restoration", "super-resolution", "webdataset"],
    }
    if facts.dataset:
        fields["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()


def thresholds(config: DatagenConfig) -> list[tuple[str, str, str]]:
    """Key, value and meaning of every setting on which the samples depend."""
    parts: tuple[tuple[str, Config, type[Config]], ...] = (
        ("scan", config.scan, ScanConfig),
        ("select", config.select, SelectConfig),
        ("tiles", config.tiles, TileConfig),
        ("pack", config.pack, PackConfig),
    )
    rows = [("seed", str(config.seed), "of the order of samples")]
    for section, values, schema in parts:
        for name, field in schema.model_fields.items():
            value = getattr(values, name)
            if (section, name) in (("scan", "pictures_per_piece"), ("scan", "seconds_per_picture")):
                continue
            if isinstance(value, dict):
                rows += [(f"{section}.{name}.{key}", str(of), "") for key, of in sorted(value.items())]
            else:
                told = field.description or _GATED.get(name, "") if section == "select" else field.description
                rows.append((f"{section}.{name}", "none" if value is None else f"{value}", told or ""))
    return rows


def cell(text: str) -> str:
    """Text as it stands in a table's cell: nothing in it is markdown or HTML."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", flat)


def code(text: str) -> str:
    """Text as code in a table's cell."""
    flat = " ".join(text.split()).replace("|", "\\|")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{ticks} {flat} {ticks}" if "`" in flat else f"`{flat}`"


def _licences(stated: list[str]) -> tuple[list[str], list[str]]:
    """Identifiers of the hub, and licences that are none; those not stated are among neither."""
    known, others = [], []
    for licence in dict.fromkeys(stated):
        name = re.sub(r"[\s_]+", "-", licence.strip().lower())
        if name in _LICENCES:
            known.append(name)
        elif name:
            others.append(licence.strip())
    return list(dict.fromkeys(known)), others


def _size_category(samples: int) -> str:
    return next((name for limit, name in (*_SIZES, *_LARGER) if samples < limit), "n>1T")
