import re

import pytest

from pipeline.models import PUBLISHED, print_models
from training.models import DyNetConfig, PromptIRConfig, variants_of
from training.models.cost import count_cost

# Weights of the published files that nothing uses.
DYNET_DEAD, PROMPTIR_DEAD = 112_896, 215_296


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, **options: bool) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_models(32, **options)
    return capsys.readouterr().out


def rows(said: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in said.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize("columns", [80, 120])
def test_each_variant_is_one_unbroken_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    said = printed(capsys, monkeypatch, columns)
    assert "…" not in said and max(map(len, said.splitlines())) <= columns
    found = rows(said)
    assert [row[:2] for row in found] == [
        [name, variant] for name, config in PUBLISHED.items() for variant in variants_of(config)
    ]
    cost = count_cost(DyNetConfig(), "large", 32, 32)
    assert found[1][2:] == [
        f"{cost.parameters:,}",
        f"{2 * cost.convolution_macs / 1e9:.2f}",
        f"{2 * cost.macs / 1e9:.2f}",
        f"{cost.saved_bytes / 2**20:,.0f}",
    ]


def test_the_notes_say_what_the_counts_give(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = " ".join(printed(capsys, monkeypatch, 80).split())
    dynet, promptir = (count_cost(c, variants_of(c)[-1], 8, 8).parameters for c in (DyNetConfig(), PromptIRConfig()))
    for ours, theirs in ((dynet, promptir), (dynet + DYNET_DEAD, promptir + PROMPTIR_DEAD)):
        assert f"{ours / 1e6:.3f} M against {theirs / 1e6:.3f} M" in said
        assert f"{1 - ours / theirs:.1%}".replace("%", " %") in said
    assert "242.35 GFLOP of the DyNet paper are convolutions alone at 224x224" in said


def test_latency_is_a_column_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: PUBLISHED[name] for name in ("EDSR baseline x2", "MZSR")}
    monkeypatch.setattr("pipeline.models.PUBLISHED", few)
    said = printed(capsys, monkeypatch, 80, measure=True)
    assert re.search(r"┃ +ms ┃", said)
    assert [len(row) for row in rows(said)] == [7, 7]
    assert all(float(row[-1].replace(",", "")) >= 0 for row in rows(said))
