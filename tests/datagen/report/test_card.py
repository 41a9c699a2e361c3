"""The dataset card: what hubs read of it, what people read, and that its example runs."""

import re
from pathlib import Path

import pytest
import yaml

from datagen.dataset import read_dataset_json
from datagen.report import write_report
from datagen.report.card import CARD, MARK, cell, code
from datagen.report.card import _licences as licences
from infra.storage import open_store


@pytest.fixture
def card(copied: Path) -> str:
    assert write_report(open_store(copied)) == [f"{copied}/report.html", f"{copied}/README.md"]
    return (copied / CARD).read_text()


def test_its_front_matter_is_what_hubs_read(card: str) -> None:
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["task_categories"] == ["image-to-image"] and front["size_categories"] == ["n<1K"]
    assert front["license"] == "unknown"
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "shards/*.tar"}]


def test_it_tells_id_funnel_thresholds_and_guard(card: str, copied: Path) -> None:
    dataset = read_dataset_json(open_store(copied))
    assert dataset["id"] in card and dataset["format"]["why"] in card
    for reason, count in dataset["totals"]["rejected"].items():
        assert count > 0 and reason
    counts = [int(n) for n in re.findall(r"\| (?:Scan|Selection)[^|]*\|[^|]*\| (\d+) \|", card)]
    assert sum(counts) == dataset["totals"]["inputs"] - dataset["totals"]["kept"]
    for section in ("select", "tiles"):
        for name, value in dataset["config"][section].items():
            if not isinstance(value, dict):
                told = cell("none" if value is None else str(value))
                assert f"| `{section}.{name}` | {told} |" in card
    assert "embedded:held_out" in card and "python -m datagen verify" in card


def test_its_example_reads_every_sample(card: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(copied)
    seen: list[tuple[str, tuple[int, ...]]] = []
    exec(example + "    seen.append((source, picture.shape))\n", {"seen": seen})
    assert len(seen) == read_dataset_json(open_store(copied))["totals"]["samples"]
    assert all(shape[2] == 3 for _, shape in seen)


def test_a_card_that_somebody_made_their_own_is_left_alone(card: str, copied: Path) -> None:
    (copied / CARD).write_text(card.replace("Known limits", "Stale"))
    assert len(write_report(open_store(copied))) == 2 and (copied / CARD).read_text() == card
    own = card.replace(MARK, "") + "\nThanks to all."
    (copied / CARD).write_text(own)
    assert write_report(open_store(copied)) == [f"{copied}/report.html"]
    assert (copied / CARD).read_text() == own


def test_licences_that_hubs_know_are_named_as_they_name_them() -> None:
    assert licences(["CC BY 4.0", "cc-by-4.0", "BSD 3-Clause", ""]) == (["cc-by-4.0", "bsd-3-clause"], [])
    assert licences(["Flickr terms"]) == ([], ["Flickr terms"])


def test_text_in_a_table_is_text() -> None:
    assert cell("a|b\n<i>*c*") == r"a\|b \<i\>\*c\*"
    assert code("a`b|c") == r"`` a`b\|c ``"
