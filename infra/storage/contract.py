"""What every store promises: entries, errors, the interface, the rules for keys, the settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from infra.config import Config
from infra.errors import Refusal

UNPUBLISHED = ".tmp-"


class StorageError(Refusal, OSError):
    """A store could not do what was asked. The message names the object and says what to check."""


class NotFoundError(StorageError):
    """The object does not exist (the store itself does)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored object: key relative to the store, size in bytes, and a version that changes with the content.

    The version is the ETag (S3) or the modification time in nanoseconds (local).
    """

    key: str
    size: int
    version: str


class Store(Protocol):
    """A folder or a bucket prefix. Implementations are immutable, picklable and safe to share between threads.

    A key is a relative path in ``/`` notation. Every method that takes one refuses, with StorageError,
    a key that is empty, absolute or ends in ``/``, that has a part ``.`` or ``..``, or a part that
    starts with ``.tmp-`` (the names of what is not yet published).
    """

    @property
    def uri(self) -> str:
        """Absolute path or ``s3://bucket/prefix``, no trailing slash: ``f"{uri}/{key}"`` names an object."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Entries whose key starts with ``prefix`` (plain text, not a folder), sorted by the UTF-8 bytes of the key.

        A folder or prefix that does not exist lists nothing, as on S3: who needs input checks for it.
        """
        ...

    def read(self, key: str) -> bytes:
        """All bytes of an object. NotFoundError if absent."""
        ...

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``read(key)[start:start + length]`` without reading the rest; short or empty only past the object's end."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Publish ``data`` in one step: readers see the old object or the new one."""
        ...

    def upload(self, path: str | Path, key: str) -> None:
        """Publish a local file in one step, in bounded memory whatever its size."""
        ...

    def download(self, key: str, path: str | Path) -> None:
        """Copy an object to a local file, published there in one step, in bounded memory whatever its size."""
        ...

    def stat(self, key: str) -> Entry:
        """Size and version of an object. NotFoundError if absent."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object is there. A missing bucket or refused credentials raise rather than say no."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is absent is fine."""
        ...


def check_key(key: str, uri: str) -> None:
    """Refuse keys that could leave the store or name what is not published."""
    parts = key.split("/")
    if not key or parts[0] == "" or parts[-1] == "" or "\0" in key:
        raise StorageError(f"key {key!r} in {uri}: expected a relative path such as shards/a.tar")
    if not is_utf8(key):
        raise StorageError(f"key {key!r} in {uri}: is not UTF-8 text")
    if "." in parts or ".." in parts:
        raise StorageError(f"key {key!r} in {uri}: '.' and '..' are refused, a key must stay inside its store")
    if is_unpublished(key):
        raise StorageError(f"key {key!r} in {uri}: names starting with {UNPUBLISHED!r} are kept for unfinished writes")


def check_prefix(prefix: str, uri: str) -> None:
    """Refuse listing prefixes that could leave the store."""
    parts = prefix.split("/")
    if prefix.startswith("/") or "\0" in prefix or "." in parts[:-1] or ".." in parts:
        raise StorageError(f"prefix {prefix!r} in {uri}: expected the start of a key, without leading '/', '.' or '..'")


def is_utf8(name: str) -> bool:
    """False for names that hold bytes of another encoding, which Python reads as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_unpublished(key: str) -> bool:
    return key.startswith(UNPUBLISHED) or f"/{UNPUBLISHED}" in key


class StorageConfig(Config):
    """How to talk to S3. It holds no secrets: those stay in the AWS variables, profile or instance role."""

    endpoint: str | None = Field(
        None, description="URL of an S3-compatible store; default AWS_ENDPOINT_URL_S3, then AWS_ENDPOINT_URL, else AWS"
    )
    region: str | None = Field(None, description="default: AWS_REGION, AWS_DEFAULT_REGION or the profile's")
    checksums: Literal["auto", "when_required", "when_supported"] = Field(
        "auto",
        description="botocore's mode for requests and responses. Many S3-compatible stores refuse the newer checksum "
        "headers, so auto means when_required for any endpoint but AWS; what is sent then carries a Content-MD5",
    )
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", description="auto: path style for any endpoint but AWS"
    )
    attempts: int = Field(
        8, ge=1, le=20, description="tries of one request; waits double from 1 s to 20 s, with jitter"
    )
    connect_timeout: float = Field(10.0, gt=0, description="seconds")
    read_timeout: float = Field(60.0, gt=0, description="seconds without a byte before a connection counts as dead")
    connections: int = Field(16, ge=1, description="kept open per process, shared by its threads")
    multipart_threshold: int = Field(
        32 << 20, ge=5 << 20, le=5 << 30, description="bytes; larger objects go up in parts"
    )
    part_bytes: int = Field(16 << 20, ge=5 << 20, le=5 << 30, description="bytes of a part, in either direction")
    transfer_threads: int = Field(4, ge=1, le=64, description="parts in flight; memory is about this times part_bytes")

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        try:
            parts = urlsplit(endpoint)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            raise ValueError("expected http://host:port or https://host")
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not a ValueError: reports on those repeat the value, and this one may hold a password.
            raise StorageError(
                "storage endpoint: expected http://host:port and nothing more; credentials belong into "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return endpoint.rstrip("/")
