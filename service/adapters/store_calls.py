"""Calls of a store's client: one kind of error for whatever fails, and repeats while it may pass.

A client's own repeats are kept to a minimum, so that how long a call waits for a store is decided here.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")
RETRIES = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
PATIENCE_S = 60.0
"""How long driver and workers wait for a store that is away: cheaper than to start from a checkpoint."""
UPLOAD_BLOCK_BYTES = 16 * 2**20
"""What one upload to an object store holds in memory; 10,000 blocks are the largest object."""
_HOPELESS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "default_block_size": UPLOAD_BLOCK_BYTES,
        "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 2}},
    }
}


class StorageError(OSError):
    """The store failed, also after repeats. An object that is absent is FileNotFoundError instead."""

    may_pass = True
    """Can a repeat help? Not with a full disk, or credentials that the store refuses."""


class DamagedFile(StorageError):
    """A file's size or sha256 is not what the manifest of its version says."""

    may_pass = False


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return a file system without caches for a URL, and the root in it."""
    protocol = url.partition("://")[0]
    options = _OPTIONS.get(protocol, {})
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True, **options)
    if protocol == "s3":
        fs.retries = 1
    return fs, root


@contextmanager
def failing(what: str, *, absent_passes: bool = False) -> Iterator[None]:
    """Turn whatever a store's client raises into StorageError.

    absent_passes: FileNotFoundError is an answer and passes, unless it is the whole bucket that is missing.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # clients have no common base of errors
        if absent_passes and isinstance(error, FileNotFoundError) and not _bucket_is_missing(error):
            raise
        failure = StorageError(f"storage cannot {what}: {type(error).__name__}: {error}")
        number = getattr(error, "errno", None)
        refused = isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS
        failure.may_pass = not (refused or number in _HOPELESS)
        raise failure from error


def patiently(work: Callable[[], T], max_retries: int, patience_s: float) -> T:
    """Repeat work after a StorageError that may pass: max_retries times, and for patience_s at least."""
    start, pause_s, num_retries = time.monotonic(), FIRST_PAUSE_S, 0
    while True:
        try:
            return work()
        except StorageError as error:
            is_over = num_retries >= max_retries and time.monotonic() - start >= patience_s
            if is_over or not error.may_pass:
                raise
        time.sleep(pause_s)
        pause_s, num_retries = min(2 * pause_s, LONGEST_PAUSE_S), num_retries + 1


def _bucket_is_missing(error: BaseException) -> bool:
    """A store that lost its bucket, or has not found it again yet, knows nothing about any object."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")
