import subprocess
import sys
from pathlib import Path

import pytest

from datagen.source.embedded import HELD_OUT, corpus_files, materialise

DIGEST = (
    "import hashlib; from datagen.source.embedded import corpus_files; files = corpus_files('pictures');"
    "print(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest())"
)


def test_every_process_makes_the_same_corpus() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, timeout=120)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout


def test_held_out_pictures_are_in_the_corpus_only_as_a_leak() -> None:
    assert set(corpus_files("held_out")) == set(HELD_OUT)
    assert not set(HELD_OUT) & set(corpus_files("pictures"))
    assert "coffee_leak.jpg" in corpus_files("pictures")


def test_files_are_written_once_and_repaired(tmp_path: Path) -> None:
    materialise(tmp_path)
    brick, rocket = tmp_path / "pictures" / "brick.png", tmp_path / "pictures" / "rocket.jpg"
    untouched = brick.stat().st_mtime_ns
    rocket.write_bytes(b"broken")
    materialise(tmp_path)
    assert brick.stat().st_mtime_ns == untouched
    assert rocket.read_bytes() == corpus_files("pictures")["rocket.jpg"]
    assert {path.name for path in (tmp_path / "held_out").iterdir()} == set(HELD_OUT)


def test_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="embedded:held_out"):
        corpus_files("photos")
