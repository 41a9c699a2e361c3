"""One contract, run against a local folder and against a real S3 server."""

import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.storage import NotFoundError, StorageConfig, StorageError, Store, open_store
from tests.support.faulty_proxy import faulty_proxy
from tests.support.s3 import S3Server

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL_PARTS = StorageConfig(multipart_threshold=5 << 20, part_bytes=5 << 20, transfer_threads=2)
# In key order: '-' and '.' sort before '/', '0' after it, and "é" after every ASCII letter.
KEYS = ["A", "a b", "a-b", "a.b", "a/b", "a/b-c/d", "a/b.c/d", "a/é x", "a0", "z/ü/日本.txt", "é"]


@dataclass
class Place:
    """A store, and two ways past it: to what its backend holds, and to put an object of any name there."""

    store: Store
    put: Callable[[str, bytes], object]
    names: Callable[[], list[str]]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return _local_place(tmp_path / "store")
    return _s3_place(request.getfixturevalue("s3"))


def _local_place(folder: Path) -> Place:
    def put(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    def names() -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    return Place(open_store(folder, SMALL_PARTS), put, names)


def _s3_place(server: S3Server) -> Place:
    client, bucket = server.client, server.new_bucket()

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=bucket, Key=f"some prefix/{name}", Body=data)

    def names() -> list[str]:
        return [found["Key"] for found in client.list_objects_v2(Bucket=bucket).get("Contents", ())]

    return Place(open_store(f"s3://{bucket}/some prefix", SMALL_PARTS), put, names)


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    s3_server.take_over(monkeypatch)
    return s3_server


def python(script: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_what_is_written_is_read_back(store: Store) -> None:
    for number, key in enumerate(KEYS[::-1]):
        data = os.urandom(number * 1000)
        if not any(other.startswith(f"{key}/") or key.startswith(f"{other}/") for other in KEYS if other != key):
            store.write(key, data)
            assert store.read(key) == data
            assert store.stat(key).size == len(data)
            assert store.stat(key).key == key
            assert store.exists(key)


def test_writing_again_replaces_and_changes_the_version(store: Store) -> None:
    store.write("a/b", b"first, long")
    before = store.stat("a/b")
    assert store.stat("a/b") == before
    store.write("a/b", b"second")
    assert store.read("a/b") == b"second"
    assert store.stat("a/b").size == 6
    assert store.stat("a/b").version != before.version


def test_listing_is_sorted_by_key_bytes_and_filtered_by_plain_prefix(store: Store) -> None:
    keys = [key for key in KEYS if key != "a/b"] + ["a/b/c"]
    for key in keys:
        store.write(key, key.encode())
    entries = list(store.list())
    assert [entry.key for entry in entries] == sorted(keys, key=str.encode)
    assert [entry.size for entry in entries] == [len(entry.key.encode()) for entry in entries]
    assert entries == [store.stat(entry.key) for entry in entries]
    for prefix in ["a", "a/", "a/b", "a/b.", "a/b.c/", "a/é", "z/ü/日", "nothing", "nothing/at/all", "a b/c"]:
        expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
        assert [entry.key for entry in store.list(prefix)] == expected, prefix


def test_a_folder_that_does_not_exist_lists_nothing(store: Store) -> None:
    assert list(store.list()) == []
    assert list(store.list("a/b")) == []


def test_listing_hides_what_is_not_published(place: Place) -> None:
    for name in ["a/b", "a/.tmp-half", ".tmp-folder/c"]:
        place.put(name, b"x")
    assert len(place.names()) == 3
    for prefix in ["", "a/", ".tmp-", ".tmp-folder/", "a/.tmp-"]:
        assert [entry.key for entry in place.store.list(prefix)] == (["a/b"] if prefix in ("", "a/") else [])


def test_listing_stays_below_the_prefix_of_the_store(place: Place) -> None:
    place.store.write("below", b"x")
    parent = open_store(place.store.uri.rpartition("/")[0])
    parent.write("some prefix beside it", b"x")
    parent.write("storey", b"x")
    assert [entry.key for entry in place.store.list()] == ["below"]


@pytest.mark.parametrize("backend", ["local", "s3"])
def test_listing_pages_through_many_keys(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    keys = [f"{number % 7}/{number:06d}.jpg" for number in range(10_500)]
    for folder in {key.split("/")[0] for key in keys}:
        (tmp_path / "many" / folder).mkdir(parents=True)
    for key in keys:
        (tmp_path / "many" / key).write_bytes(b"")
    if backend == "local":
        store = open_store(tmp_path / "many")
    else:
        store = open_store(f"s3://{request.getfixturevalue('s3').bucket_from(tmp_path / 'many')}")
    assert [entry.key for entry in store.list()] == sorted(keys)
    assert [entry.key for entry in store.list("3/0")] == sorted(key for key in keys if key.startswith("3/0"))


@pytest.mark.parametrize(
    ("start", "length"), [(0, 10), (3, 4), (9, 1), (9, 5), (10, 1), (50, 5), (0, 0), (4, 0), (0, 100)]
)
def test_ranged_read_is_a_slice(store: Store, start: int, length: int) -> None:
    data = b"0123456789"
    store.write("digits", data)
    assert store.read_range("digits", start, length) == data[start : start + length]


def test_ranged_read_of_an_empty_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.read_range("empty", 0, 4) == b""


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, -1)])
def test_negative_ranges_are_refused(store: Store, start: int, length: int) -> None:
    store.write("digits", b"0123456789")
    with pytest.raises(ValueError, match="negative"):
        store.read_range("digits", start, length)


