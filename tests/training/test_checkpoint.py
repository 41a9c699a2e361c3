"""Checkpoints: whole or absent, checked, passed over when damaged, in folders and buckets; written beside the work."""

from pathlib import Path

import pytest
import torch

from infra.storage import Store, open_store
from tests.support.s3 import S3Server
from training.checkpoint import CheckpointError, CheckpointWriter, Keep, load_checkpoint, save_checkpoint


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(tmp_path / "checkpoints")
    server: S3Server = request.getfixturevalue("s3_server")
    server.take_over(request.getfixturevalue("monkeypatch"))
    return open_store(f"s3://{server.new_bucket()}/run/checkpoints")


def save(store: Store, step: int, last: int = 2, every: int = 0) -> str:
    state = {"model": {"w": torch.full((3,), float(step))}}
    return save_checkpoint(store, step, state, {"config": {"a": 1}}, Keep(last, every))


def names(store: Store) -> list[str]:
    return [entry.key for entry in store.list()]


def test_round_trip_keeps_the_last_and_names_the_latest(store: Store) -> None:
    assert load_checkpoint(store) is None
    for step in (1, 2, 3):
        save(store, step)
    loaded = load_checkpoint(store)
    assert loaded is not None
    state, manifest = loaded
    assert torch.equal(state["model"]["w"], torch.full((3,), 3.0))
    assert manifest["step"] == 3 and manifest["config"] == {"a": 1}
    assert store.read("latest") == b"step-00000003"
    kept = [f"step-0000000{step}/{file}" for step in (2, 3) for file in ("manifest.json", "state.pt")]
    assert names(store) == ["latest", *kept]


def test_checkpoints_of_round_steps_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in range(1, 9):
        save(store, step, last=1, every=3)
    assert sorted({name.split("/")[0] for name in names(store)} - {"latest"}) == [
        "step-00000003",
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "no state", "manifest is not JSON"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    newest = tmp_path / save(store, 2)
    data = bytearray((newest / "state.pt").read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (newest / "state.pt").write_bytes(data)
    elif damage == "cut":
        (newest / "state.pt").write_bytes(data[:100])
    elif damage == "no state":
        (newest / "state.pt").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    loaded = load_checkpoint(store)
    assert loaded is not None and loaded[1]["step"] == 1
    assert str(newest) in capsys.readouterr().out
    save(store, 2)  # a resumed run comes by again and repairs it
    repaired = load_checkpoint(store)
    assert repaired is not None and repaired[1]["step"] == 2


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / save(store, 1) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(store)


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save(store, 1)
    store.write("step-00000002/state.pt", b"begun")
    loaded = load_checkpoint(store)
    assert loaded is not None and loaded[1]["step"] == 1
    save(store, 3)
    assert not [name for name in names(store) if name.startswith("step-00000002")]


def test_the_writer_saves_what_was_there_when_it_was_told_to(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    writer, weight = CheckpointWriter(store, Keep()), torch.zeros(3)
    writer.save(1, {"w": weight, "nested": {"plain": 5}}, {})
    weight.fill_(7)  # the next step
    writer.finish()
    loaded = load_checkpoint(store)
    assert loaded is not None
    assert torch.equal(loaded[0]["w"], torch.zeros(3)) and loaded[0]["nested"]["plain"] == 5


def test_a_store_that_fails_is_said_and_stops_nothing_but_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder should be")
    writer = CheckpointWriter(open_store(blocked), Keep())
    writer.save(1, {}, {})
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.finish()
    assert "The run goes on" in capsys.readouterr().out
    blocked.unlink()
    writer.save(2, {}, {})
    writer.finish()
    assert load_checkpoint(open_store(blocked)) is not None
