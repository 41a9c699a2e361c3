from pathlib import Path

import pytest

from datagen.build import build
from datagen.config import DatagenConfig
from infra.config import load_config
from tests.datagen.kills import DEMO, VICTIMS, contents, make_crowd, settings, soak


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_random_moments_change_no_byte(ray_cluster: None, tmp_path: Path) -> None:
    """Twenty kills, of each kind in turn, half while pictures are scanned, half while shards are packed."""
    crowd, undisturbed = make_crowd(tmp_path / "crowd"), tmp_path / "undisturbed"
    build(load_config(DatagenConfig, DEMO, settings(crowd, undisturbed)))
    done = soak(20, seed=7, folder=tmp_path, crowd=crowd, expected=contents(undisturbed))
    assert {what.split()[0] for what in done} == set(VICTIMS)
    assert {what.split()[-1] for what in done} == {"scan_piece", "pack_shard"}
