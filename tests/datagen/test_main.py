from pathlib import Path

import pytest

from datagen.__main__ import main
from tests.datagen.conftest import DEMO


def test_verify_needs_only_the_output(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"out={built}"]) == 0
    out = capsys.readouterr().out
    assert "every input accounted for" in out and str(built) in out


def test_a_damaged_dataset_exits_1_with_the_repair(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "shards" / "ird-000000.tar").write_bytes(b"")
    assert main(["verify", f"out={copied}"]) == 1
    assert f"python -m datagen pack --shard ird-000000.tar out={copied}" in capsys.readouterr().err


def test_the_repair_repairs(ray_cluster: None, copied: Path) -> None:
    (copied / "shards" / "ird-000000.tar").write_bytes(b"")
    # The command that verify prints.
    assert main(["pack", "--shard", "ird-000000.tar", f"out={copied}"]) == 0
    assert main(["verify", f"out={copied}"]) == 0


@pytest.mark.parametrize("command", [["select"], ["pack"], ["retry"], ["remove", "a.jpg"]], ids=lambda words: words[0])
def test_a_place_where_nothing_was_scanned_is_left_as_it_was(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, f"out={tmp_path / 'mistyped'}"]) == 1
    assert "no inventory; `python -m datagen scan` makes it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_new_thresholds_need_no_pixels(ray_cluster: None, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "--config", str(DEMO), f"out={copied}", "select.max_noise=2.0"]) == 0
    assert "rejected: noisy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["build", "out=x", "sorce=y"], 2, "did you mean 'source'"),
        (["build", "--config", "no/such.yaml"], 2, "cannot be read"),
        (["build", "out=x"], 1, "source: not given"),
        (["build", "out=x", "source=/no/such/folder"], 1, "no such folder"),
        (["verify", "out=/no/such/dataset"], 1, "no finished dataset"),
    ],
)
def test_mistakes_are_told_in_a_line_without_a_traceback(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
