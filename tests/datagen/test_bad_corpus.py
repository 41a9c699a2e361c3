"""A corpus in which nearly every file is bad, through the whole of a build: every one gets its fate, nothing stops."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from datagen.build import build
from datagen.config import DatagenConfig
from datagen.dataset import SELECTION, read_dataset_json, read_table
from datagen.scan.inventory import read_inventory
from datagen.source.embedded import corpus_files
from datagen.source.listing import SUFFIXES
from datagen.verify import verify
from tests.support.bad_pictures import bad_pictures, odd_shapes


def test_every_bad_file_gets_its_fate_and_takes_nothing_down(
    ray_cluster: None, tmp_path: Path, make_config: Callable[..., DatagenConfig]
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    bad = {name: fate for name, fate in bad_pictures().items() if name.lower().endswith(SUFFIXES)}
    assert len(bad) > 100
    loose = dict(list(bad.items())[::2])
    for name, (data, _, _) in loose.items():
        (corpus / name).write_bytes(data)
    with tarfile.open(corpus / "00000.tar", "w") as tar:
        for name, (data, _, _) in bad.items():
            if name not in loose:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    (corpus / "00001.tar").write_bytes((corpus / "00000.tar").read_bytes()[:5000])
    for name, (data, _, _) in odd_shapes().items():
        (corpus / name).write_bytes(data)
    (corpus / "good.png").write_bytes(corpus_files("pictures")["astronaut.png"])
    settings = ["leak_guard=[]", "scan.pictures_per_piece=32", "scan.min_side=64"]
    store = build(make_config(tmp_path / "out", [f"source={corpus}", *settings]))
    columns = ["key", "verdict", "reason", "error", "conversions"]
    rows = {row["key"].rpartition("/")[2]: row for row in read_inventory(store, columns).to_pylist()}
    wrong = {}
    for name, (_, verdict, what) in bad.items():
        row = rows[name]
        found = (row["verdict"], tuple(row["conversions"] or ()) if verdict == "measured" else row["reason"])
        if found != (verdict, what):
            wrong[name] = (found, row["error"])
    assert not wrong
    assert rows["00001.tar"]["reason"] == "damaged_tar" and rows["00001.tar"]["error"]
    assert {rows[name]["reason"] for name in odd_shapes()} == {"too_small"}
    assert all(row["error"] for row in rows.values() if row["verdict"] != "measured")
    verdicts = {row["source"]: row for row in read_table(store, SELECTION).to_pylist()}
    assert verdicts["source-0/good.png"]["verdict"] == "kept"
    assert all(row["reason"] for row in verdicts.values() if row["verdict"] != "kept")
    # Every file once, and the one member that the cut tar still shows.
    assert set(rows) == {*bad, *odd_shapes(), "good.png", "00001.tar"}
    assert read_dataset_json(store)["totals"]["inputs"] == len(rows) + 1
    assert not any(check.faults for check in verify(store))
