"""The report of a curation and its dataset card, written from the output alone, in whatever state it is."""

from datagen.report.card import write_card
from datagen.report.facts import read_facts
from datagen.report.page import page
from infra.storage import Store

REPORT = "report.html"


def write_report(store: Store) -> list[str]:
    """Write ``report.html`` and the dataset card ``README.md`` beside the dataset; returns the URIs written.

    Raises:
        DatasetError: nothing was scanned here yet, or a table is damaged.
        ConfigError: the configuration on record is of another version.
    """
    facts = read_facts(store)
    store.write(REPORT, page(facts, store).encode())
    return [f"{store.uri}/{REPORT}", *write_card(facts, store)]
