"""Typed configuration: what is accepted, and how refusals read."""

from pathlib import Path
from typing import Literal

import pytest

from infra.config import Config, ConfigError, config_hash, dump_config, load_config


class Optimizer(Config):
    lr: float = 1e-3
    name: Literal["adam", "sgd"] = "adam"


class Run(Config):
    steps: int = 10
    sources: tuple[str, ...] = ()
    optimizer: Optimizer = Optimizer()
    folder: Path = Path("x")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 5\noptimizer: {lr: 1e-4}\n")
    run = load_config(Run, path, ["optimizer.name=sgd", "sources=[a, b]"])
    assert run == Run(steps=5, sources=("a", "b"), optimizer=Optimizer(lr=1e-4, name="sgd"))


def test_exponent_without_a_point_is_a_number() -> None:
    assert load_config(Run, None, ["optimizer.lr=2e-4"]).optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "unknown key", "did you mean 'lr'", "Allowed here: lr, name"]),
        ("optimiser.lr=1", ["optimiser", "did you mean 'optimizer'"]),
        ("steps=true", ["steps", "valid integer", "True"]),
        ("steps='3'", ["steps", "valid integer", "'3'"]),
        ("optimizer.name=adamm", ["optimizer.name", "'adam' or 'sgd'"]),
        ("steps", ["key=value"]),
        ("steps.more=3", ["steps.more"]),
        ("steps=[", ["not valid YAML"]),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(tmp_path: Path, override: str, expected: list[str]) -> None:
    path = write(tmp_path, "steps: 5\n")
    with pytest.raises(ConfigError) as refused:
        load_config(Run, path, [override])
    for part in expected:
        assert part in str(refused.value)


def test_refusal_names_the_file_and_every_fault(tmp_path: Path) -> None:
    path = write(tmp_path, "stepz: 5\nsteps: 1.5\n")
    with pytest.raises(ConfigError) as refused:
        load_config(Run, path)
    message = str(refused.value)
    assert str(path) in message and "did you mean 'steps'" in message and "1.5" in message


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"did you mean .*run\.yaml"):
        load_config(Run, tmp_path / "runn.yaml")


@pytest.mark.parametrize("text", ["- a\n", "a: [\n"])
def test_other_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Run, write(tmp_path, text))


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    run = load_config(Run, None, ["steps=7", "optimizer.lr=3e-5"])
    dump_config(run, tmp_path / "resolved.yaml")
    again = load_config(Run, tmp_path / "resolved.yaml")
    assert again == run and config_hash(again) == config_hash(run)
    assert config_hash(run) != config_hash(load_config(Run, None, ["steps=8"]))
