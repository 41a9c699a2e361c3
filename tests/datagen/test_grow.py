"""``add`` and ``retry``: what is new becomes new shards, what is there keeps its bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from datagen.build import add, build, retry
from datagen.config import DatagenConfig, SourceConfig
from datagen.dataset import SELECTION, DatasetError, read_dataset_json, read_samples, read_table
from datagen.grow import merge_sources
from datagen.source.embedded import corpus_files
from datagen.verify import verify
from infra.config import ConfigError
from infra.storage import open_store
from tests.datagen.conftest import shard_bytes

MakeConfig = Callable[..., DatagenConfig]


@pytest.fixture
def grown(ray_cluster: None, photographs: Path, tmp_path: Path, make_config: MakeConfig) -> tuple[Path, DatagenConfig]:
    """A dataset of four photographs, with one picture more in the source since, and a second source beside it."""
    out = tmp_path / "out"
    config = make_config(out, [f"source={photographs}", "leak_guard=[]", "pack.samples_per_shard=3"])
    build(config)
    (photographs / "astronaut.png").write_bytes(corpus_files("pictures")["astronaut.png"])
    more = tmp_path / "more"
    more.mkdir()
    for name in ("china.jpg", "rocket_copy.jpg", "gravel.png"):
        (more / name).write_bytes(corpus_files("pictures")[name])
    return out, config


def verdicts(out: Path) -> dict[str, tuple[str, str | None, int]]:
    rows = read_table(open_store(out), SELECTION).to_pylist()
    return {row["source"]: (row["verdict"], row["partner"], row["batch"]) for row in rows}


def test_new_pictures_become_new_shards_and_old_ones_keep_their_bytes(
    grown: tuple[Path, DatagenConfig], tmp_path: Path, make_config: MakeConfig
) -> None:
    out, config = grown
    before, first_id = shard_bytes(out), read_dataset_json(open_store(out))["id"]
    store = add(config)
    after = shard_bytes(out)
    assert after.keys() > before.keys() and {key: after[key] for key in before} == before
    assert verdicts(out)["source-0/astronaut.png"] == ("kept", None, 1)
    # The second source gets the next name; its copy of an old picture is refused.
    store = add(make_config(out, [f"source={tmp_path / 'more'}", "leak_guard=[]", "pack.samples_per_shard=3"]))
    last = shard_bytes(out)
    assert {key: last[key] for key in after} == after
    assert verdicts(out)["source-1/rocket_copy.jpg"] == ("rejected", "source-0/rocket.jpg", 2)
    assert verdicts(out)["source-1/china.jpg"] == ("kept", None, 2)
    description = read_dataset_json(store)
    assert set(description["sources"]) == {"source-0", "source-1"}
    assert description["totals"]["batches"] == 3 and description["id"] != first_id
    assert not any(check.faults for check in verify(store))
    # Nothing new: nothing changes. And a build that resumes keeps the batches.
    add(make_config(out, [f"source={tmp_path / 'more'}", "leak_guard=[]", "pack.samples_per_shard=3"]))
    both = [f"source=[{tmp_path / 'photographs'}, {tmp_path / 'more'}]", "leak_guard=[]", "pack.samples_per_shard=3"]
    build(make_config(out, both))
    assert shard_bytes(out) == last
    assert read_dataset_json(store)["id"] == description["id"]


def test_other_settings_are_refused_because_old_shards_would_change(
    grown: tuple[Path, DatagenConfig], make_config: MakeConfig
) -> None:
    out, config = grown
    before = shard_bytes(out)
    for override in ("seed=1", "select.min_entropy=1.0", "tiles.size=128", "leak_guard=embedded:held_out"):
        settings = [f"source={config.source[0].uri}", "leak_guard=[]", "pack.samples_per_shard=3", override]
        with pytest.raises(ConfigError, match=override.partition("=")[0].partition(".")[0]):
            add(make_config(out, settings))
    assert shard_bytes(out) == before


def test_there_must_be_something_to_add_to(photographs: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(DatasetError, match="datagen build"):
        add(make_config(tmp_path / "nothing", [f"source={photographs}", "leak_guard=[]"]))


def test_sources_keep_their_names_and_new_ones_get_the_next(make_config: MakeConfig, tmp_path: Path) -> None:
    recorded = (SourceConfig(uri="/a"), SourceConfig(uri="/b", name="blue", licence="CC0"))
    config, own = merge_sources(make_config(tmp_path, ["source=[/c, /b]"]), recorded)
    assert [(source.uri, source.name) for source in config.source] == [
        ("/a", "source-0"),
        ("/b", "blue"),
        ("/c", "source-2"),
    ]
    assert [source.uri for source in own] == ["/b", "/c"]
    with pytest.raises(ConfigError, match="on record as 'blue'"):
        merge_sources(make_config(tmp_path, ["source=[{uri: /b, name: red}]"]), recorded)


def test_what_failed_is_read_again_and_nothing_else(
    ray_cluster: None, photographs: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    out = tmp_path / "out"
    damaged = photographs / "china.jpg"
    whole = corpus_files("pictures")["china.jpg"]
    damaged.write_bytes(whole[:1000] + bytes(len(whole) - 1000))
    config = make_config(out, [f"source={photographs}", "leak_guard=[]"])
    build(config)
    assert verdicts(out)["source-0/china.jpg"][0] == "failed"
    before = shard_bytes(out)
    retry(config)
    assert shard_bytes(out) == before and verdicts(out)["source-0/china.jpg"] == ("failed", None, 0)
    damaged.write_bytes(whole)
    (photographs / "camera.png").unlink()  # Would be a row `missing`, were it read.
    store = retry(config)
    after = shard_bytes(out)
    assert {key: after[key] for key in before} == before
    assert verdicts(out)["source-0/china.jpg"] == ("kept", None, 1)
    assert verdicts(out)["source-0/camera.png"][0] == "kept"
    assert any(row["source"] == "source-0/china.jpg" for row in read_samples(store).to_pylist())
    assert json.loads((out / "curation" / "summary.json").read_text())["verify"]["faults"] == 0
