"""Atomic publication under failure and under kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.files import publish_atomically, sha256_of_file, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and list(path.parent.iterdir()) == [path]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    code = "import sys; from infra.files import write_atomically; write_atomically(sys.argv[1], b'')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], check=True, umask=0o027, timeout=60)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_an_exception_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish_atomically(tmp_path / "f") as temporary:
        temporary.write_bytes(b"part")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")
    code = (
        "import sys, time; from infra.files import publish_atomically\n"
        "with publish_atomically(sys.argv[1]) as t:\n"
        "    t.write_bytes(b'new'); print('writing', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    time.sleep(0.1)
    writer.send_signal(signal.SIGKILL)
    writer.wait(60)
    assert path.read_bytes() == b"old"


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
