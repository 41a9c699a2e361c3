"""Reading the failed pictures again: only those, and the manifest holds whenever this is killed."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import datagen.scan.retry
from datagen.config import DatagenConfig
from datagen.dataset import DatasetError, read_json
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory
from datagen.scan.retry import rescan_failed
from datagen.scan.scan import scan
from datagen.source.batches import read_batches
from infra.storage import Store, open_store
from tests.datagen.scan.test_faults import png

MakeConfig = Callable[..., DatagenConfig]


def rows_of(store: Store, *, guard: bool = False) -> list[dict[str, Any]]:
    return read_inventory(store, INVENTORY_SCHEMA.names, guard=guard).to_pylist()


def require_consistent(store: Store) -> None:
    manifest = read_json(store, "curation/inventory.json")
    for part in [*manifest["parts"], *manifest["guard_parts"]]:
        assert hashlib.sha256(store.read(part["key"])).hexdigest() == part["sha256"]


@pytest.fixture
def scanned(ray_cluster: None, tmp_path: Path, make_config: MakeConfig) -> Iterator[tuple[DatagenConfig, Store, Path]]:
    """Six pictures in pieces of two, of which the fourth is damaged; an evaluation picture that is damaged too."""
    source, guard = tmp_path / "pictures", tmp_path / "guard"
    for folder, count in ((source, 6), (guard, 2)):
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.png").write_bytes(png(i))
    (source / "3.png").write_bytes(png(3)[:2000])
    (guard / "1.png").write_bytes(b"no picture")
    overrides = [f"source={source}", f"leak_guard={guard}", "scan.pictures_per_piece=2", "scan.niqe_patches=0"]
    config = make_config(tmp_path / "out", overrides)
    scan(config, store := open_store(config.out))
    assert [row["key"] for row in rows_of(store) if row["verdict"] == "failed"] == ["3.png"]
    yield config, store, source


def test_only_what_failed_is_read_again(scanned: tuple[DatagenConfig, Store, Path]) -> None:
    config, store, source = scanned
    before, parts = rows_of(store), read_json(store, "curation/inventory.json")["parts"]
    assert rescan_failed(config, store)["recovered"] == 0
    assert read_json(store, "curation/inventory.json")["parts"] == parts
    (source / "3.png").write_bytes(png(3))
    version = str((source / "3.png").stat().st_mtime_ns)
    # Were anything else read, it would fail now.
    kept = {path: path.read_bytes() for path in source.iterdir() if path.name != "3.png"}
    times = {path: path.stat().st_mtime_ns for path in kept}
    hidden = shutil.move(source / "2.png", source.parent / "2.png")
    facts = rescan_failed(config, store)
    shutil.move(hidden, source / "2.png")
    assert (facts["failed"], facts["recovered"], facts["batch"]) == (2, 1, None)
    after = rows_of(store)
    assert [row for row in after if row["key"] != "3.png"] == [row for row in before if row["key"] != "3.png"]
    assert (after[3]["verdict"], after[3]["version"], after[3]["batch"]) == ("measured", version, 0)
    assert [row["verdict"] for row in rows_of(store, guard=True)] == ["measured", "failed"]
    require_consistent(store)
    changed = read_json(store, "curation/inventory.json")["parts"]
    assert [old == new for old, new in zip(parts, changed)] == [True, False, True]
    # The listing on record is what the sources hold now: a scan finds everything done, and leaves it so.
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert "work" not in scan(config, store)
    assert read_json(store, "curation/inventory.json")["parts"] == changed
    assert rows_of(store) == after


def test_what_recovers_after_a_dataset_was_packed_is_a_batch_of_its_own(
    scanned: tuple[DatagenConfig, Store, Path],
) -> None:
    config, store, source = scanned
    store.write("dataset.json", b"{}")
    (source / "3.png").write_bytes(png(3))
    assert rescan_failed(config, store)["batch"] == 1
    rows = rows_of(store)
    assert [row["batch"] for row in rows] == [0, 0, 0, 1, 0, 0]
    # The number is taken, so the next pictures added get another.
    assert [len(batch) for batch in read_batches(store)] == [6, 0]
    assert "work" not in scan(config, store)
    assert rows_of(store) == rows


def test_killed_before_the_manifest_it_starts_from_what_holds(
    scanned: tuple[DatagenConfig, Store, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store, source = scanned
    before = rows_of(store)
    store.write("dataset.json", b"{}")
    (source / "3.png").write_bytes(png(3))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("write_batches", "publish_manifest"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(datagen.scan.retry, step, killed)
            rescan_failed(config, store)
        require_consistent(store)
        assert rows_of(store) == before
    facts = rescan_failed(config, store)
    assert facts["recovered"] == 1
    require_consistent(store)
    rows = rows_of(store)
    assert [row["verdict"] for row in rows] == ["measured"] * 6
    assert rows[3]["batch"] == facts["batch"] > 0
    listed = {part["key"] for part in read_json(store, "curation/inventory.json")["parts"]}
    assert listed <= {entry.key for entry in store.list("curation/inventory/")}
    assert len(list(store.list("curation/inventory/"))) == len(listed) + 1  # One of the guard.


def test_other_settings_or_a_damaged_part_are_refused(
    scanned: tuple[DatagenConfig, Store, Path], make_config: MakeConfig
) -> None:
    config, store, _ = scanned
    other = config.model_copy(update={"scan": config.scan.model_copy(update={"min_side": 40})})
    with pytest.raises(DatasetError, match="other settings in scan"):
        rescan_failed(other, store)
    key = read_json(store, "curation/inventory.json")["parts"][1]["key"]
    store.write(key, store.read(key)[:-1] + b"x")
    with pytest.raises(DatasetError, match=f"{key}: damaged"):
        rescan_failed(config, store)
    with pytest.raises(DatasetError, match="no inventory"):
        rescan_failed(config, open_store(str(Path(store.uri) / "elsewhere")))
