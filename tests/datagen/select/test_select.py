import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datagen.dataset import REMOVED, SELECTION, DatasetError, read_table, write_json
from datagen.select.gates import GATES, Gate
from datagen.select.select import SELECTION_SCHEMA, count_verdicts, judge, select
from infra.storage import Store, open_store
from tests.datagen.select.inventories import demo_config, demo_inventory, edited, store_of


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("demo"), demo_inventory(), demo_inventory(guard=True))


def verdicts(store: Store, *overrides: str) -> dict[str, dict[str, Any]]:
    selection = pa.concat_tables(judge(demo_config(*overrides), store))
    return {row["source"].split("/")[1]: row for row in selection.to_pylist()}


def test_each_bad_file_of_the_demo_gets_the_reason_it_was_made_for(demo: Store) -> None:
    rows = verdicts(demo)
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
    assert rows["rocket_copy.jpg"]["detail"] == "the same file"
    assert rows["coffee_leak.jpg"]["partner"] == "guard-0/coffee.png"
    assert rows["coffee_leak.jpg"]["correlation"] > 0.99
    assert rows["coffee_leak.jpg"]["detail"] == "copy, mirrored"
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
    "max_niqe": 0.001,
    "max_overexposed": 0.0,
    "max_underexposed": 0.0,
}
LOOSE = {name: 1 if name.startswith("min_") else 100.0 for name in STRICT} | {
    "max_flat_fraction": 1.0,
    "max_overexposed": 1.0,
    "max_underexposed": 1.0,
    "max_niqe": 1000.0,
    "min_bits_per_pixel": 0.0,
    "min_laplacian_variance": 0.0,
    "min_entropy": 0.0,
}


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The demo without a leak guard, and with a NIQE whether or not there is a model to measure it."""
    names = demo_inventory().column("key").to_pylist()
    inventory = edited(demo_inventory(), *({"row": name, "niqe": 5.0} for name in names))
    return store_of(tmp_path_factory.mktemp("unguarded"), inventory)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.reason)
def test_a_gate_rejects_under_a_strict_limit_and_none_does_under_loose_ones(unguarded: Store, gate: Gate) -> None:
    limits = LOOSE | {gate.limit: STRICT[gate.limit]}
    rows = verdicts(unguarded, *(f"select.{name}={value}" for name, value in limits.items()))
    assert {row["reason"] for row in rows.values()} & {gate.reason for gate in GATES} == {gate.reason}


def test_the_larger_copy_is_kept_whatever_its_name(demo: Store) -> None:
    # Without the gate on its side the 64-pixel astronaut is a near copy too, and the smallest.
    rows = verdicts(demo, "select.min_side=1", "select.max_blockiness=100.0")
    assert rows["astronaut_tiny.png"]["reason"] == "near_duplicate"
    assert rows["astronaut_tiny.png"]["partner"] == "source-0/astronaut.png"


def test_the_order_of_the_listing_decides_only_between_equals(demo: Store, tmp_path: Path) -> None:
    inventory = demo_inventory()
    backwards = inventory.take(list(reversed(range(inventory.num_rows))))
    forward, reverse = verdicts(demo), verdicts(store_of(tmp_path, backwards, demo_inventory(guard=True)))
    differing = {name for name in forward if forward[name]["verdict"] != reverse[name]["verdict"]}
    assert differing == {"rocket.jpg", "rocket_copy.jpg"}


def test_without_a_guard_nothing_leaks(tmp_path: Path) -> None:
    assert verdicts(store_of(tmp_path, demo_inventory()))["coffee_leak.jpg"]["verdict"] == "kept"


def test_an_empty_inventory_gives_an_empty_selection(tmp_path: Path) -> None:
    store = store_of(tmp_path, demo_inventory().slice(0, 0))
    assert select(demo_config(), store)["inputs"] == 0
    assert read_table(store, SELECTION).schema == SELECTION_SCHEMA


def test_select_writes_what_was_judged_and_counts_it(tmp_path: Path) -> None:
    store = store_of(tmp_path, demo_inventory(), demo_inventory(guard=True))
    facts = select(demo_config(), store)
    written = read_table(store, SELECTION)
    said: list[str] = []
    assert written == pa.concat_tables(judge(demo_config(), store, said.append)).combine_chunks()
    assert said[-3:] == [f"{len(written)} rows of the inventory read", "looking for leaks", "looking for copies"]
    counts = count_verdicts(written)
    assert {name: facts[name] for name in counts} == counts
    assert counts["inputs"] == 23 == counts["kept"] + sum(counts["rejected"].values()) + sum(counts["failed"].values())
    assert counts["kept"] == 12 and counts["rejected"]["blurred"] == 2 and counts["failed"]["damaged"] == 1
    assert facts["tiles"] == sum(len(tiles) for tiles in written.column("tiles").to_pylist())
    assert facts["guard_pictures"] == 3 and facts["guard_pictures_unusable"] == []


def test_the_file_does_not_depend_on_how_the_scan_cut_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Row groups of a few rows, so that parts end within them, and they within parts.
    monkeypatch.setattr("datagen.select.select._ROWS_AT_A_TIME", 7)
    written = set()
    for rows_per_part in (1, 4, 100):
        folder = tmp_path / str(rows_per_part)
        select(demo_config(), store_of(folder, demo_inventory(), demo_inventory(guard=True), rows_per_part))
        written.add(hashlib.sha256((folder / SELECTION).read_bytes()).hexdigest())
    assert len(written) == 1
    metadata = pq.read_metadata(tmp_path / "4" / SELECTION)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [7, 7, 7, 2]


def test_without_an_inventory_it_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="datagen scan"):
        select(demo_config(), open_store(tmp_path))


def test_a_picture_without_a_good_tile_is_rejected(demo: Store) -> None:
    rows = verdicts(demo, "tiles.min_laplacian_variance=1e6")
    assert rows["astronaut.png"]["reason"] == "no_good_tile"
    assert rows["coins.png"]["verdict"] == "kept"  # Whole: below 512 pixels it is not cut.


def as_batch(table: pa.Table, batch: int) -> pa.Table:
    column = table.schema.get_field_index("batch")
    return table.set_column(column, "batch", pa.array([batch] * table.num_rows, pa.int32()))


def test_verdicts_of_a_batch_do_not_depend_on_later_ones(tmp_path: Path) -> None:
    # The first batch holds the poorer copies; the second their originals, which would win within one batch.
    inventory, guard = demo_inventory(), demo_inventory(guard=True)
    poor = {"astronaut_reencoded.jpg", "gravel_mirrored.jpg", "rocket_copy.jpg", "coffee_leak.jpg", "brick.png"}
    poorer = pa.array([key in poor for key in inventory.column("key").to_pylist()])
    first = as_batch(inventory.filter(poorer), 0)
    second = as_batch(inventory, 1)
    alone = verdicts(store_of(tmp_path / "one", first, guard))
    both = pa.concat_tables(judge(demo_config(), store_of(tmp_path / "two", pa.concat_tables([first, second]), guard)))
    assert both.slice(0, first.num_rows).to_pylist() == list(alone.values())
    assert alone["gravel_mirrored.jpg"]["verdict"] == "kept"
    later = {row["source"].split("/")[1]: row for row in both.slice(first.num_rows).to_pylist()}
    assert later["gravel.png"]["partner"] == "source-0/gravel_mirrored.jpg"
    assert later["brick.png"]["reason"] == later["rocket.jpg"]["reason"] == "exact_duplicate"
    assert later["camera.png"]["verdict"] == "kept" and later["camera.png"]["batch"] == 1


def test_equal_pixels_in_another_file_are_an_exact_duplicate(tmp_path: Path) -> None:
    inventory = demo_inventory()
    twin = edited(inventory, {"row": "brick.png", "source": "source-0/twin.png", "sha256": "ab" * 32})
    rows = verdicts(store_of(tmp_path, pa.concat_tables([inventory, twin])))
    assert rows["twin.png"]["reason"] == "exact_duplicate"
    assert rows["twin.png"]["detail"] == "the same pixels in another file"
    assert rows["twin.png"]["partner"] == "source-0/brick.png"


def test_a_missing_measure_rejects_nothing(tmp_path: Path) -> None:
    names = [gate.measure for gate in GATES if gate.measure in demo_inventory().schema.names]
    blank = [{"row": "camera.png", **dict.fromkeys(names, value)} for value in (None, math.nan)]
    for number, edit in enumerate(blank):
        if edit["laplacian_variance"] is not None:
            edit["jpeg_quality"] = None  # An integer has no NaN.
        store = store_of(tmp_path / str(number), edited(demo_inventory(), edit))
        strict = [f"select.{gate.limit}={STRICT[gate.limit]}" for gate in GATES if gate.measure in names]
        assert verdicts(store, *strict)["camera.png"]["verdict"] == "kept"


@pytest.fixture
def remove() -> Callable[..., None]:
    """Take a picture of the demo down: on the list, and without what shows it."""

    def take_down(store: Store, name: str, dealt: bool = True) -> None:
        inventory = demo_inventory()
        sha256 = edited(inventory, {"row": name}).column("sha256")[0].as_py()
        hidden = [
            {"row": key, **({"grey_thumb": None, "thumbnail": None} if digest == sha256 else {})}
            for key, digest in zip(inventory.column("key").to_pylist(), inventory.column("sha256").to_pylist())
        ]
        store_of(Path(store.uri), edited(inventory, *hidden), demo_inventory(guard=True))
        write_json(
            store,
            REMOVED,
            {"pictures": [{"sha256": sha256, "source": f"source-0/{name}", "note": "asked", "dealt": dealt}]},
        )

    return take_down


def test_a_picture_taken_down_keeps_its_tiles_and_its_copies_stay_rejected(
    demo: Store, tmp_path: Path, remove: Callable[..., None]
) -> None:
    before, store = verdicts(demo), open_store(tmp_path)
    remove(store, "gravel.png")
    after = verdicts(store)
    gravel = after["gravel.png"]
    assert (gravel["verdict"], gravel["reason"], gravel["detail"]) == ("rejected", "removed", "asked")
    assert len(gravel["tiles"]) == 4 and gravel["tiles"] == before["gravel.png"]["tiles"]
    copy = after["gravel_mirrored.jpg"]
    assert (copy["reason"], copy["partner"], copy["correlation"]) == ("near_duplicate", "source-0/gravel.png", None)
    rest = before.keys() - {"gravel.png", "gravel_mirrored.jpg"}
    assert {name: after[name] for name in rest} == {name: before[name] for name in rest}


def test_copies_with_the_file_of_a_picture_taken_down_are_removed_and_have_no_tiles(
    tmp_path: Path, remove: Callable[..., None]
) -> None:
    store = open_store(tmp_path)
    remove(store, "rocket.jpg")
    rows = verdicts(store)
    assert rows["rocket.jpg"]["reason"] == rows["rocket_copy.jpg"]["reason"] == "removed"
    assert rows["rocket.jpg"]["tiles"] and not rows["rocket_copy.jpg"]["tiles"]
    assert rows["rocket_copy.jpg"]["partner"] is None
    remove(store, "rocket_truncated.jpg")
    assert verdicts(store)["rocket_truncated.jpg"]["verdict"] == "failed"


def test_an_evaluation_picture_taken_down_in_the_corpus_is_still_no_leak_of_pixels(
    tmp_path: Path, remove: Callable[..., None]
) -> None:
    store = open_store(tmp_path)
    remove(store, "coffee_leak.jpg", dealt=False)
    row = verdicts(store)["coffee_leak.jpg"]
    assert (row["verdict"], row["reason"], row["tiles"]) == ("rejected", "removed", [])


def test_verdicts_do_not_depend_on_the_order_within_numpy_blocks(tmp_path: Path) -> None:
    """Many rows over many parts: every row gets the verdict that it gets in a store of few."""
    rng = np.random.default_rng(0)
    inventory = demo_inventory()
    shuffled = rng.permutation(np.tile(np.arange(inventory.num_rows), 3))
    copies = inventory.take(pa.array(shuffled))
    rows = pa.concat_tables(judge(demo_config(), store_of(tmp_path, copies))).to_pylist()
    single = verdicts(store_of(tmp_path / "single", inventory))
    first = {}
    for row in rows:
        name = row["source"].split("/")[1]
        if name not in first:
            first[name] = row
            continue
        expected = {"kept": "exact_duplicate", "near_duplicate": "exact_duplicate"}
        alone = single[name]["reason"] or "kept"
        assert row["reason"] == expected.get(alone, alone), name
