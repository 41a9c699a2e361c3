import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from datagen.build import build
from datagen.config import DatagenConfig
from datagen.dataset import DatasetError, read_dataset_json, read_samples
from datagen.pack.pack import pack, repair_shard
from datagen.picture.decode import decode, read_header
from datagen.source.embedded import corpus_files
from infra.storage import open_store
from tests.datagen.conftest import shard_bytes


def test_plain_webdataset_reads_every_shard(built: Path) -> None:
    shards = [str(path) for path in sorted((built / "shards").iterdir())]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    samples = read_samples(open_store(built)).to_pylist()
    assert [sample["__key__"] for sample in read] == [row["key"] for row in samples]
    for sample, row in zip(read, samples):
        suffix = row["member"].rpartition(".")[2]
        assert Image.open(io.BytesIO(sample[suffix])).size == (row["width"], row["height"])
        assert json.loads(sample["json"])["crop"] == [row[name] for name in ("x", "y", "width", "height")]


def test_members_are_the_pixels_of_their_sources(built: Path) -> None:
    store = open_store(built)
    for row in read_samples(store).to_pylist():
        data = corpus_files("pictures")[row["source"].removeprefix("source-0/")]
        pixels, _ = decode(data, read_header(data, 10**8))
        crop = pixels[row["y"] : row["y"] + row["height"], row["x"] : row["x"] + row["width"]]
        member = store.read_range(f"shards/{row['shard']}", row["offset"], row["size"])
        held = decode(member, read_header(member, 10**8))[0]
        # Where chroma is subsampled, a decoder interpolates it at the very edge from what the tile no longer has.
        inner = np.s_[1:-1, 1:-1] if row["member"].endswith(".jpg") else np.s_[:, :]
        np.testing.assert_array_equal(held[inner], crop[inner])


def test_whole_jpegs_are_stored_byte_for_byte(
    ray_cluster: None, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("china.jpg", "rocket.jpg", "camera.png"):
        (tmp_path / "in" / name).write_bytes(corpus_files("pictures")[name])
    store = build(make_config(tmp_path / "out", [f"source={tmp_path / 'in'}", "leak_guard=[]", "tiles.size=null"]))
    rows = {row["source"]: row for row in read_samples(store).to_pylist()}
    members = {key: store.read_range(f"shards/{row['shard']}", row["offset"], row["size"]) for key, row in rows.items()}
    assert members["source-0/china.jpg"] == corpus_files("pictures")["china.jpg"]
    # Its profile was converted, so its bytes are no longer its pixels.
    assert rows["source-0/rocket.jpg"]["member"].endswith(".png")
    description = read_dataset_json(store)
    assert description["format"]["members"] == {"jpg": 1, "png": 2}
    assert description["conversions"] == {"grey_to_rgb": 1, "icc_to_srgb": 1}


def test_tar_headers_carry_no_clock_user_or_host(built: Path) -> None:
    for path in (built / "shards").iterdir():
        with tarfile.open(path) as tar:
            headers = {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in tar}
        assert headers == {(0, 0, 0, "", "", 0o644)}


def test_only_the_damaged_shard_is_packed_again(
    ray_cluster: None, copied: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    before, store, config = shard_bytes(copied), open_store(copied), make_config(copied)
    victim = copied / "shards" / "ird-000001.tar"
    victim.write_bytes(victim.read_bytes()[:5000])
    assert pack(config, store)["work"]["shards"] == 1
    assert shard_bytes(copied) == before
    victim.unlink()
    repair_shard(config, store, "ird-000001.tar")
    assert shard_bytes(copied) == before
    with pytest.raises(DatasetError, match=r"no shard 'x\.tar'; there are ird-000000\.tar to"):
        repair_shard(config, store, "x.tar")
    with pytest.raises(DatasetError, match="config or selection changed"):
        repair_shard(make_config(copied, ["seed=1"]), store, "ird-000001.tar")


def test_other_thresholds_replace_the_dataset_without_leftovers(
    ray_cluster: None, copied: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    old = read_dataset_json(open_store(copied))["id"]
    facts = pack(make_config(copied, ["pack.samples_per_shard=100"]), open_store(copied))
    assert facts["shards"] == 1
    assert list(shard_bytes(copied)) == ["shards/ird-000000.tar"]
    assert read_dataset_json(open_store(copied))["id"] != old


def test_a_source_that_changed_since_the_scan_stops_the_packing(
    ray_cluster: None, photographs: Path, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    config = make_config(tmp_path / "out", [f"source={photographs}", "leak_guard=[]"])
    store = build(config)
    (photographs / "camera.png").write_bytes(corpus_files("pictures")["grass.png"])
    store.delete("shards/ird-000000.tar")
    with pytest.raises(DatasetError, match=r"camera\.png: changed since it was scanned"):
        pack(config, store)


def test_tiles_of_a_jpeg_are_jpegs_unless_png_is_asked_for(
    ray_cluster: None, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "china.jpg").write_bytes(corpus_files("pictures")["china.jpg"])
    settings = [f"source={tmp_path / 'in'}", "leak_guard=[]"]
    jpeg = read_dataset_json(build(make_config(tmp_path / "jpeg", settings)))
    png = read_dataset_json(build(make_config(tmp_path / "png", [*settings, "pack.crop=png"])))
    assert set(jpeg["format"]["members"]) == {"jpg"} and "DCT" in jpeg["format"]["why"]
    assert set(png["format"]["members"]) == {"png"} and "pack.crop=png" in png["format"]["why"]
    assert jpeg["totals"]["bytes"] * 2 < png["totals"]["bytes"]
