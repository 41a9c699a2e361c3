"""The report of the demo's corpus in every state: its numbers are those of the tables, and it shows what it may."""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import simplejpeg

from datagen.config import DatagenConfig
from datagen.dataset import (
    CONFIG,
    REMOVED,
    SELECTION,
    SUMMARY,
    DatasetError,
    read_dataset_json,
    read_json,
    read_shards,
    read_table,
    write_json,
)
from datagen.report import write_report
from datagen.report.page import _both_ends
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory
from datagen.select.gates import bounds, measure_columns, measures
from datagen.select.select import select
from infra.config import dump_config
from infra.storage import Store, open_store
from tests.datagen.select.inventories import demo_config, demo_inventory, edited, store_of
from tests.support.browser import open_page

SECTIONS = ["funnel", "sizes", "measures", "kept", "rejected", "copies", "failed", "sources", "conversions"]
SECTIONS += ["shards", "work"]


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of all tags that have one."""
        return [attributes for _, attributes in self.tags if name in attributes]


def report_of(store: Store) -> str:
    assert f"{store.uri}/report.html" in write_report(store)
    return store.read("report.html").decode()


def store_with(folder: Path, inventory: pa.Table, *, judged: bool = True, config: DatagenConfig | None = None) -> Store:
    """A store after scan, or after scan and select, made without a cluster."""
    store = store_of(folder, inventory, demo_inventory(guard=True))
    config = config or demo_config()
    dump_config(config, folder / CONFIG)
    if judged:
        write_json(store, SUMMARY, {"select": select(config, store)})
    return store


def sheets_of(page: Page) -> dict[tuple[str, str], int]:
    found = page.having("data-shown")
    return {(str(tag["data-verdict"]), str(tag["data-reason"])): int(tag["data-count"] or 0) for tag in found}


def test_every_section_is_there_with_the_numbers_of_the_tables(copied: Path) -> None:
    store = open_store(copied)
    page = Page(report_of(store))
    assert [tag["id"] for name, tag in page.tags if name == "h2"] == SECTIONS
    selection = read_table(store, SELECTION)
    verdicts = Counter(zip(selection.column("verdict").to_pylist(), selection.column("reason").to_pylist()))
    assert sheets_of(page) == dict(verdicts)
    (funnel,) = page.having("data-inputs")
    assert (funnel["data-inputs"], funnel["data-kept"]) == (str(selection.num_rows), str(verdicts["kept", ""]))
    steps = [tag for tag in page.having("data-verdict") if tag.get("class") == "step"][1:-1]
    lost = Counter({verdict: sum(n for (v, _), n in verdicts.items() if v == verdict) for verdict, _ in verdicts})
    for verdict in ("rejected", "failed"):
        assert sum(int(tag["data-count"] or 0) for tag in steps if tag["data-verdict"] == verdict) == lost[verdict]
    dataset = read_dataset_json(store)
    assert dataset["id"] in page.text and "no fault" in page.text
    for shard in read_shards(store).to_pylist():
        assert shard["name"] in page.text and shard["sha256"][:16] in page.text
    for row in selection.to_pylist():
        assert row["source"] in page.text, "the demo is small enough to show every picture"


def test_each_histogram_counts_what_the_inventory_holds(copied: Path) -> None:
    store = open_store(copied)
    config = demo_config().select
    page = Page(report_of(store))
    inventory = read_inventory(store, measure_columns(config))
    values = measures(inventory, config)
    charts = {str(tag["data-measure"]): int(tag["data-count"] or 0) for tag in page.having("data-measure")}
    for gate in bounds(config):
        assert charts[gate.measure] == np.isfinite(values[gate.measure]).sum()
    told = [int(tag["data-wrong"] or 0) for tag in page.having("data-wrong")]
    limited = [gate for gate in bounds(config) if not np.isnan(gate.limit)]
    by_measure = sorted(limited, key=lambda gate: list(charts).index(gate.measure))
    assert told == [gate.rejects(values[gate.measure]).sum() for gate in by_measure]
    assert sum(told) > 0
    assert charts["kilobytes"] == inventory.num_rows


def test_it_loads_nothing_from_anywhere(copied: Path) -> None:
    text = report_of(open_store(copied))
    page = Page(text)
    assert all(str(tag["src"]).startswith("data:image/jpeg;base64,") for tag in page.having("src"))
    assert all(str(tag["href"]).startswith("#") for tag in page.having("href"))
    assert not page.having("srcset") and not page.having("data") and "script" not in {name for name, _ in page.tags}
    assert "url(" not in text and "@import" not in text and "://" not in re.sub(r"embedded:\w+", "", text)
    assert all(tag.get("alt") for name, tag in page.tags if name == "img")
    assert all(tag.get("aria-label") for name, tag in page.tags if name == "svg")
    anchors = {str(tag["href"])[1:] for tag in page.having("href")}
    assert anchors == set(SECTIONS)


def test_the_same_dataset_gives_the_same_report(copied: Path) -> None:
    store = open_store(copied)
    assert report_of(store) == report_of(store)


def test_copies_and_leaks_stand_beside_what_they_repeat(tmp_path: Path) -> None:
    store = store_with(tmp_path, demo_inventory())
    text = report_of(store)
    rows = [row for row in read_table(store, SELECTION).to_pylist() if row["partner"]]
    assert {row["reason"] for row in rows} == {"leak", "exact_duplicate", "near_duplicate"}
    pairs = text.split('class="pair"')[1:]
    for row in rows:
        (pair,) = [part for part in pairs if f"Thumbnail of {row['source']}" in part.split("</figure>")[0]]
        _, partner, caption = pair.split("</figure>")[:3]
        assert f"Thumbnail of {row['partner']}" in partner
        assert f"{row['distance']} of 64 hash bits differ" in caption
        if row["correlation"] is not None:
            assert f"correlation {row['correlation']:.3f}" in caption


def test_text_of_files_is_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>&\"'{{ 7*7 }}.png"
    error = "</td><script>alert(2)</script>"
    inventory = edited(
        demo_inventory(),
        {"row": "astronaut.png", "source": f"source-0/{name}", "key": name},
        {"row": "text.png", "source": f"source-0/{error}", "error": error, "licence": error},
    )
    store = store_with(tmp_path, inventory)
    text = report_of(store)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(str(tag["src"]).startswith("data:") for tag in page.having("src"))
    assert f"source-0/{name}" in page.text and error in page.text
    card = store.read("README.md").decode()
    assert "<script>" not in card and r"\<script\>" in card


def test_before_the_selection_it_shows_what_was_measured(tmp_path: Path) -> None:
    store = store_with(tmp_path, demo_inventory(), judged=False)
    page = Page(report_of(store))
    inventory = read_inventory(store, ["verdict", "reason"])
    expected = Counter(zip(inventory.column("verdict").to_pylist(), inventory.column("reason").to_pylist()))
    assert sheets_of(page) == dict(expected)
    assert [tag["id"] for name, tag in page.tags if name == "h2"] == SECTIONS
    assert "Not selected yet" in page.text and "Not packed yet" in page.text and "not run yet" in page.text
    assert "Not packed yet" in store.read("README.md").decode()


def test_before_the_shards_it_shows_the_selection(tmp_path: Path) -> None:
    store = store_with(tmp_path, demo_inventory())
    page = Page(report_of(store))
    assert ("kept", "") in sheets_of(page) and "Not packed yet" in page.text
    assert "nothing was packed yet" in page.text


def test_a_selection_of_another_inventory_is_not_shown(tmp_path: Path) -> None:
    store = store_with(tmp_path, demo_inventory())
    store_of(tmp_path, demo_inventory().slice(3))
    page = Page(report_of(store))
    assert "older inventory" in page.text and ("measured", "") in sheets_of(page)


def test_shards_of_another_selection_are_named(copied: Path, make_config: Callable[..., DatagenConfig]) -> None:
    store = open_store(copied)
    assert "older selection" not in Page(report_of(store)).text
    select(make_config(copied, ["select.min_laplacian_variance=500.0"]), store)
    assert "older selection" in Page(report_of(store)).text


def test_without_an_inventory_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="python -m datagen scan"):
        write_report(open_store(tmp_path))


@pytest.mark.parametrize("judged", [True, False])
def test_nothing_of_a_picture_taken_down_is_shown(tmp_path: Path, judged: bool) -> None:
    inventory = demo_inventory()
    gone = {row["key"]: row["sha256"] for row in inventory.to_pylist()}
    store = store_with(tmp_path, inventory, judged=judged)
    # gravel.png is what gravel_mirrored.png repeats; retina.jpg is rejected for its own sake.
    names = ("gravel.png", "retina.jpg")
    pictures = [
        {"sha256": gone[name], "source": f"source-0/{name}", "note": "please", "dealt": name == "gravel.png"}
        for name in names
    ]
    write_json(store, REMOVED, {"pictures": pictures})
    for _ in range(2):
        text = report_of(store)
        for name, sha256 in ((name, gone[name]) for name in names):
            assert not re.search(rf"\b{re.escape(name)}", text.replace("<wbr>", "")) and sha256 not in text
        if judged:
            write_json(store, SUMMARY, {"select": select(demo_config(), store)})
    if judged:
        assert "2 pictures taken down" in Page(text).text and "please" not in text
    assert "2 pictures taken down" in store.read("README.md").decode()


def test_many_reasons_of_many_pictures_stay_below_five_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    (row,) = edited(demo_inventory(), {"row": "camera.png"}).to_pylist()
    row |= {"thumbnail": simplejpeg.encode_jpeg(noise, quality=80), "verdict": "rejected"}
    rows = [
        {**row, "source": f"source-0/{i}.png", "sha256": f"{i * 7919:064x}", "reason": f"reason_{i % 20}"}
        for i in range(800)
    ]
    store = store_of(tmp_path, pa.Table.from_pylist(rows, schema=INVENTORY_SCHEMA), rows_per_part=256)
    text = report_of(store)
    assert len(text) < 5_000_000
    shown = [int(tag["data-shown"] or 0) for tag in Page(text).having("data-shown")]
    assert len(shown) == 20 and min(shown) >= 3 and max(shown) - min(shown) <= 1


def test_no_element_is_wider_than_a_phone(copied: Path, tmp_path: Path, chromium: str) -> None:
    long = "a_name_without_end" * 12 + ".png"
    store = store_with(
        tmp_path / "out",
        pa.concat_tables(
            [demo_inventory(), edited(demo_inventory(), {"row": "text.png", "source": f"source-0/{long}"})]
        ),
    )
    for number, text in enumerate((report_of(open_store(copied)), report_of(store))):
        folder = tmp_path / str(number)
        folder.mkdir()
        page = folder / "phone.html"
        page.write_text(
            f'<!doctype html><iframe style="width:360px;height:3000px;border:0" srcdoc="{html.escape(text)}"></iframe>'
            """<script>
            onload = () => {
              const inner = document.querySelector("iframe").contentDocument;
              const wide = [...inner.body.querySelectorAll("*")].filter(
                (e) => e.getBoundingClientRect().right > 360.5 && !e.parentElement.closest(".scroll"));
              document.title = JSON.stringify({width: inner.documentElement.scrollWidth,
                wide: wide.map((e) => e.outerHTML.slice(0, 120)), images: inner.images.length,
                broken: [...inner.images].filter((i) => i.naturalWidth === 0).length});
            };
            </script>"""
        )
        dom, _ = open_page(chromium, page, folder)
        found = re.search(r"<title>(\{.*?\})</title>", dom, re.DOTALL)
        assert found
        seen: dict[str, Any] = json.loads(html.unescape(found[1]))
        assert seen["wide"] == [] and seen["width"] <= 360
        assert seen["images"] >= 20 and seen["broken"] == 0


def test_the_table_of_many_shards_shows_both_ends() -> None:
    shards: list[dict[str, Any]] = [{"name": f"ird-{i:06d}.tar"} for i in range(230)]
    shown, hidden = _both_ends(shards)
    assert hidden == 130 and shown[50] is None
    assert [shown[i] for i in (0, 49, 51, 100)] == [shards[i] for i in (0, 49, 180, 229)]


def test_scores_without_a_limit_have_a_histogram_too(tmp_path: Path) -> None:
    inventory = demo_inventory()
    scores = [[("pretty", float(i))] if i % 2 else [] for i in range(inventory.num_rows)]
    place = inventory.schema.get_field_index("scores")
    inventory = inventory.set_column(place, "scores", pa.array(scores, INVENTORY_SCHEMA.field("scores").type))
    config = demo_config("scan.scores.pretty=tests.datagen.scan.faulty_scores:brightness")
    store = store_with(tmp_path, inventory, config=config)
    page = Page(report_of(store))
    charts = {tag["data-measure"]: tag["data-count"] for tag in page.having("data-measure")}
    assert charts["score_pretty"] == str(sum(map(bool, scores)))


def test_pictures_by_source_and_licence_add_up(tmp_path: Path) -> None:
    inventory = demo_inventory()
    licences = pa.array(["CC0 1.0", "CC BY 4.0"] * 20).slice(0, inventory.num_rows)
    place = inventory.schema.get_field_index("licence")
    store = store_with(tmp_path, inventory.set_column(place, "licence", licences))
    text = report_of(store)
    section = text.split('id="sources"')[1].split("</section>")[0]
    found = re.findall(r'<td>(CC[^<]*)</td><td class="number">(\d+)</td><td class="number">(\d+)</td>', section)
    kept = pc.equal(read_table(store, SELECTION).column("verdict"), "kept").to_pylist()
    expected = [
        (
            name,
            str(licences.to_pylist().count(name)),
            str(sum(k for k, own in zip(kept, licences.to_pylist()) if own == name)),
        )
        for name in ("CC0 1.0", "CC BY 4.0")
    ]
    assert sorted(found) == sorted(expected)
    assert read_json(store, SUMMARY)["select"]["kept"] == sum(int(n) for *_, n in found)
