import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from datagen.config import DatagenConfig
from datagen.source.embedded import corpus_files
from infra.cluster import connect
from infra.config import load_config
from infra.storage import open_store

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "datagen" / "demo.yaml"


def run_datagen(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "datagen", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def shard_bytes(out: Path) -> dict[str, bytes]:
    """Name and content of every published shard; a killed worker may leave an unpublished file beside them."""
    store = open_store(out)
    return {entry.key: store.read(entry.key) for entry in store.list("shards/")}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with connect(num_cpus=2):
        yield


@pytest.fixture(scope="session")
def make_config() -> Callable[..., DatagenConfig]:
    def make(out: Path, overrides: Sequence[str] = ()) -> DatagenConfig:
        return load_config(DatagenConfig, DEMO, [f"out={out}", *overrides])

    return make


@pytest.fixture(scope="session")
def built(small_dataset: Path) -> Path:
    """The demo corpus, built once on two workers. Read only: `copied` is for tests that change it."""
    return small_dataset


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    # What another process is just writing there is not yet part of it.
    return Path(shutil.copytree(built, tmp_path / "dataset", ignore=shutil.ignore_patterns(".tmp-*")))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with four small photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("brick.png", "camera.png", "coins.png", "rocket.jpg"):
        (folder / name).write_bytes(corpus_files("pictures")[name])
    return folder
