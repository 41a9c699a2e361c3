from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from datagen.config import DatagenConfig
from datagen.dataset import SELECTION, read_table
from datagen.scan.inventory import read_inventory
from datagen.select.select import COLUMNS, GATES, Gate, count_verdicts, judge
from infra.config import load_config
from infra.storage import open_store

DEMO = Path(__file__).parents[3] / "configs" / "datagen" / "demo.yaml"


@pytest.fixture(scope="module")
def tables(built: Path) -> tuple[pa.Table, pa.Table]:
    store = open_store(built)
    return read_inventory(store, COLUMNS), read_inventory(store, COLUMNS, guard=True)


def verdicts(tables: tuple[pa.Table, pa.Table], *overrides: str) -> dict[str, dict[str, Any]]:
    config = load_config(DatagenConfig, DEMO, ["out=unused", *overrides])
    return {row["source"].split("/")[1]: row for row in judge(*tables, config).to_pylist()}


def test_each_bad_file_of_the_demo_gets_the_reason_it_was_made_for(tables: tuple[pa.Table, pa.Table]) -> None:
    rows = verdicts(tables)
    reasons = {name: rows[name]["reason"] for name in rows if rows[name]["verdict"] != "kept"}
    assert reasons == {
        "astronaut_blurred.png": "blurred",
        "astronaut_reencoded.jpg": "near_duplicate",
        "astronaut_tiny.png": "too_small",
        "coffee_leak.jpg": "leak",
        "flat.png": "flat",
        "gravel_mirrored.jpg": "near_duplicate",
        "moon.png": "blocky",
        "retina.jpg": "blurred",
        "rocket_copy.jpg": "exact_duplicate",
        "rocket_truncated.jpg": "damaged",
        "text.png": "not_a_picture",
    }
    assert rows["gravel_mirrored.jpg"]["partner"] == "source-0/gravel.png"
    assert rows["coffee_leak.jpg"]["partner"] == "guard-0/coffee.png"
    assert rows["coffee_leak.jpg"]["correlation"] > 0.99
    assert rows["astronaut_blurred.png"]["detail"].startswith("laplacian_variance 2.154 < 50")
    assert sum(len(row["tiles"]) for row in rows.values()) >= 16


STRICT = {
    "min_side": 10000,
    "max_aspect": 1.0,
    "min_jpeg_quality": 100,
    "min_bits_per_pixel": 50.0,
    "min_laplacian_variance": 1000000000.0,
    "max_flat_fraction": 0.0,
    "min_entropy": 8.0,
    "max_blockiness": 1.0,
    "max_noise": 0.0,
    "max_overexposed": 0.0,
    "max_underexposed": 0.0,
}
LOOSE = {name: 1 if name.startswith("min_") else 100.0 for name in STRICT} | {
    "max_flat_fraction": 1.0,
    "max_overexposed": 1.0,
    "max_underexposed": 1.0,
    "min_bits_per_pixel": 0.0,
    "min_laplacian_variance": 0.0,
    "min_entropy": 0.0,
}


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.reason)
def test_a_gate_rejects_under_a_strict_limit_and_none_does_under_loose_ones(
    tables: tuple[pa.Table, pa.Table], gate: Gate
) -> None:
    limits = LOOSE | {gate.limit: STRICT[gate.limit]}
    rows = verdicts(tables, *(f"select.{name}={value}" for name, value in limits.items()))
    assert {row["reason"] for row in rows.values()} & {gate.reason for gate in GATES} == {gate.reason}


def test_the_larger_copy_is_kept_whatever_its_name(tables: tuple[pa.Table, pa.Table]) -> None:
    # Without the gate on its side the 64-pixel astronaut is a near copy too, and the smallest.
    rows = verdicts(tables, "select.min_side=1", "select.max_blockiness=100.0")
    assert rows["astronaut_tiny.png"]["reason"] == "near_duplicate"
    assert rows["astronaut_tiny.png"]["partner"] == "source-0/astronaut.png"


def test_the_order_of_the_listing_decides_only_between_equals(tables: tuple[pa.Table, pa.Table]) -> None:
    inventory, guard = tables
    backwards = inventory.take(list(reversed(range(inventory.num_rows))))
    forward, reverse = verdicts((inventory, guard)), verdicts((backwards, guard))
    differing = {name for name in forward if forward[name]["verdict"] != reverse[name]["verdict"]}
    assert differing == {"rocket.jpg", "rocket_copy.jpg"}


def test_without_a_guard_nothing_leaks(tables: tuple[pa.Table, pa.Table]) -> None:
    assert verdicts((tables[0], tables[1].slice(0, 0)))["coffee_leak.jpg"]["verdict"] == "kept"


def test_counts_add_up_to_the_inputs(built: Path) -> None:
    counts = count_verdicts(read_table(open_store(built), SELECTION))
    assert counts["inputs"] == counts["kept"] + sum(counts["rejected"].values()) + sum(counts["failed"].values())


def test_a_picture_without_a_good_tile_is_rejected(tables: tuple[pa.Table, pa.Table]) -> None:
    rows = verdicts(tables, "tiles.min_laplacian_variance=1e6")
    assert rows["astronaut.png"]["reason"] == "no_good_tile"
    assert rows["coins.png"]["verdict"] == "kept"  # Whole: below 512 pixels it is not cut.
