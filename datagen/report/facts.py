"""What is known of a curation, whatever state it is in, from its output alone."""

import dataclasses
from typing import Any

import yaml

from datagen.config import DatagenConfig, name_of
from datagen.dataset import (
    CONFIG,
    DATASET,
    SELECTION,
    SUMMARY,
    read_json,
    read_shards,
    read_take_downs,
    sha256_of_object,
)
from datagen.report.corpus import Corpus, read_corpus
from datagen.report.words import plural, size
from infra.config import load_config
from infra.storage import Store


@dataclasses.dataclass(frozen=True)
class Facts:
    """``dataset``: dataset.json, empty until it is packed. ``places``: uri by source name. ``removed``: pictures taken
    down. ``problems``: what does not fit together, for people."""

    config: DatagenConfig
    summary: dict[str, Any]
    dataset: dict[str, Any]
    corpus: Corpus
    shards: list[dict[str, Any]]
    places: dict[str, str]
    removed: int
    problems: list[str]

    @property
    def kept(self) -> int:
        """Pictures kept; until there is a selection, those measured."""
        return self.corpus.count("kept") + self.corpus.count("measured")

    @property
    def headline(self) -> str:
        """The state in one sentence."""
        inputs = plural(self.corpus.inputs, "picture")
        if not self.corpus.selected:
            return f"{self.kept:,} of {inputs} could be measured; nothing was selected yet."
        kept = f"{self.kept:,} of {inputs} were kept"
        if not self.dataset:
            return f"{kept}; nothing was packed yet."
        totals = self.dataset["totals"]
        shards = plural(totals["shards"], "shard")
        return f"{kept} and became {plural(totals['samples'], 'sample')} in {shards}, {size(totals['bytes'])}."


def read_facts(store: Store) -> Facts:
    """Read what there is.

    Raises:
        DatasetError: nothing was scanned here yet, or a table is damaged.
        ConfigError: the configuration on record is of another version.
    """
    recorded = yaml.safe_load(store.read(CONFIG)) if store.exists(CONFIG) else {"out": store.uri}
    config = load_config(DatagenConfig, recorded=recorded)
    corpus = read_corpus(config, store)
    dataset = read_json(store, DATASET)
    problems = []
    if corpus.stale:
        problems.append(
            "The selection is of an older inventory and is not shown: run `python -m datagen select`, then pack."
        )
    if dataset and not (corpus.selected and sha256_of_object(store, SELECTION) == dataset["files"][SELECTION]):
        problems.append("The shards are of an older selection than the one shown: run `python -m datagen pack`.")
    places = {name_of(source, i): source.uri for i, source in enumerate(config.source)}
    return Facts(
        config=config,
        summary=read_json(store, SUMMARY),
        dataset=dataset,
        corpus=corpus,
        shards=read_shards(store).to_pylist() if dataset else [],
        places={**places, **{name: source["uri"] for name, source in dataset.get("sources", {}).items()}},
        removed=len(read_take_downs(store)),
        problems=problems,
    )
