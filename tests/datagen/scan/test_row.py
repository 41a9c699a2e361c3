import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from datagen.config import DatagenConfig, ScanConfig, SelectConfig
from datagen.dataset import canonical_json
from datagen.picture.decode import decode, read_header
from datagen.picture.niqe import load_model, niqe
from datagen.picture.perceptual_hash import center_hash
from datagen.picture.quality import WHOLE_PICTURE_MEASURES, luma
from datagen.scan.inventory import INVENTORY_SCHEMA
from datagen.scan.row import caption_of, measure_picture, require_measures, row_of
from datagen.scan.scan import guard_limits, scan
from datagen.select.gates import GATES
from datagen.source.embedded import corpus_files
from datagen.source.listing import Member, Picture
from infra.config import ConfigError
from infra.storage import open_store
from tests.datagen.scan.test_faults import RED, SCORES, png


def jpeg(width: int, height: int, quality: int = 90) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def picture(folder: Path, data: bytes) -> Picture:
    (folder / "a.jpg").write_bytes(data)
    return Picture("s/a.jpg", str(folder), "a.jpg", len(data), "1", "")


def test_no_byte_of_a_file_beyond_the_size_limits_is_read(tmp_path: Path) -> None:
    nowhere = Picture("s/a.jpg", str(tmp_path), "a.jpg", 5000, "1", "")
    small = row_of(nowhere, ScanConfig(min_bytes=5001), 0)
    large = row_of(nowhere, ScanConfig(max_bytes=4999), 0)
    assert [(row["verdict"], row["stage"], row["reason"], row["bytes"]) for row in (small, large)] == [
        ("rejected", "read", "too_few_bytes", 5000),
        ("rejected", "read", "too_many_bytes", 5000),
    ]
    assert row_of(nowhere, ScanConfig(min_bytes=5000, max_bytes=5000), 0)["reason"] == "missing"


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"min_side": 65}, "too_small"),
        ({"max_aspect": 1.9}, "too_elongated"),
        ({"min_jpeg_quality": 91}, "low_jpeg_quality"),
        ({"min_bits_per_pixel": 20.0}, "low_bits_per_pixel"),
    ],
)
def test_the_header_gates_of_select_reject_before_any_pixel_is_decoded(limit: dict[str, Any], reason: str) -> None:
    data = jpeg(128, 64)
    # Half of the file: damaged, which only a decode would find.
    row = measure_picture(data[: len(data) // 2], ScanConfig(**limit))
    assert (row["verdict"], row["stage"], row["reason"]) == ("rejected", "header", reason)
    assert (row["width"], row["height"], row["jpeg_quality"]) == (128, 64, 90)
    assert measure_picture(data[: len(data) // 2], ScanConfig())["reason"] == "damaged"
    (gate,) = [gate for gate in GATES if gate.reason == reason]
    assert gate.limit in limit and gate.limit in SelectConfig.model_fields


def test_the_jpeg_gates_say_nothing_of_other_formats() -> None:
    row = measure_picture(png(0), ScanConfig(min_jpeg_quality=100, min_bits_per_pixel=100.0))
    assert row["verdict"] == "measured"


def test_no_gate_holds_for_the_leak_guard() -> None:
    limits = ScanConfig(
        min_bytes=10**6, max_aspect=1.0, min_jpeg_quality=100, min_bits_per_pixel=99.0, scores={"x": "a:b"}
    )
    row = measure_picture(jpeg(128, 17), guard_limits(limits))
    assert (row["verdict"], row["niqe"], len(row["phash"])) == ("measured", None, 8)


def test_every_measure_is_that_of_its_own_module() -> None:
    data = corpus_files("pictures")["rocket.jpg"]
    row = measure_picture(data, ScanConfig())
    pixels, _ = decode(data, read_header(data, 10**8))
    grey = luma(pixels)
    assert row["niqe"] == niqe(grey, load_model(), 32)
    assert row["center_phash"] == center_hash(grey)
    cells = (640 // 128) * (427 // 128)
    assert {len(row[f"cell_{name}"]) for name in WHOLE_PICTURE_MEASURES} == {cells}
    assert measure_picture(data, ScanConfig(niqe_patches=0))["niqe"] is None
    # What the row holds, a table of the inventory can hold.
    table = pa.Table.from_pylist([dict.fromkeys(INVENTORY_SCHEMA.names) | row], schema=INVENTORY_SCHEMA)
    assert table["center_phash"].to_pylist() == [row["center_phash"]]


def test_a_member_of_a_tar_brings_its_caption_and_fields(tmp_path: Path) -> None:
    files = {
        "7.jpg": jpeg(64, 64),
        "7.txt": "a crane \u2014 grey\n".encode(),
        "7.json": b'{"url": "u", "caption": "other"}',
    }
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with tarfile.open(tmp_path / "0.tar") as tar:
        spans = {entry.name: (entry.offset_data, entry.size) for entry in tar}
    for gap in (0, 10**6):  # Side by side, and far apart.
        if gap:
            tail = (tmp_path / "0.tar").read_bytes()
            (tmp_path / "0.tar").write_bytes(tail + bytes(gap) + files["7.json"])
            spans["7.json"] = (len(tail) + gap, len(files["7.json"]))
        member = Member("0.tar", spans["7.jpg"][0], spans["7.txt"], spans["7.json"])
        row = row_of(
            Picture("s/0.tar/7.jpg", str(tmp_path), "0.tar/7.jpg", spans["7.jpg"][1], "1", "", member), ScanConfig(), 0
        )
        assert (row["verdict"], row["container"], row["offset"]) == ("measured", "0.tar", spans["7.jpg"][0])
        assert (row["caption"], row["fields"]) == ("a crane \u2014 grey", '{"caption":"other","url":"u"}')


def test_fields_are_spelled_one_way_and_broken_ones_are_none() -> None:
    fields = {"b": 1, "a": ["\u00e9", None], "caption": "said"}
    for spelling in (json.dumps(fields), json.dumps(fields, ensure_ascii=False, indent=4)):
        assert caption_of(None, spelling.encode()) == {"caption": "said", "fields": canonical_json(fields).decode()}
    broken = [b"", b"{", b"\xff", b'{"a": "\\ud800"}', b"[" * 100_000, b"null"]
    assert [caption_of(None, data) for data in broken] == [{"caption": None, "fields": None}] * len(broken)
    assert caption_of(b"\xff!", b"[]") == {"caption": "\ufffd!", "fields": "[]"}
    assert caption_of(None, b'{"caption": 3}')["caption"] is None


def test_learned_scores_are_called_with_the_pixels() -> None:
    scores = {"light": f"{SCORES}:brightness", "also": "numpy:max"}
    row = measure_picture(png(3), ScanConfig(scores=scores))
    pixels = np.array(Image.open(io.BytesIO(png(3))))
    assert row["scores"] == [("also", float(pixels.max())), ("light", pixels.mean())]
    assert measure_picture(png(3), ScanConfig())["verdict"] == "measured"


@pytest.mark.parametrize(
    ("score", "corner", "text"),
    [("complain", RED, "it: RuntimeError: no red, please"), ("nothing", (0, 0, 0), "it: returned nan")],
)
def test_a_score_that_fails_is_a_row_with_its_text(score: str, corner: tuple[int, ...], text: str) -> None:
    row = measure_picture(png(0, corner), ScanConfig(scores={"it": f"{SCORES}:{score}"}))
    assert (row["verdict"], row["stage"], row["reason"], row["error"]) == ("failed", "measure", "score_failed", text)
    assert row["laplacian_variance"] > 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        (f"{SCORES}:brightnes", "has no attribute 'brightnes'"),
        (f"{SCORES}:NOT_A_FUNCTION", "is a int, not a function"),
        (SCORES, "expected module:function"),
    ],
)
def test_a_score_that_cannot_be_loaded_is_refused_before_any_work(target: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(0))
    config = DatagenConfig(
        source=[{"uri": str(tmp_path / "in")}], out=str(tmp_path / "out"), scan={"scores": {"nima": target}}
    )
    with pytest.raises(ConfigError, match=f"^scan.scores.nima: .*{said}"):
        scan(config, open_store(config.out))
    assert not (tmp_path / "out").exists()


def test_a_niqe_model_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    for name in ("model.json", "absent.json"):
        with pytest.raises(ConfigError, match=rf"^scan.niqe_model: .*{name}"):
            require_measures(ScanConfig(niqe_model=str(tmp_path / name)))
