import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datagen.config import SelectConfig
from datagen.select.gates import GATES, bounds, first_rejection, measures
from datagen.select.select import judge
from infra.config import ConfigError
from tests.datagen.select.inventories import demo_config, demo_inventory, store_of


def test_every_limit_of_the_configuration_has_a_gate() -> None:
    limits = {name for name in SelectConfig.model_fields if name.startswith(("min_", "max_"))}
    assert {gate.limit for gate in GATES} == limits


def test_the_first_gate_in_order_gives_the_reason_and_a_value_at_the_limit_passes() -> None:
    gates = [gate for gate in bounds(SelectConfig(min_side=100, max_aspect=2.0)) if gate.reason.startswith("too_")]
    values = {
        name: np.array(row)
        for name, row in {
            "width": [99, 100, 300, 90.0],
            "shorter_side": [99, 100, 100, 40.0],
            "aspect": [1.0, 2.0, 3.0, 9.0],
        }.items()
    }
    first, seen = first_rejection(values, gates)
    assert first.tolist() == [0, -1, 1, 0]
    assert seen[[0, 2, 3]].tolist() == [99, 3, 40] and math.isnan(seen[1])
    assert gates[1].detail(3.0) == "aspect 3 > 2"


def test_only_jpegs_are_judged_by_bits_per_pixel() -> None:
    inventory = demo_inventory()
    values = measures(inventory, SelectConfig())
    is_jpeg = np.array([kind == "JPEG" for kind in inventory.column("format").to_pylist()])
    assert is_jpeg.any() and np.isnan(values["jpeg_bits_per_pixel"][~is_jpeg]).all()
    jpegs = is_jpeg & (np.array(inventory.column("verdict").to_pylist()) == "measured")
    assert np.isfinite(values["jpeg_bits_per_pixel"][jpegs]).all()


def scored(scores: dict[str, dict[str, float]]) -> pa.Table:
    inventory = demo_inventory()
    column = [list(scores.get(key, {}).items()) for key in inventory.column("key").to_pylist()]
    index = inventory.schema.get_field_index("scores")
    return inventory.set_column(index, "scores", pa.array(column, inventory.schema.field("scores").type))


def test_learned_scores_have_gates_of_their_own(tmp_path: Path) -> None:
    low, high = {"beauty": 2.0, "clean": 0.5}, {"beauty": 8.0, "clean": 0.9}
    store = store_of(tmp_path, scored({"brick.png": low, "camera.png": high, "grass.png": {"clean": 0.1}}))

    def reasons(*limits: str) -> dict[str, tuple[str, str | None]]:
        selection = pa.concat_tables(judge(demo_config(*limits), store)).to_pylist()
        return {row["source"].split("/")[1]: (row["reason"], row["detail"]) for row in selection}

    found = reasons("select.scores={beauty: {min: 5}, clean: {max: 0.8}}")
    assert found["brick.png"] == ("score_beauty", "score_beauty 2 < 5")
    assert found["camera.png"] == ("score_clean", "score_clean 0.9 > 0.8")
    assert found["grass.png"] == ("", None)  # It has no beauty, and what has no measure is not rejected.
    assert found["coins.png"] == ("", None)
    with pytest.raises(ConfigError, match=r"select\.scores\.taste: .*scan\.scores\.taste"):
        reasons("select.scores={taste: {min: 5}}")


def test_slices_of_a_table_have_their_own_scores() -> None:
    table = scored({"brick.png": {"beauty": 2.0}, "camera.png": {"beauty": 8.0}})
    config = SelectConfig.model_validate({"scores": {"beauty": {"min": 1.0}}})
    whole = measures(table, config)["score_beauty"]
    assert np.nanmax(whole) == 8.0 and np.isnan(whole).sum() == table.num_rows - 2
    np.testing.assert_array_equal(measures(table.slice(4, 3), config)["score_beauty"], whole[4:7])
