import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.storage import StorageError, open_store
from infra.storage.local import LocalStore, sweep
from tests.support.s3 import S3Server

_WRITER = """
import sys, time
from infra.files import publish_atomically
with publish_atomically(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


def killed_writer(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)


def test_leftovers_of_killed_writers_go_when_they_are_old(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write("shards/a.tar", b"a")
    killed_writer(tmp_path / "shards" / "b.tar")
    killed_writer(tmp_path / "other" / "c.tar")
    (leftover,) = (tmp_path / "shards").glob(".tmp-*")
    assert sweep(store) == ()
    # Two days ago; a good file may be as old.
    for path in (leftover, tmp_path / "shards" / "a.tar", *(tmp_path / "other").glob(".tmp-*")):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    assert sweep(store, "shards/") == (f"shards/{leftover.name}",)
    assert [entry.key for entry in store.list()] == ["shards/a.tar"]
    assert list((tmp_path / "shards").iterdir()) == [tmp_path / "shards" / "a.tar"]
    assert len(sweep(store)) == 1
    assert sweep(store, "nowhere/") == ()


def test_links_and_folders_are_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / ".tmp-old").write_bytes(b"")
    os.utime(outside / ".tmp-old", (0, 0))
    root = tmp_path / "store"
    (root / ".tmp-folder").mkdir(parents=True)
    (root / "linked").symlink_to(outside)
    (root / ".tmp-link").symlink_to(outside / ".tmp-old")
    assert LocalStore(str(root)).sweep(older_than=-1e9) == ()
    assert (outside / ".tmp-old").exists()
    with pytest.raises(StorageError, match="prefix"):
        LocalStore(str(root)).sweep("../outside")


def test_a_bucket_has_nothing_to_sweep(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.take_over(monkeypatch)
    assert sweep(open_store(f"s3://{s3_server.new_bucket()}")) == ()
