import subprocess
from pathlib import Path

import pytest

from tests.datagen.kills import ROOT, command, contents, make_crowd, soak


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path: Path) -> None:
    crowd = make_crowd(tmp_path / "crowd")
    subprocess.run(command(crowd, tmp_path / "undisturbed"), cwd=ROOT, check=True, timeout=300, capture_output=True)
    done = soak(20, seed=7, folder=tmp_path, crowd=crowd, expected=contents(tmp_path / "undisturbed"))
    assert done.total() >= 20
    assert {"worker"} < {what.split()[0] for what in done}
    assert {what.split()[-1] for what in done} == {"scan_piece", "pack_shard"}