def test_absent_objects_are_not_found(store: Store, tmp_path: Path) -> None:
    store.write("there/is", b"something else")
    for key in ["missing", "there", "there/is not"]:
        for access in (
            store.read,
            store.stat,
            lambda k: store.read_range(k, 0, 1),
            lambda k: store.read_range(k, 0, 0),
        ):
            with pytest.raises(NotFoundError, match=key):
                access(key)
        with pytest.raises(NotFoundError, match=key):
            store.download(key, tmp_path / "copy")
        assert not store.exists(key)
    store.delete("missing")
    store.delete("there/is not")
    assert not (tmp_path / "copy").exists()
    assert store.read("there/is") == b"something else"


def test_delete_removes_one_object(store: Store) -> None:
    store.write("a/b", b"1")
    store.write("a/c", b"2")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert [entry.key for entry in store.list()] == ["a/c"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "./a",
        "a/./b",
        "a/",
        ".tmp-x",
        "a/.tmp-x/b",
        "a\0b",
        "\udcff",
    ],
)
def test_keys_that_could_leave_the_store_are_refused(place: Place, tmp_path: Path, key: str) -> None:
    (tmp_path / "source").write_bytes(b"x")
    uses: list[Callable[[], object]] = [
        lambda: place.store.read(key),
        lambda: place.store.read_range(key, 0, 1),
        lambda: place.store.write(key, b"x"),
        lambda: place.store.upload(tmp_path / "source", key),
        lambda: place.store.download(key, tmp_path / "copy"),
        lambda: place.store.stat(key),
        lambda: place.store.exists(key),
        lambda: place.store.delete(key),
    ]
    for use in uses:
        with pytest.raises(StorageError, match="key") as caught:
            use()
        assert not isinstance(caught.value, NotFoundError)
    assert place.names() == []
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("prefix", ["/", "../", "a/../../"])
def test_prefixes_that_could_leave_the_store_are_refused(store: Store, prefix: str) -> None:
    with pytest.raises(StorageError, match="prefix"):
        list(store.list(prefix))


