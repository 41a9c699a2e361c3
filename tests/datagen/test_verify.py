import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datagen.dataset import DatasetError
from datagen.verify import table, verify
from infra.storage import open_store


def faults(out: Path) -> list[str]:
    return [fault for check in verify(open_store(out)) for fault in check.faults]


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_an_untouched_dataset_holds_and_the_table_says_so(built: Path) -> None:
    checks = verify(open_store(built))
    assert not any(check.faults for check in checks)
    text = table(checks)
    assert text.count("ok  ") == len(checks) == 7
    assert "23 inputs = 12 kept + 9 rejected + 2 failed" in text


def test_one_flipped_bit_names_the_shard_and_the_command_that_repairs_it(copied: Path) -> None:
    flip_byte(copied / "shards" / "ird-000001.tar", 3000)
    (fault,) = faults(copied)
    assert "shards/ird-000001.tar: damaged" in fault
    # Of a copy the configuration on record names another place, and this one is to be repaired.
    assert f"python -m datagen pack --shard ird-000001.tar out={copied}`" in fault


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "shards" / "ird-000000.tar").unlink(), "ird-000000.tar: missing"),
        (lambda out: (out / "shards" / "ird-000009.tar").write_bytes(b"x"), "ird-000009.tar: in no table"),
        (lambda out: flip_byte(out / "curation" / "selection.parquet", -1), "datagen build"),
        (lambda out: flip_byte(next((out / "curation" / "inventory").iterdir()), 50), "damaged"),
        (lambda out: (out / "samples.parquet").unlink(), "samples.parquet"),
    ],
    ids=["shard gone", "shard too many", "selection", "inventory", "samples gone"],
)
def test_damage_is_found(copied: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copied)
    try:
        found = " ".join(faults(copied))
    except (DatasetError, OSError) as error:
        found = str(error)
    assert message in found


def forge(out: Path, name: str, change: Callable[[list[dict]], object]) -> None:
    """Change a table and make dataset.json agree, as an error in the code that writes both would."""
    import hashlib

    path = out / name
    old = pq.read_table(path)
    rows = old.to_pylist()
    change(rows)
    pq.write_table(old.from_pylist(rows, schema=old.schema), path)
    description = json.loads((out / "dataset.json").read_text())
    description["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("samples.parquet", lambda rows: rows[0].update(key=rows[1]["key"]), "occurs 2 times"),
        ("samples.parquet", lambda rows: rows[0].update(key="a.b"), "holds a dot"),
        ("samples.parquet", lambda rows: rows[0].update(source="source-0/nowhere.png"), "not in the inventory"),
        ("samples.parquet", lambda rows: rows[0].update(x=1), "was not selected"),
        ("samples.parquet", lambda rows: rows.pop(), "is in no shard"),
        ("samples.parquet", lambda rows: rows[0].update(sha256="0" * 64), "does not have its sha256"),
        ("samples.parquet", lambda rows: rows[0].update(offset=0), "not those of samples.parquet"),
        ("shards.parquet", lambda rows: rows[0].update(sha256="0" * 64), "damaged"),
        ("curation/selection.parquet", lambda rows: rows.pop(), "do not list the same pictures"),
        ("curation/selection.parquet", lambda rows: rows[-1].update(verdict="failed", reason=""), "without a reason"),
    ],
)
def test_tables_that_contradict_each_other_are_found(
    copied: Path, name: str, change: Callable[[list[dict]], object], message: str
) -> None:
    forge(copied, name, change)
    assert message in " ".join(faults(copied))
