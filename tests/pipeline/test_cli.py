"""The ``ird`` command: help for everything, and refusals without tracebacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.launcher import PREEMPTED, StageFailed
from pipeline.cli import app
from tests.support.dataset import REPOSITORY

IRD = str(Path(sys.executable).with_name("ird"))
COMMANDS = [
    "demo",
    "train",
    "restore",
    "degrade",
    "import-checkpoint",
    "export",
    "models",
    "evaluate",
    "curves",
    "report",
    "doctor",
    "serve",
    "trace",
    "registry push",
    "registry pull",
    "registry list",
    "registry show",
    "registry alias",
    "registry promote",
    "registry rollback",
    "study co-pretraining",
    "track sync",
]


def ird(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([IRD, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = ird(*command.split(), "--help")
    assert result.returncode == 0 and "Example" in result.stdout and f"ird {command}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "rankz=3"], "did you mean 'ranks'"),
        (["train", "pretrian", "--config", "x.yaml"], "one of pretrain, finetune, edsr, mdsr, mzsr"),
        (
            ["train", "edsr", "--config", "configs/training/edsr_dem.yaml"],
            "configs/training/edsr_demo.yaml?",
        ),
        (["degrade", "absent.png", "out.png"], "absent.png"),
        (["degrade", "absent.png", "out.png", "--recipe", "all_in_one"], "all_in_one_3"),
        (["restore", "--model", "absent-folder", "in.png", "out.png"], "in.png"),
    ],
)
def test_refusals_are_one_message_and_exit_code_2(arguments: list[str], expected: str) -> None:
    result = ird(*arguments)
    said = " ".join((result.stdout + result.stderr).split())
    assert result.returncode == 2 and expected in said and "Traceback" not in said


def test_models_lists_the_published_counts() -> None:
    said = ird("models", "--size", "224").stdout
    for figure in ("16,613,135", "35,376,967", "1,369,859", "40,729,603", "225,091", "242.15", "166.25"):
        assert figure in said


def test_a_degradation_is_written_with_its_record(tmp_path: Path) -> None:
    import skimage

    picture = Path(skimage.__file__).parent / "data" / "coffee.png"
    results = [ird("degrade", str(picture), str(tmp_path / f"{n}.png"), "--seed", "5") for n in "ab"]
    assert [r.returncode for r in results] == [0, 0]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != picture.read_bytes()
    assert '"steps"' in (tmp_path / "a.png.json").read_text()


def test_train_returns_the_code_that_says_whether_to_run_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def told_to_stop(*_: object, **__: object) -> None:
        raise StageFailed("saved", PREEMPTED)

    monkeypatch.setattr("infra.launcher.run_deepspeed", told_to_stop)
    config = str(REPOSITORY / "configs/training/pretrain_demo.yaml")
    assert CliRunner().invoke(app, ["train", "pretrain", "--config", config]).exit_code == PREEMPTED
