"""Checkpoints: whole or absent, checked, and passed over when damaged."""

from pathlib import Path

import pytest
import torch

from training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, {"model": {"w": torch.full((3,), float(step))}}, {"config": {"a": 1}}, keep)


def test_round_trip_keeps_the_last_and_names_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    state, manifest = loaded
    assert (
        torch.equal(state["model"]["w"], torch.full((3,), 3.0))
        and manifest["step"] == 3
        and manifest["config"] == {"a": 1}
    )
    assert (tmp_path / "latest").read_text() == "step-00000003"
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    state = newest / "state.pt"
    data = bytearray(state.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "cut":
        state.write_bytes(data[:100])
    else:
        (newest / "manifest.json").unlink()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1]["step"] == 1
    assert str(newest) in capsys.readouterr().out
    save(tmp_path, 2)  # a resumed run comes by again and repairs it
    repaired = load_checkpoint(tmp_path)
    assert repaired is not None and repaired[1]["step"] == 2


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path)


def test_half_written_folders_are_swept_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002-99").mkdir()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded[1]["step"] == 1
    assert not list(tmp_path.glob(".tmp-*"))
