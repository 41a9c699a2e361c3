import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from datagen.build import build, remove
from datagen.config import DatagenConfig
from datagen.dataset import REMOVED, SELECTION, DatasetError, read_dataset_json, read_samples, read_table
from datagen.scan.inventory import REMEMBERING, read_inventory
from datagen.source.embedded import corpus_files
from datagen.verify import verify
from infra.storage import open_store
from tests.datagen.conftest import run_datagen, shard_bytes

MakeConfig = Callable[..., DatagenConfig]
TARGET = "source-0/astronaut.png"


@pytest.fixture
def taken_down(ray_cluster: None, copied: Path, make_config: MakeConfig) -> tuple[Path, dict[str, bytes]]:
    """The demo's dataset without one picture, and its shards as they were before."""
    before = shard_bytes(copied)
    assert remove(make_config(copied), [TARGET], "asked by its owner") == [
        TARGET,
        "source-0/astronaut_reencoded.jpg",
    ]
    return copied, before


def test_only_the_shards_that_held_it_are_rewritten_and_the_rest_of_them_is_the_same(
    taken_down: tuple[Path, dict[str, bytes]],
) -> None:
    out, before = taken_down
    after = shard_bytes(out)
    changed = {key for key in before if after.get(key) != before[key]}
    held = {f"shards/{row['shard']}" for row in _samples_in(before) if row["source"] == TARGET}
    assert changed == held and len(changed) < len(before)
    for key in changed & after.keys():
        members = {row["key"] for row in _samples_in({key: before[key]}) if row["source"] != TARGET}
        assert {row["key"] for row in _samples_in({key: after[key]})} == members
    store = open_store(out)
    assert TARGET not in read_samples(store).column("source").to_pylist()
    assert not any(check.faults for check in verify(store))


def _samples_in(shards: dict[str, bytes]) -> list[dict]:
    rows = []
    for key, data in shards.items():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    rows.append({**json.load(tar.extractfile(member)), "shard": key.removeprefix("shards/")})  # type: ignore[arg-type]
    return rows


def test_it_is_on_record_but_cannot_be_seen(taken_down: tuple[Path, dict[str, bytes]]) -> None:
    out, _ = taken_down
    store = open_store(out)
    record = json.loads(store.read(REMOVED))["pictures"]
    assert {picture["source"]: picture["note"] for picture in record}[TARGET] == "asked by its owner"
    inventory = {row["source"]: row for row in read_inventory(store, ["source", "sha256", *REMEMBERING]).to_pylist()}
    for source in (TARGET, "source-0/astronaut_reencoded.jpg"):
        assert [inventory[source][name] for name in REMEMBERING] == [None] * 4
    assert inventory["source-0/coins.png"]["thumbnail"] is not None
    rows = {row["source"]: row for row in read_table(store, SELECTION).to_pylist()}
    assert rows[TARGET]["reason"] == "removed"
    assert read_dataset_json(store)["totals"]["rejected"]["removed"] == 2
    # Its copy does not take its place.
    assert rows["source-0/astronaut_reencoded.jpg"]["verdict"] == "rejected"


def test_a_build_and_a_lost_part_do_not_bring_it_back(
    taken_down: tuple[Path, dict[str, bytes]], make_config: MakeConfig
) -> None:
    out, _ = taken_down
    after = shard_bytes(out)
    for part in (out / "curation" / "inventory").iterdir():
        part.unlink()
    store = build(make_config(out))
    assert shard_bytes(out) == after
    inventory = {row["source"]: row for row in read_inventory(store, ["source", "thumbnail"]).to_pylist()}
    assert inventory[TARGET]["thumbnail"] is None


def test_an_unknown_picture_changes_nothing(ray_cluster: None, copied: Path, make_config: MakeConfig) -> None:
    before = shard_bytes(copied)
    with pytest.raises(DatasetError, match=r"'nowhere\.jpg' is no picture of this corpus; nothing was taken down"):
        remove(make_config(copied), [TARGET, "nowhere.jpg"], "")
    assert shard_bytes(copied) == before and not (copied / REMOVED).exists()


def test_the_command_finds_a_file_by_its_content(copied: Path, tmp_path: Path) -> None:
    local = tmp_path / "some name.png"
    local.write_bytes(corpus_files("pictures")["coins.png"])
    done = run_datagen("remove", f"out={copied}", str(local), "--note", "licence withdrawn")
    assert done.returncode == 0, done.stderr
    assert "taken down: source-0/coins.png" in done.stdout
