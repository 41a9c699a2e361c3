import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datagen.config import DatagenConfig, ScanConfig
from datagen.dataset import read_json
from datagen.picture.perceptual_hash import hashes
from datagen.scan.inventory import INVENTORY_SCHEMA, read_inventory
from datagen.scan.scan import Piece, scan, scan_piece
from datagen.source.embedded import corpus_files
from datagen.source.listing import Picture
from infra.storage import StorageError, open_store


def rows(out: Path, *, guard: bool = False) -> dict[str, dict[str, Any]]:
    table = read_inventory(open_store(out), INVENTORY_SCHEMA.names, guard=guard)
    return {row["key"]: row for row in table.to_pylist()}


def test_every_file_has_one_row_with_its_fate(built: Path) -> None:
    inventory = rows(built)
    assert list(inventory) == sorted(corpus_files("pictures"))
    failed = {key: row["reason"] for key, row in inventory.items() if row["verdict"] == "failed"}
    assert failed == {"rocket_truncated.jpg": "damaged", "text.png": "not_a_picture"}
    assert all(row["error"] for row in inventory.values() if row["verdict"] == "failed")
    assert set(rows(built, guard=True)) == {"chelsea.png", "coffee.png", "flower.jpg"}


def test_a_measured_row_describes_its_picture(built: Path) -> None:
    row = rows(built)["rocket.jpg"]
    data = corpus_files("pictures")["rocket.jpg"]
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert (row["format"], row["width"], row["height"], row["mode"]) == ("JPEG", 640, 427, "RGB")
    assert row["bits_per_pixel"] == pytest.approx(len(data) * 8 / (640 * 427))
    assert row["conversions"] == ["icc_to_srgb"]
    assert len(row["cell_laplacian_variance"]) == len(row["cell_flat_fraction"]) == (640 // 128) * (427 // 128)
    thumb = np.frombuffer(row["grey_thumb"], np.uint8).reshape(32, 32)
    assert row["phash"] == hashes(thumb).tolist()
    assert Image.open(io.BytesIO(row["thumbnail"])).size == (160, 107)


def test_a_second_scan_decodes_nothing_and_a_changed_file_only_its_piece(
    ray_cluster: None, photographs: Path, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    out = tmp_path / "out"
    config = make_config(out, [f"source={photographs}", "leak_guard=[]", "scan.pictures_per_piece=1"])
    store = open_store(out)
    assert scan(config, store)["work"]["images"] == 4
    before = read_json(store, "curation/inventory.json")
    assert "work" not in scan(config, store)
    (photographs / "camera.png").write_bytes(corpus_files("pictures")["gravel.png"])
    assert scan(config, store)["work"]["images"] == 1
    after = read_json(store, "curation/inventory.json")
    same = [old == new for old, new in zip(before["parts"], after["parts"])]
    assert same == [True, False, True, True]
    # Parts of files that are gone are gone too.
    assert {entry.key for entry in store.list("curation/inventory/")} == {part["key"] for part in after["parts"]}


def test_a_damaged_part_is_scanned_again(photographs: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "out")
    picture = Picture("s/coins.png", str(photographs), "coins.png", 75825, "1", "")
    piece = Piece((picture,), 0, ScanConfig(), store)
    first = scan_piece(piece)
    assert first.fresh and not scan_piece(piece).fresh
    data = store.read(piece.part)
    store.write(piece.part, data[:-20])
    again = scan_piece(piece)
    assert again.fresh and again.sha256 == first.sha256
    # One that still reads as a table, but is not what the manifest says: a bit of its values was flipped.
    store.write(piece.part, data[:200] + bytes([data[200] ^ 1]) + data[201:])
    again = scan_piece(dataclasses.replace(piece, known=(first.key, first.sha256)))
    assert again.fresh and store.read(piece.part) == data


def test_too_small_a_picture_is_not_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 400), "red").save(buffer, "PNG")
    (tmp_path / "thin.png").write_bytes(buffer.getvalue()[:-30])  # Damaged, which only a decode would find.
    picture = Picture("s/thin.png", str(tmp_path), "thin.png", 1, "1", "")
    scan_piece(Piece((picture,), 0, ScanConfig(), store := open_store(tmp_path / "out")))
    part = next(iter(store.list("curation/inventory/")))
    row = pq.read_table(io.BytesIO(store.read(part.key))).to_pylist()[0]
    assert (row["verdict"], row["stage"], row["reason"], row["width"]) == ("rejected", "header", "too_small", 20)


def test_a_file_that_vanished_is_a_row_but_a_store_that_is_away_is_an_error(tmp_path: Path) -> None:
    store = open_store(tmp_path / "out")
    gone = Picture("s/gone.png", str(tmp_path), "gone.png", 1, "1", "")
    result = scan_piece(Piece((gone,), 0, ScanConfig(), store))
    assert (result.rows, result.measured) == (1, 0)
    unreachable = tuple(Picture(f"s/{i}", "nowhere://host", f"{i}.png", 1, "1", "") for i in range(2))
    with pytest.raises(StorageError, match="nor could the next 1 pictures"):
        scan_piece(Piece(unreachable, 0, ScanConfig(), store))