@pytest.mark.parametrize("size", [0, 1, (5 << 20) - 1, 5 << 20, (5 << 20) + 1, (23 << 20) + 7])
def test_files_of_any_size_go_up_and_come_down(store: Store, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source file"
    source.write_bytes(os.urandom(size))
    store.upload(source, "files/é 1")
    assert store.stat("files/é 1").size == size
    store.download("files/é 1", tmp_path / "new folder" / "copy")
    assert _sha256(tmp_path / "new folder" / "copy") == _sha256(source)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["copy"]


def test_bytes_above_the_threshold_go_up_in_parts(store: Store) -> None:
    data = os.urandom((12 << 20) + 3)
    store.write("large", data)
    assert store.read("large") == data


def test_uploading_a_file_that_is_not_there_names_it(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no-such-source"):
        store.upload(tmp_path / "no-such-source", "key")
    assert not store.exists("key")


BOUNDED = """
import resource, sys
from infra.storage import StorageConfig, open_store
store = open_store(sys.argv[1], StorageConfig(part_bytes=16 << 20, transfer_threads=2))
store.write("warm", b"up"); store.read("warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.upload(sys.argv[2], "large")
store.download("large", sys.argv[2] + ".copy")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_files_take_bounded_memory(store: Store, tmp_path: Path) -> None:
    size = 128 << 20
    with open(tmp_path / "large", "wb") as file:
        file.truncate(size)
        file.seek(size // 2)
        file.write(b"not only zeros")
    output, _ = python(BOUNDED, store.uri, str(tmp_path / "large")).communicate(timeout=300)
    grown_kib = int(output)
    assert _sha256(tmp_path / "large.copy") == _sha256(tmp_path / "large")
    assert grown_kib < 80 << 10, f"grew by {grown_kib >> 10} MiB for a file of {size >> 20} MiB"


UNPICKLE = """
import pickle, sys
store = pickle.loads(sys.stdin.buffer.read())
store.write("from/child", store.read("from/parent") + b" and child")
"""


def test_a_pickled_store_works_in_another_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("from/parent", b"parent")
    assert pickle.loads(pickle.dumps(store)) == store
    if secret := os.environ.get("AWS_SECRET_ACCESS_KEY"):
        assert secret.encode() not in pickle.dumps(store)
    # A worker on another host has its own environment; the endpoint must come with the store.
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    child = python(UNPICKLE)
    child.communicate(pickle.dumps(store), timeout=60)
    assert child.returncode == 0
    assert store.read("from/child") == b"parent and child"


def test_a_store_works_in_a_forked_child_and_in_threads(store: Store) -> None:
    store.write("shared", b"data")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if store.read("shared") == b"data" else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(store.read("shared")), daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [b"data"] * 16


PUBLISH = """
import sys, tempfile, os
from infra.storage import StorageConfig, open_store
store = open_store(sys.argv[1], StorageConfig(multipart_threshold=5 << 20, part_bytes=5 << 20, transfer_threads=2))
letter, size = sys.argv[2].encode(), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[4])):
    store.write("contested", letter * size)
