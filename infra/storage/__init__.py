"""Folders and S3 buckets behind one small interface: list, read, ranged read, atomic publish, exists, stat, delete.

``open_store`` is the only door. A local folder behaves as a bucket would: keys are relative paths with
``/`` between the parts, listings are sorted by the UTF-8 bytes of the key, empty folders do not exist.
"""

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from infra.storage.contract import Entry, NotFoundError, StorageConfig, StorageError, Store
from infra.storage.local import LocalStore

__all__ = ["Entry", "NotFoundError", "StorageConfig", "StorageError", "Store", "open_store"]


def open_store(uri: str | Path, config: StorageConfig | None = None) -> Store:
    """Open a folder (path, ``~/path``, ``file://`` URI) or a bucket (``s3://bucket/prefix``). Nothing is contacted yet.

    Credentials come from the AWS variables, profile or instance role of the process that uses the
    store, never from ``config``. The endpoint comes from ``config`` or from AWS_ENDPOINT_URL_S3 /
    AWS_ENDPOINT_URL of the process that opens it, and travels with the store to other processes.

    Raises:
        StorageError: the scheme is not known, the bucket is not named, or the endpoint is not a URL.
    """
    text = os.fspath(uri)
    scheme, separator, rest = text.partition("://")
    if not separator or isinstance(uri, Path):
        if not text:
            raise StorageError("empty location: expected a folder, a file:// URI or s3://bucket/prefix")
        return LocalStore(_absolute(text))
    if scheme.lower() == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StorageError(f"{text}: expected file:///absolute/path; {parts.netloc!r} would be the name of a host")
        return LocalStore(_absolute(url2pathname(parts.path)))
    if scheme.lower() == "s3":
        # boto3 is slow to import, and processes that only see folders never need it.
        from infra.storage.s3 import S3Store

        return S3Store.at(rest, config or StorageConfig())
    raise StorageError(f"{text}: unknown scheme {scheme!r}; expected a folder, a file:// URI or s3://bucket/prefix")


def _absolute(folder: str) -> str:
    # normpath would collapse "link/..", which names another folder where link is a symbolic link.
    return str(Path(folder).expanduser().absolute())
