"""The S3 store against a real server behind a proxy that fails: what heals, what is refused, what stays as it was."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.storage import NotFoundError, StorageConfig, StorageError, Store, open_store
from tests.support.faulty_proxy import FaultyProxy, Kind, faulty_proxy
from tests.support.s3 import S3Server

PART = 5 << 20


@pytest.fixture(scope="module")
def running_proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def proxy(running_proxy: FaultyProxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    running_proxy.clear()
    s3_server.take_over(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running_proxy.endpoint)
    return running_proxy


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def store(bucket: str, proxy: FaultyProxy) -> Store:
    return _store(bucket)


def _store(bucket: str, attempts: int = 4) -> Store:
    config = StorageConfig(
        attempts=attempts, read_timeout=1, multipart_threshold=PART, part_bytes=PART, transfer_threads=2
    )
    return open_store(f"s3://{bucket}/p", config)


def _outcomes(proxy: FaultyProxy, method: str, path: str = "") -> list[str]:
    return [request.outcome for request in proxy.seen(method, path)]


DATA = os.urandom(300_000)
BODY_FAULTS: list[Kind] = ["reset_body", "cut_body", "stall_body"]
HEAD_FAULTS: list[Kind] = ["status", "reset", "lost_answer", "slow"]


@pytest.mark.parametrize("kind", HEAD_FAULTS)
@pytest.mark.parametrize(
    ("method", "use", "expected"),
    [
        ("GET", lambda store: store.read("key"), DATA),
        ("HEAD", lambda store: store.stat("key").size, len(DATA)),
        ("GET", lambda store: [entry.key for entry in store.list()], ["key"]),
        ("PUT", lambda store: store.write("key", DATA), None),
        ("DELETE", lambda store: store.delete("key"), None),
    ],
    ids=["read", "stat", "list", "write", "delete"],
)
def test_a_request_that_fails_is_made_again(
    store: Store, proxy: FaultyProxy, kind: Kind, method: str, use: Callable[[Store], object], expected: object
) -> None:
    store.write("key", DATA)
    before = len(proxy.seen(method))
    proxy.inject(kind, method=method, status=500, seconds=1.5)
    assert use(store) == expected
    assert _outcomes(proxy, method)[before:] == [kind, "ok"]
    assert store.exists("key") == (method != "DELETE")


@pytest.mark.parametrize("kind", BODY_FAULTS)
@pytest.mark.parametrize("after", [0, 200_000])
def test_a_body_that_breaks_off_is_read_again(store: Store, proxy: FaultyProxy, kind: Kind, after: int) -> None:
    store.write("key", DATA)
    proxy.inject(kind, after=after, seconds=1.5)
    assert store.read("key") == DATA
    assert _outcomes(proxy, "GET") == [kind, "ok"]


@pytest.mark.parametrize("kind", BODY_FAULTS)
def test_a_range_that_breaks_off_is_read_again(store: Store, proxy: FaultyProxy, kind: Kind) -> None:
    store.write("key", DATA)
    proxy.inject(kind, after=500, seconds=1.5)
    assert store.read_range("key", 100_000, 1000) == DATA[100_000:101_000]
    assert _outcomes(proxy, "GET") == [kind, "ok"]


@pytest.mark.parametrize("kind", ["cut_body", "reset_body"])
def test_a_listing_page_that_breaks_off_is_asked_for_again(store: Store, proxy: FaultyProxy, kind: Kind) -> None:
    keys = [f"{number}" for number in range(9)]
    for key in keys:
        store.write(key, b"")
    proxy.inject(kind, after=400)
    assert [entry.key for entry in store.list()] == keys
    assert _outcomes(proxy, "GET") == [kind, "ok"]


@pytest.mark.parametrize("kind", [*BODY_FAULTS, "reset", "status"])
def test_a_download_in_parts_survives_faults_in_its_parts(
    store: Store, proxy: FaultyProxy, tmp_path: Path, kind: Kind
) -> None:
    data = os.urandom(3 * PART + 11)
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "key")
    proxy.inject(kind, times=2, skip=1, after=1_000_000, seconds=1.5)
    store.download("key", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert sorted(_outcomes(proxy, "GET")) == sorted([kind] * 2 + ["ok"] * 4)


@pytest.mark.parametrize("kind", ["status", "reset", "lost_answer"])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId"), ("HEAD", "")]
)
def test_an_upload_in_parts_survives_faults_in_every_step(
    store: Store, proxy: FaultyProxy, tmp_path: Path, kind: Kind, method: str, path: str
) -> None:
    data = os.urandom(2 * PART + 11)
    (tmp_path / "source").write_bytes(data)
    proxy.inject(kind, method=method, path=path)
    store.upload(tmp_path / "source", "key")
    assert kind in _outcomes(proxy, method, path)
    assert store.read("key") == data


@pytest.mark.parametrize(("size", "path"), [(1000, "key"), (2 * PART + 11, "partNumber=2")])
def test_bytes_changed_on_the_way_up_are_noticed_and_sent_again(
    store: Store, proxy: FaultyProxy, size: int, path: str
) -> None:
    data = os.urandom(size)
    proxy.inject("flip_request", method="PUT", path=path)
    store.write("key", data)
    assert _outcomes(proxy, "PUT", path)[:2] == ["flip_request", "ok"]
    assert store.read("key") == data


def test_an_object_replaced_during_its_download_is_never_mixed(
    store: Store, bucket: str, proxy: FaultyProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    old, new = b"a" * (3 * PART), b"b" * (3 * PART)
    store.write("key", old)
    proxy.inject("slow", skip=1, times=2, seconds=0.9)
    first_part_read = threading.Event()

    def replace() -> None:
        first_part_read.wait(60)
        s3_server.client.put_object(Bucket=bucket, Key="p/key", Body=new)

    thread = threading.Thread(target=replace, daemon=True)
    thread.start()
    download = threading.Thread(target=store.download, args=("key", tmp_path / "copy"), daemon=True)
    download.start()
    while "slow" not in _outcomes(proxy, "GET"):
        assert download.is_alive()
    first_part_read.set()
    thread.join(60)
    download.join(60)
    assert (tmp_path / "copy").read_bytes() == new
    assert len(proxy.seen("GET")) > 3


@pytest.mark.parametrize("kind", ["cut_body", "reset", "status"])
def test_faults_without_end_are_reported_and_nothing_is_published(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, kind: Kind
) -> None:
    store = _store(bucket, attempts=2)
    store.write("key", DATA)
    proxy.inject(kind, times=1000, after=10)
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(StorageError, match=f"s3://{bucket}/p/key") as caught:
        store.download("key", tmp_path / "copy")
    assert not isinstance(caught.value, NotFoundError)
    assert _outcomes(proxy, "GET") == [kind] * 2
    assert (tmp_path / "copy").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_uploads_that_arrive_damaged_without_end_leave_the_old_object(bucket: str, proxy: FaultyProxy) -> None:
    store = _store(bucket, attempts=2)
    store.write("key", b"old")
    proxy.inject("flip_request", method="PUT", times=1000)
    with pytest.raises(StorageError, match="failed 2 times"):
        store.write("key", b"new")
    assert _outcomes(proxy, "PUT")[1:] == ["flip_request"] * 2
    assert store.read("key") == b"old"


def test_a_refusal_is_not_tried_again(store: Store, proxy: FaultyProxy) -> None:
    proxy.inject("status", times=1000, status=403)
    with pytest.raises(StorageError, match="access refused"):
        store.read("key")
    assert _outcomes(proxy, "GET") == ["status"]


def test_waiting_for_a_store_is_said_once(
    store: Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.storage.s3._last_warning", float("-inf"))
    store.write("key", DATA)
    proxy.inject("status", times=2, status=503)
    assert store.read("key") == DATA
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("infra.storage")]
    assert len(messages) == 1
    assert "503" in messages[0]
