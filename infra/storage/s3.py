"""S3 and what speaks its protocol, through boto3.

botocore repeats requests that fail before their answer begins (standard mode: exponential backoff with
jitter). What it does not repeat is done here: a body that breaks off or fails its checksum, an upload
that arrives damaged, a completed multipart upload whose answer was lost.
"""

import base64
import contextlib
import hashlib
import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as aws
from botocore.config import Config as ClientConfig
from pydantic import ValidationError

from infra.files import publish_atomically
from infra.storage.contract import (
    Entry,
    NotFoundError,
    StorageConfig,
    StorageError,
    check_key,
    check_prefix,
    is_unpublished,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DAMAGED_UPLOAD = {
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "NoSuchUpload",
}
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
_WRONG_REGION = {"301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.ProfileNotFound,
    aws.TokenRetrievalError,
    aws.SSOError,
)


class _DamagedError(Exception):
    """Bytes were lost or changed on the way; the same request may well succeed."""


@dataclass(frozen=True)
class _Piece:
    data: bytes
    total: int
    etag: str


@dataclass(frozen=True)
class S3Store:
    """Objects of ``bucket`` whose key starts with ``prefix`` + '/'. Clients live in the process, not in the store."""

    bucket: str
    prefix: str
    config: StorageConfig

    @classmethod
    def at(cls, location: str, config: StorageConfig) -> "S3Store":
        """``location`` is ``bucket/prefix``; the environment's endpoint is resolved here, and stays with the store."""
        bucket, _, prefix = location.partition("/")
        prefix = prefix.strip("/")
        if not bucket:
            raise StorageError(f"s3://{location}: expected s3://bucket/prefix, the bucket is missing")
        if prefix:
            check_key(prefix, f"s3://{bucket}")
        return cls(bucket, prefix, _resolved(config))

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def list(self, prefix: str = "") -> Iterator[Entry]:
        check_prefix(prefix, self.uri)
        base = f"{self.prefix}/" if self.prefix else ""
        last = b""
        with self._explained(prefix):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(base)
                    if not key or key.endswith("/") or is_unpublished(key):
                        continue  # "folder" markers of web consoles hold no data
                    if key.encode() <= last:
                        raise StorageError(
                            f"{self.uri}: the store lists {key!r} out of order, so positions would not be stable; "
                            "use a general purpose bucket, whose listings are sorted by key"
                        )
                    last = key.encode()
                    yield Entry(key, found["Size"], found["ETag"].strip('"'))

    def read(self, key: str) -> bytes:
        return self._fetch(key).data

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise ValueError(f"start and length must not be negative, got {start} and {length}")
        if length == 0:
            self.stat(key)
            return b""
        return self._fetch(key, start, length).data

    def write(self, key: str, data: bytes) -> None:
        if len(data) > self.config.multipart_threshold:
            self._send(key, lambda: io.BytesIO(data), len(data))
            return
        full_key = self._full_key(key)

        def put() -> None:
            with _damage_noticed():
                self._client().put_object(Bucket=self.bucket, Key=full_key, Body=data)

        with self._explained(key):
            self._until_intact(put, key)

    def upload(self, path: str | Path, key: str) -> None:
        if not Path(path).is_file():
            raise NotFoundError(f"{path}: no such file to upload")
        self._send(key, lambda: os.fspath(path), Path(path).stat().st_size)

    def download(self, key: str, path: str | Path) -> None:
        self._full_key(key)
        with publish_atomically(path) as temporary:
            self._until_intact(lambda: self._fetch_into(temporary, key), key)

    def stat(self, key: str) -> Entry:
        full_key = self._full_key(key)
        with self._explained(key):
            head = self._client().head_object(Bucket=self.bucket, Key=full_key)
            return Entry(key, head["ContentLength"], head["ETag"].strip('"'))

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except NotFoundError:
            return False
        return True

    def delete(self, key: str) -> None:
        full_key = self._full_key(key)
        with contextlib.suppress(NotFoundError), self._explained(key):
            self._client().delete_object(Bucket=self.bucket, Key=full_key)

    def _full_key(self, key: str) -> str:
        check_key(key, self.uri)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _client(self) -> Any:
        return _client(self.config)

    def _fetch(self, key: str, start: int = 0, length: int | None = None) -> _Piece:
        """The whole object, or up to ``length`` > 0 bytes of it, complete or not at all."""
        full_key = self._full_key(key)
        ranged = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}

        def get() -> _Piece:
            try:
                answer = self._client().get_object(Bucket=self.bucket, Key=full_key, **ranged)
            except aws.ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return _Piece(b"", 0, "")
                raise
            if length is not None and "ContentRange" not in answer:
                answer["Body"].close()
                raise StorageError(f"{self.uri}/{key}: the store ignores byte ranges; use one that serves them")
            try:
                with contextlib.closing(answer["Body"]) as body:
                    data = body.read()
            except (aws.HTTPClientError, aws.IncompleteReadError, aws.FlexibleChecksumError) as error:
                raise _DamagedError(str(error)) from error
            total = len(data) if length is None else int(answer["ContentRange"].rpartition("/")[2])
            expected = total if length is None else min(length, total - start)
            if len(data) != expected:
                raise _DamagedError(f"{len(data)} bytes came where {expected} were due")
            return _Piece(data, total, answer["ETag"])

        with self._explained(key):
            return self._until_intact(get, key)

    def _fetch_into(self, path: Path, key: str) -> None:
        part = self.config.part_bytes
        first = self._fetch(key, 0, part)
        path.write_bytes(first.data)

        def fetch_part(start: int) -> None:
            piece = self._fetch(key, start, part)
            # If-Match would say the same, but not every store honours it.
            if piece.etag != first.etag or piece.total != first.total:
                raise _DamagedError("the object was replaced while it was being read")
            with open(path, "rb+") as file:
                file.seek(start)
                file.write(piece.data)

        pool = ThreadPoolExecutor(self.config.transfer_threads)
        try:
            for _ in pool.map(fetch_part, range(part, first.total, part)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _send(self, key: str, source: Callable[[], str | io.BytesIO], size: int) -> None:
        full_key = self._full_key(key)
        transfer = TransferConfig(
            multipart_threshold=self.config.multipart_threshold + 1,
            multipart_chunksize=self.config.part_bytes,
            max_concurrency=self.config.transfer_threads,
            preferred_transfer_client="classic",
        )

        def send() -> None:
            client = self._client()
            with _damage_noticed(), create_transfer_manager(client, transfer) as manager:
                manager.upload(source(), self.bucket, full_key).result()
            stored = client.head_object(Bucket=self.bucket, Key=full_key)["ContentLength"]
            if stored != size:
                raise _DamagedError(f"{stored} bytes are stored where {size} were sent (another writer of this key?)")

        with self._explained(key):
            self._until_intact(send, key)

    def _until_intact(self, operation: Callable[[], T], key: str) -> T:
        attempt = 1
        while True:
            try:
                return operation()
            except _DamagedError as damage:
                if attempt == self.config.attempts:
                    raise StorageError(f"{self.uri}/{key}: failed {attempt} times, last: {damage}") from damage
                logger.warning("%s/%s: %s; trying again", self.uri, key, damage)
            time.sleep(random.uniform(0, min(20, 2 ** (attempt - 1))))
            attempt += 1

    @contextlib.contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except (aws.ClientError, aws.BotoCoreError) as error:
            raise self._explanation(error, f"{self.uri}/{key}" if key else self.uri) from error

    def _explanation(self, error: Exception, subject: str) -> StorageError:
        where = self.config.endpoint or "AWS"
        if isinstance(error, _NO_CREDENTIALS):
            return StorageError(
                f"{subject}: no usable S3 credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_PROFILE, in the environment of this process"
            )
        if isinstance(error, (aws.ConnectionError, aws.HTTPClientError)):
            return StorageError(
                f"{subject}: {where} cannot be reached ({error}); check AWS_ENDPOINT_URL, that the server runs, "
                "and the network between"
            )
        if not isinstance(error, aws.ClientError):
            return StorageError(f"{subject}: {error}")
        code = _code(error)
        if code in ("NoSuchBucket", "404", "NoSuchKey", "NotFound"):
            # A HEAD answer has no body, so 404 alone does not say what is missing.
            if code == "NoSuchBucket" or (code != "NoSuchKey" and self._bucket_is_missing()):
                return StorageError(
                    f"{subject}: bucket {self.bucket!r} does not exist at {where}; check its name "
                    "and AWS_ENDPOINT_URL, or create it"
                )
            return NotFoundError(f"{subject}: no such object")
        if code in _WRONG_CREDENTIALS:
            return StorageError(
                f"{subject}: {where} does not accept the credentials ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, and whether they have expired"
            )
        if code in ("403", "AccessDenied", "Forbidden"):
            return StorageError(
                f"{subject}: access refused by {where}; check the credentials (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) and that they may do this. Without s3:ListBucket, a missing object "
                "is reported like this too"
            )
        if code in _WRONG_REGION:
            return StorageError(f"{subject}: the bucket is in another region ({code}); set AWS_DEFAULT_REGION to it")
        if code == "RequestTimeTooSkewed":
            return StorageError(f"{subject}: the clocks of this machine and of {where} differ too much; set this one")
        return StorageError(f"{subject}: {error}")

    def _bucket_is_missing(self) -> bool:
        if (self.config.endpoint, self.bucket) in _buckets_seen:
            return False
        try:
            self._client().head_bucket(Bucket=self.bucket)
        except aws.ClientError as error:
            return _code(error) in ("404", "NoSuchBucket")
        _buckets_seen.add((self.config.endpoint, self.bucket))
        return False


def _code(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def _damage_noticed() -> Iterator[None]:
    try:
        yield
    except aws.ClientError as error:
        # NoSuchUpload: the upload was completed but the answer lost, so botocore asked once more.
        if _code(error) in _DAMAGED_UPLOAD:
            raise _DamagedError(str(error)) from error
        raise


def _resolved(config: StorageConfig) -> StorageConfig:
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    if config.endpoint or not environment or ignored:
        return config
    try:
        return StorageConfig(**{**config.model_dump(), "endpoint": environment})
    except ValidationError as error:
        # The URL itself is not repeated: it may hold a password.
        raise StorageError(f"AWS_ENDPOINT_URL_S3 / AWS_ENDPOINT_URL: {error.errors()[0]['msg']}") from None


# One client per process and settings: connections and credentials are shared by all stores and threads.
_clients: dict[tuple[StorageConfig, int], Any] = {}
_clients_lock = threading.Lock()
_buckets_seen: set[tuple[str | None, str]] = set()


def _forget_clients() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()


# A forked child must not speak over its parent's sockets.
os.register_at_fork(after_in_child=_forget_clients)


def _client(config: StorageConfig) -> Any:
    environment = hash(frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _clients_lock:
        if (config, environment) not in _clients:
            _clients[config, environment] = _new_client(config)
        return _clients[config, environment]


def _new_client(config: StorageConfig) -> Any:
    session = boto3.session.Session()
    client = _boto_client(session, config, compatible=config.endpoint is not None and not _is_aws(config.endpoint))
    # A profile may name an endpoint too, which only the finished client tells.
    if config.endpoint is None and not _is_aws(client.meta.endpoint_url):
        client = _boto_client(session, config, compatible=True)
    client.meta.events.register("needs-retry.s3", _say_that_requests_fail)
    client.meta.events.register("before-call.s3.PutObject", _guard_body)
    client.meta.events.register("before-call.s3.UploadPart", _guard_body)
    return client


def _boto_client(session: boto3.session.Session, config: StorageConfig, compatible: bool) -> Any:
    checksums = config.checksums if config.checksums != "auto" else "when_required" if compatible else None
    addressing = config.addressing if config.addressing != "auto" else "path" if compatible else "auto"
    chosen = {
        name: checksums
        for name in ("request_checksum_calculation", "response_checksum_validation")
        # The usual AWS variables win over the default, but not over what was configured.
        if checksums and (config.checksums != "auto" or f"AWS_{name.upper()}" not in os.environ)
    }
    return session.client(
        "s3",
        endpoint_url=config.endpoint,
        region_name=config.region or os.environ.get("AWS_REGION"),
        config=ClientConfig(
            connect_timeout=config.connect_timeout,
            read_timeout=config.read_timeout,
            retries={"mode": "standard", "total_max_attempts": config.attempts},
            max_pool_connections=config.connections,
            tcp_keepalive=True,
            s3={"addressing_style": addressing},
            **chosen,
        ),
    )


def _is_aws(endpoint: str) -> bool:
    return (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _guard_body(params: dict[str, Any], **_: Any) -> None:
    """Send a Content-MD5 where no newer checksum goes along: every store knows it, and refuses a body that differs.

    The signature covers the body too, but not every S3-compatible store checks that.
    """
    if params["context"].get("checksum", {}).get("request_algorithm"):
        return
    body, md5 = params["body"], hashlib.md5(usedforsecurity=False)
    if isinstance(body, (bytes, bytearray)):
        md5.update(body)
    else:
        start = body.tell()
        while piece := body.read(1 << 20):
            md5.update(piece)
        body.seek(start)
    params["headers"]["Content-MD5"] = base64.b64encode(md5.digest()).decode()


_last_warning = float("-inf")


def _say_that_requests_fail(attempts: int, response: Any, caught_exception: Any, **_: Any) -> None:
    """botocore retries in silence; a person who waits should know for what, once in a while."""
    global _last_warning
    status = response[0].status_code if response else None
    if (caught_exception is None and (status is None or status < 500)) or time.monotonic() - _last_warning < 30:
        return
    _last_warning = time.monotonic()
    reason = str(caught_exception) if caught_exception else f"HTTP status {status}"
    logger.warning("S3 request failed (%s), attempt %d; trying again with growing pauses", reason, attempts)
