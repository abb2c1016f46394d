"""New objects that appear whole or not at all, on a local disk and on an object store."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from service.adapters.store_calls import failing


class ObjectWriter:
    """Takes the bytes of a new object; tells the store's errors from those of whoever fills it."""

    def __init__(self, file: IO[bytes], what: str) -> None:
        self._file, self._what = file, what

    def write(self, data: bytes, /) -> int:
        """Add bytes. Raises StorageError."""
        with failing(self._what):
            return self._file.write(data)


@contextmanager
def local_upload(path: str, what: str) -> Iterator[ObjectWriter]:
    """Write beside the target, then rename; file and folders are on the disk when this ends."""
    folder, temporary = os.path.dirname(path), f"{path}.{uuid.uuid4().hex}.tmp"
    with failing(what):
        _make_folder(folder)
        file = open(temporary, "wb")  # noqa: SIM115
    try:
        yield ObjectWriter(file, what)
        with failing(what):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
            _sync_folder(folder)
    except BaseException:
        with suppress(OSError):  # what it still holds is not wanted
            file.close()
        with suppress(OSError):
            os.unlink(temporary)
        with suppress(OSError):  # it is not empty: others use it
            os.rmdir(folder)
        raise


@contextmanager
def remote_upload(fs: Any, path: str, what: str) -> Iterator[ObjectWriter]:
    """Object stores publish on close; an upload that is not finished is withdrawn."""
    with failing(what):
        file = fs.open(path, "wb")
    try:
        yield ObjectWriter(file, what)
        with failing(what):
            file.close()
    except BaseException as error:
        try:
            file.discard()
        except Exception as other:  # the store is away: its own clean-up ends the upload some day
            error.add_note(f"the upload could not be withdrawn: {other}")
        file.closed = True  # or the garbage collector publishes it
        raise


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
