import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow.compute as pc
import pytest

from datagen.config import SelectConfig
from datagen.dataset import read_table
from datagen.select.gates import bounds, first_rejection
from datagen.select.sweep import SWEEP, SWEEP_PLOT, SWEEP_SCHEMA, sweep, sweep_limits
from infra.config import ConfigError
from infra.storage import Store
from tests.datagen.select.inventories import demo_config, demo_inventory, store_of


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("demo"), demo_inventory())


def random_measures(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {}
    for gate in bounds(SelectConfig()):
        usual = (gate.limit if np.isfinite(gate.limit) else 5.0) * (2 if gate.lower else 0.5)
        values[gate.measure] = usual * rng.gamma(8, 1 / 8, count)
    values["jpeg_quality"][rng.random(count) < 0.3] = np.nan
    return values | {"width": np.ones(count)}


def test_a_swept_limit_keeps_what_it_keeps_when_it_is_configured() -> None:
    values, megapixels = random_measures(500), np.random.default_rng(1).gamma(2, 2, 500)
    config = SelectConfig()
    swept = sweep_limits(values, megapixels, config, points=6)
    assert set(swept.column("gate").to_pylist()) == {gate.reason for gate in bounds(config)}
    for row in swept.to_pylist():
        gates = [g._replace(limit=row["limit"]) if g.reason == row["gate"] else g for g in bounds(config)]
        passes = first_rejection(values, gates)[0] < 0
        alone = first_rejection(values, [g for g in gates if g.reason != row["gate"]])[0] < 0
        assert row["pictures"] == passes.sum()
        assert row["megapixels"] == pytest.approx(megapixels[passes].sum())
        assert row["rejected_alone"] == alone.sum() - passes.sum()


def test_the_configured_limit_is_among_those_tried() -> None:
    swept = sweep_limits(random_measures(300), np.ones(300), SelectConfig(min_entropy=4.25), points=5)
    configured = {row["gate"]: row for row in swept.to_pylist() if row["configured"]}
    assert configured["low_entropy"]["limit"] == 4.25
    assert "high_niqe" not in configured and "high_niqe" in swept.column("gate").to_pylist()
    assert len({row["pictures"] for row in configured.values()}) == 1


def test_a_minimum_keeps_less_as_it_rises_and_a_maximum_more() -> None:
    swept = sweep_limits(random_measures(300), np.ones(300), SelectConfig()).to_pylist()
    for gate in bounds(SelectConfig()):
        kept = [row["pictures"] for row in swept if row["gate"] == gate.reason]
        assert kept == sorted(kept, reverse=gate.lower) and kept[0] != kept[-1]


def test_the_command_leaves_a_table_and_a_plot_and_touches_nothing_else(demo: Store) -> None:
    before = {entry.key: entry.version for entry in demo.list()}
    text = sweep(demo_config(), demo)
    after = {entry.key: entry.version for entry in demo.list()}
    written = [demo.read(key) for key in (SWEEP, SWEEP_PLOT)]
    assert sweep(demo_config(), demo) == text and [demo.read(key) for key in (SWEEP, SWEEP_PLOT)] == written
    assert after.items() >= before.items() and after.keys() - before.keys() == {SWEEP, SWEEP_PLOT}
    assert "21 measured pictures" in text and "duplicates" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert ">= 50" in lines["blurred"] and "<= 1.6" in lines["blocky"]
    table = read_table(demo, SWEEP)
    assert table.schema == SWEEP_SCHEMA
    blurred = [row for row in table.to_pylist() if row["gate"] == "blurred" and row["configured"]]
    assert blurred[0]["rejected_alone"] == 2  # astronaut_blurred.png and retina.jpg have no other fault.
    picture = cv2.imdecode(np.frombuffer(demo.read(SWEEP_PLOT), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape[0] > 500 and picture.std() > 5


def test_a_score_that_was_not_taken_is_refused(demo: Store) -> None:
    with pytest.raises(ConfigError, match=r"scan\.scores\.taste"):
        sweep(demo_config("select.scores={taste: {min: 1}}"), demo)


def test_an_inventory_without_measured_pictures_can_be_swept(tmp_path: Path) -> None:
    unmeasured = demo_inventory().filter(pc.not_equal(demo_inventory().column("verdict"), "measured"))
    store = store_of(tmp_path, unmeasured)
    assert "0 measured pictures" in sweep(demo_config(), store)
    assert read_table(store, SWEEP).num_rows == 0
    assert io.BytesIO(store.read(SWEEP_PLOT)).read(4) == b"\x89PNG"