"""


@pytest.mark.parametrize(("sizes", "rounds"), [((300_000, 200_000), 25), ((7 << 20, 6 << 20), 3)])
def test_readers_never_see_a_mix_of_two_writers(
    store: Store, tmp_path: Path, sizes: tuple[int, int], rounds: int
) -> None:
    store.write("contested", b"a" * sizes[0])
    writers = [python(PUBLISH, store.uri, letter, str(size), str(rounds)) for letter, size in zip("ab", sizes)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdin is not None
        assert writer.stdout.readline() == b"ready\n"
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    whole = {b"a" * sizes[0], b"b" * sizes[1]}
    # S3 promises that a GET is of one version. This test's server streams the file as it is at the moment, so on
    # it only the writers are judged; readers of datasets compare sha256 as well.
    watched = not store.uri.startswith("s3://")
    seen = set()
    deadline = time.monotonic() + 300
    while watched and any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        data = store.read("contested")
        assert data in whole
        store.download("contested", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() in whole
        seen.add(data[:1])
    for writer in writers:
        writer.communicate(timeout=300)
        assert writer.returncode == 0
    assert store.read("contested") in whole
    assert [entry.key for entry in store.list()] == ["contested"]


UPLOAD = """
import sys
from infra.storage import StorageConfig, open_store
store = open_store(sys.argv[1], StorageConfig(multipart_threshold=5 << 20, part_bytes=5 << 20, transfer_threads=1))
store.upload(sys.argv[2], "victim")
"""


def test_kill_9_in_the_middle_of_a_local_write_leaves_nothing_visible(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    source = tmp_path / "source"
    with open(source, "wb") as file:
        file.truncate(1 << 30)

    def unfinished() -> list[Path]:
        return list((tmp_path / "store").glob(".tmp-*"))

    # A child may finish before the signal finds it; one that was hit leaves its temporary file behind.
    for _ in range(10):
        child = python(UPLOAD, store.uri, str(source))
        _kill_when(child, unfinished)
        if unfinished():
            break
        store.delete("victim")
    assert unfinished(), "no child was killed in the middle of its write"
    assert not store.exists("victim")
    assert list(store.list()) == []
    store.write("victim", b"next try")
    assert store.read("victim") == b"next try"


@pytest.mark.parametrize(("size", "method", "path"), [(1000, "PUT", "victim"), (17 << 20, "PUT", "partNumber=2")])
def test_kill_9_in_the_middle_of_an_s3_upload_leaves_the_old_object(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, method: str, path: str
) -> None:
    bucket = s3.new_bucket()
    store = open_store(f"s3://{bucket}")
    store.write("victim", b"old")
    (tmp_path / "source").write_bytes(os.urandom(size))
    with faulty_proxy(s3.endpoint) as proxy:
        proxy.inject("slow", method=method, path=path, seconds=3600)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        child = python(UPLOAD, f"s3://{bucket}", str(tmp_path / "source"))
        _kill_when(child, lambda: any(request.outcome == "slow" for request in proxy.seen(method)))
        assert child.returncode == -signal.SIGKILL
    assert store.read("victim") == b"old"
    assert [entry.key for entry in store.list()] == ["victim"]
    store.upload(tmp_path / "source", "victim")
    assert store.stat("victim").size == size


def test_a_failed_upload_leaves_the_old_object(store: Store, tmp_path: Path) -> None:
    store.write("key", b"old")
    with pytest.raises(StorageError):
        store.upload(tmp_path, "key")
    assert store.read("key") == b"old"


# Local folders


def test_every_way_to_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with space é"
    open_store(folder).write("key", b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    uris: list[str | Path] = [
        folder,
        str(folder),
        f"{folder}/",
        folder.as_uri(),
        f"file://localhost{folder.as_uri().removeprefix('file://')}",
        "~/with space é",
        "with space é",
    ]
    for uri in uris:
        store = open_store(uri)
        assert store.uri == str(folder)
        assert store.read("key") == b"x"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "unknown scheme 'gs'"),
        ("s3://", "bucket is missing"),
        ("s3:///x", "bucket is missing"),
        ("s3://bucket/../x", "refused"),
        ("file://host/x", "name of a host"),
        ("", "empty location"),
    ],
)
def test_places_that_cannot_be_opened(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        open_store(uri)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "picture").write_bytes(b"x")
    store = open_store(tmp_path / "store")
    store.write("a/file", b"y")
    root = Path(store.uri)
    (root / "linked").symlink_to(outside)
    (root / "a" / "up").symlink_to(root)
    (outside / "back").symlink_to(root / "a")
    (root / "self").symlink_to(root / "self")
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "link to file").symlink_to(outside / "picture")
    assert [entry.key for entry in store.list()] == [
        "a/file",
        "link to file",
        "linked/back/file",
        "linked/picture",
    ]
    assert store.read("linked/picture") == b"x"


def test_pipes_are_no_objects(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    store = open_store(tmp_path)
    assert list(store.list()) == []
    assert not store.exists("pipe")
    with pytest.raises(NotFoundError):
        store.read("pipe")


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"")
    with pytest.raises(StorageError, match="not UTF-8"):
        list(open_store(tmp_path).list())


def test_files_and_folders_do_not_take_each_others_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        list(open_store(tmp_path / "file").list())
    store = open_store(tmp_path)
    store.write("folder/key", b"x")
    with pytest.raises(StorageError, match="is a folder"):
        store.write("folder", b"x")
    with pytest.raises(StorageError, match="cannot be written"):
        store.write("file/below", b"x")
    with pytest.raises(StorageError, match="'//'"):
        store.read("folder//key")
    store.delete("folder")
    store.delete("file/below")
    assert [entry.key for entry in store.list()] == ["file", "folder/key"]


# S3


def test_stores_of_one_endpoint_share_their_connections(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        bucket = s3.new_bucket()
        for number in range(5):
            store = open_store(f"s3://{bucket}/{number}")
            store.write("key", b"x")
            assert store.read("key") == b"x"
            assert [entry.key for entry in store.list()] == ["key"]
        assert len(proxy.requests) == 15
        assert proxy.connections == 1


def test_the_endpoint_comes_from_config_before_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    open_store(f"s3://{bucket}", StorageConfig(endpoint=s3.endpoint)).write("key", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    assert open_store(f"s3://{bucket}").read("key") == b"x"


def test_the_endpoint_of_a_profile_counts_as_one(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with faulty_proxy(s3.endpoint) as proxy:
        (tmp_path / "config").write_text(f"[default]\nendpoint_url = {proxy.endpoint}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        open_store(f"s3://{s3.new_bucket()}").write("key", b"x")
        assert not _checksum_headers(proxy.seen("PUT")[0].headers)


def test_newer_checksum_headers_are_sent_only_where_asked_for(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    with faulty_proxy(s3.endpoint) as proxy:

        def headers_of_a_write(config: StorageConfig) -> dict[str, str]:
            store = open_store(f"s3://{bucket}", config)
            store.write("key", b"x")
            assert store.read("key") == b"x"
            return proxy.seen("PUT")[-1].headers

        assert not _checksum_headers(headers_of_a_write(StorageConfig(endpoint=proxy.endpoint)))
        assert _checksum_headers(headers_of_a_write(StorageConfig(endpoint=proxy.endpoint, checksums="when_supported")))
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
        assert _checksum_headers(headers_of_a_write(StorageConfig(endpoint=proxy.endpoint)))
        assert not _checksum_headers(
            headers_of_a_write(StorageConfig(endpoint=proxy.endpoint, checksums="when_required"))
        )


def _checksum_headers(headers: dict[str, str]) -> set[str]:
    return {name for name in headers if name.startswith(("x-amz-checksum-", "x-amz-sdk-checksum-", "x-amz-trailer"))}


def _uses(store: Store, tmp_path: Path) -> Iterator[Callable[[], object]]:
    (tmp_path / "source").write_bytes(b"x")
    yield lambda: store.read("key")
    yield lambda: store.read_range("key", 0, 1)
    yield lambda: store.write("key", b"x")
    yield lambda: store.upload(tmp_path / "source", "key")
    yield lambda: store.download("key", tmp_path / "copy")
    yield lambda: store.stat("key")
    yield lambda: store.exists("key")
    yield lambda: store.delete("key")
    yield lambda: list(store.list())


def _refusals(store: Store, tmp_path: Path, s3: S3Server) -> list[str]:
    messages = []
    for use in _uses(store, tmp_path):
        with pytest.raises(StorageError) as caught:
            use()
        assert not isinstance(caught.value, NotFoundError)
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
        messages.append(str(caught.value))
    assert not any(s3.secret in message for message in messages)
    return messages


def test_a_missing_bucket_is_named(s3: S3Server, tmp_path: Path) -> None:
    for message in _refusals(open_store("s3://no-such-bucket/x"), tmp_path, s3):
        assert "bucket 'no-such-bucket' does not exist" in message
        assert "check its name" in message


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_say_what_to_check(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    store = open_store(f"s3://{s3.new_bucket()}")
    store.write("key", b"written with the right ones")
    monkeypatch.setenv(wrong, "not-the-right-one")
    for message in _refusals(store, tmp_path, s3):
        assert "AWS_ACCESS_KEY_ID" in message and "credentials" in message
        assert "not-the-right-one" not in message


def test_missing_credentials_say_what_to_set(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3.new_bucket()}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for message in _refusals(store, tmp_path, s3):
        assert "no usable S3 credentials" in message and "set AWS_ACCESS_KEY_ID" in message


def test_an_endpoint_that_does_not_answer_is_named(s3: S3Server, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = open_store("s3://bucket", StorageConfig(endpoint=endpoint, attempts=1))
        for message in _refusals(store, tmp_path, s3):
            assert f"{endpoint} cannot be reached" in message and "check AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://host", "http://", "http://host:port"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected http://host:port"):
        StorageConfig(endpoint=endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL.*expected http://host:port"):
        open_store("s3://bucket")


def test_credentials_in_the_endpoint_are_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = "http://user:hunter2@host:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for use in (lambda: StorageConfig(endpoint=endpoint), lambda: open_store("s3://bucket")):
        with pytest.raises(StorageError, match="credentials belong into AWS_ACCESS_KEY_ID") as caught:
            use()
        assert "hunter2" not in str(caught.value)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kill_when(child: "subprocess.Popen[bytes]", condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and child.poll() is None:
        assert time.monotonic() < deadline, "waited for 60 s"
        time.sleep(0.0005)
    child.kill()
    child.communicate(timeout=60)
