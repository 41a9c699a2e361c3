from pathlib import Path

import pytest

from datagen.config import DatagenConfig, absolute, name_of
from infra.config import ConfigError, dump_config, load_config


def load(*overrides: str) -> DatagenConfig:
    return load_config(DatagenConfig, None, ["out=somewhere", *overrides])


def test_one_source_or_a_list_of_places_or_of_sections() -> None:
    assert [source.uri for source in load("source=a").source] == ["a"]
    assert [source.uri for source in load("source=[a, 's3://b/c']").source] == ["a", "s3://b/c"]
    config = load("source=[{uri: a, name: mine, licence: CC0}, b]")
    assert [name_of(source, i) for i, source in enumerate(config.source)] == ["mine", "source-1"]


def test_a_dumped_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load("source=[a, b]", "leak_guard=c", "tiles.size=null")
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(DatagenConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("select.min_laplacian=3", "did you mean 'min_laplacian_variance'"),
        ("select.leak_radius=13", "select.leak_radius"),
        ("source=[{uri: a, name: x}, {uri: b, name: x}]", "two sources are named 'x'"),
        ("source=[{uri: a, name: a.b}]", "name"),
    ],
)
def test_wrong_settings_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load(override)


def test_relative_folders_hold_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("pictures") == str(tmp_path / "pictures")
    assert absolute("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert absolute("embedded:pictures") == "embedded:pictures"


def test_the_configuration_for_millions_is_valid() -> None:
    path = Path(__file__).parents[2] / "configs" / "datagen" / "million_ird.yaml"
    config = load_config(DatagenConfig, path, ["source=s3://bucket/raw"])
    assert config.tiles.size == 512 and config.pack.bytes_per_shard
