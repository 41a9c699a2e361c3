"""``ird curves``: what of a run's records is drawn, under which name."""

import json
import time
from pathlib import Path

import cv2
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from infra.errors import Refusal
from pipeline import curves
from pipeline.cli import app
from pipeline.curves import draw_curves

Drawn = list[dict[str, list[tuple[float, float]]]]

DYNET = {"small": {"noise": 20.0, "rain": 24.0}, "large": {"noise": 21.0, "rain": 27.0}}


def _run(folder: Path, psnr: dict[str, dict[str, float]] | None = None) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": s, "device_hours": s / 100, "loss": 0.1 / s, "lr": 1e-4} for s in (1, 2, 3)]
    rows[1]["loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    if psnr:
        (folder / "validation.jsonl").write_text(json.dumps({"step": 2, "device_hours": 0.02, "psnr": psnr}) + "\n")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Label to points of each panel of the last picture."""
    panels: Drawn = []

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        panels[:] = [
            {str(line.get_label()): list(map(tuple, line.get_xydata())) for line in a.lines} for a in figure.axes
        ]
        savefig(figure, *arguments, **options)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    return panels


def test_one_run_shows_its_losses_and_each_variant_on_each_task(tmp_path: Path, drawn: Drawn) -> None:
    run = _run(tmp_path / "run", DYNET)
    made = CliRunner().invoke(app, ["curves", str(run), "--out", str(tmp_path / "made" / "curves.png")])
    assert made.exit_code == 0, made.output
    losses, scores = drawn
    assert losses == {"loss": [(1.0, 0.1), (3.0, pytest.approx(0.1 / 3))]}  # neither the NaN nor the torn line
    assert scores == {
        "small, noise": [(2.0, 20.0)],
        "small, rain": [(2.0, 24.0)],
        "large, noise": [(2.0, 21.0)],
        "large, rain": [(2.0, 27.0)],
    }
    height, width = cv2.imread(str(tmp_path / "made" / "curves.png")).shape[:2]
    assert width > 2 * height


def test_several_runs_are_told_apart_by_their_paths_and_compared_by_their_means(tmp_path: Path, drawn: Drawn) -> None:
    runs = [_run(tmp_path / "a" / "out", DYNET), _run(tmp_path / "b" / "out", {"default": {"x2": 30.0}})]
    draw_curves(runs, tmp_path / "curves.png", "device_hours")
    losses, scores = drawn
    assert list(losses) == ["a/out loss", "b/out loss"]
    assert scores == {"a/out small": [(0.02, 22.0)], "a/out large": [(0.02, 24.0)], "b/out": [(0.02, 30.0)]}


def test_a_run_that_was_not_validated_has_one_panel(tmp_path: Path, drawn: Drawn) -> None:
    draw_curves([_run(tmp_path / "run")], tmp_path / "curves.png")
    assert len(drawn) == 1


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"empty: no metrics\.jsonl"):
        draw_curves([_run(tmp_path / "run"), tmp_path / "empty"], tmp_path / "curves.png")
    with pytest.raises(Refusal, match="given twice"):
        draw_curves([tmp_path / "run", tmp_path / "run" / "."], tmp_path / "curves.png")
    with pytest.raises(Refusal, match=r"curves\.bmp: .*\.png, \.pdf"):
        draw_curves([tmp_path / "run"], tmp_path / "curves.bmp")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_the_same_runs_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    run = _run(tmp_path / "run", DYNET)
    made = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for path in made:
        draw_curves([run], path)
        time.sleep(1.1)  # dates in files are of seconds
    assert made[0].read_bytes() == made[1].read_bytes()


def test_losses_far_apart_stand_on_a_logarithmic_axis() -> None:
    near, far = {"loss": [(1.0, 0.03), (2.0, 0.02)]}, {"loss": [(1.0, 0.3), (2.0, 0.02)]}
    assert [curves._figure(losses, {}, "step").axes[0].get_yscale() for losses in (near, far)] == ["linear", "log"]
