"""A small real dataset, made once a test session by the curation itself."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default corpus in three or more shards, built by ``python -m datagen build``."""
    out = tmp_path_factory.mktemp("small_dataset")
    config = str(REPOSITORY / "configs/datagen/demo.yaml")
    command = [sys.executable, "-m", "datagen", "build", "--config", config, f"out={out}", "pack.samples_per_shard=8"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out
