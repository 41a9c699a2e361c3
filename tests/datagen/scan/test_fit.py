from pathlib import Path

import pytest

from datagen.__main__ import main
from datagen.picture.niqe import load_model
from datagen.source.embedded import corpus_files


def test_the_command_fits_a_model_to_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.json"
    assert main(["fit-niqe", "source=embedded:pictures", f"out={out}"]) == 0
    model = load_model(out)
    assert model.mean.shape == (36,) and model.covariance.shape == (36, 36)
    assert "embedded:pictures" in model.fitted_from
    assert "left out source-0/text.png" in capsys.readouterr().out


def test_too_few_pictures_and_a_wrong_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.png").write_bytes(corpus_files("pictures")["coins.png"])
    assert main(["fit-niqe", f"source={tmp_path}", f"out={tmp_path / 'model.json'}"]) == 1
    assert "too few for a model; add pictures" in capsys.readouterr().err
    assert main(["fit-niqe", f"source={tmp_path}", f"out={tmp_path / 'model'}"]) == 1
    assert "ends in .json" in capsys.readouterr().err
