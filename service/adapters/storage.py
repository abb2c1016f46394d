"""The storage layout, in one place, over any fsspec file system.

datasets/<dataset>/rows.jsonl
datasets/<dataset>/unowned              there while it is uploaded or deleted
outputs/<dataset>/<key>/<segment>       what models answered to its rows; <key> hashes model and settings
runs/<run>/plan.json                    the RunPlan, written by the control plane before the first attempt
runs/<run>/desired.json                 {"state": "running" | "paused" | "cancelled", "attempt": n}: what the
                                        control plane wants; n is the attempt that may work, and "parent"
                                        the version (its folder) that it goes on from
runs/<run>/a<n>/events/<seq>.jsonl      immutable segments; <seq> is the first sequence number, 12 digits
runs/<run>/a<n>/logs/<process>/         what a process printed; <offset>.log, immutable segments
runs/<run>/a<n>/tensorboard/            TensorBoard event files, where the job asks for them
runs/<run>/a<n>/outcome.json            {"state", "reason", "message"}: how the driver ended
runs/<run>/a<n>/worker_outcome.json     the same, as the workers saw it
runs/<run>/a<n>/tasks/<i>/              one trained task, complete once manifest.json is there
runs/<run>/train/a<n>/                  Ray Train's own checkpoints

A call repeats what may pass and then raises StorageError; an object that is absent is FileNotFoundError.
Nothing is cached. A write is seen whole or not at all, and once it returned it outlives a power cut.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from service.adapters.store_calls import RETRIES, StorageError, failing, open_filesystem, patiently
from service.adapters.uploads import ObjectWriter, local_upload, remote_upload

__all__ = ["ObjectWriter", "Storage", "StorageError"]

T = TypeVar("T")
CHUNK_BYTES = 8 * 2**20
_SAFE_KEY = re.compile(r"^\.?[A-Za-z0-9][A-Za-z0-9._-]*(/\.?[A-Za-z0-9][A-Za-z0-9._-]*)*$")


class Storage:
    """Read and write whole objects under one root.

    patience_s: how long a call waits at least for a store that is away, before it raises StorageError.
    """

    def __init__(self, url: str, *, patience_s: float = 0.0) -> None:
        self.url, self.patience_s, self._num_retries = url.rstrip("/"), patience_s, RETRIES
        self.fs, self.root = open_filesystem(self.url)
        self.is_local = "file" in self.fs.protocol

    def __reduce__(self) -> tuple[Callable[..., Storage], tuple[Any, ...]]:
        return _reopen, (self.url, self.patience_s)

    def without_patience(self) -> Storage:
        """Return the same storage for a call that had better fail soon than wait."""
        other = object.__new__(Storage)
        other.__dict__.update(self.__dict__)
        other.patience_s, other._num_retries = 0.0, 0
        return other

    def path(self, key: str) -> str:
        """Return the full path of a key. Raises ValueError for a key that could leave the root."""
        if not _SAFE_KEY.match(key) or ".." in key:
            raise ValueError(
                f"bad storage key {key!r}: letters, digits, '.', '_', '-' and '/' only, never '..'"
            )
        return posixpath.join(self.root, key)

    def uri(self, key: str) -> str:
        """Return the key as a URL that another process can open."""
        return f"{self.url}/{key}"

    def check(self) -> None:
        """Return when the store answers; an empty one answers too. Raises StorageError."""
        if self.is_local:
            with failing(f"make {self.root}"):
                os.makedirs(self.root, exist_ok=True)
        with suppress(FileNotFoundError), failing(f"list {self.root}", absent_passes=True):
            self.fs.ls(self.root)

    # ------------------------------------------------------------------------------------------------ reading

    def is_folder(self, key: str) -> bool:
        """Is this a folder? Raises FileNotFoundError when there is nothing at this key."""
        return bool(self._read(key, self.fs.info)["type"] == "directory")

    def exists(self, key: str) -> bool:
        """Is there an object or folder at this key?"""
        try:
            self._read(key, self.fs.info)
        except FileNotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        """Return an object's bytes. Raises FileNotFoundError."""
        return int(self._read(key, self.fs.info)["size"])

    def read_bytes(self, key: str) -> bytes:
        """Read a whole object. Raises FileNotFoundError."""
        return bytes(self._read(key, self.fs.cat_file))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Read the bytes from start up to, not including, end. Raises FileNotFoundError."""
        return bytes(self._read(key, lambda path: self.fs.cat_file(path, start=start, end=end)))

    def chunks(self, key: str) -> Iterator[bytes]:
        """Read an object piece by piece. Raises FileNotFoundError."""
        num_bytes = self.size(key)
        for start in range(0, num_bytes, CHUNK_BYTES):
            yield self.read_range(key, start, min(start + CHUNK_BYTES, num_bytes))

    def read_json(self, key: str) -> Any:
        """Read a JSON object. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(key))

    def names(self, key: str) -> list[str]:
        """Return the sorted names directly under a key; empty when there is none.

        Some object stores name a folder for a while after its last object is gone; find() does not.
        """
        path = self.path(key)
        try:
            entries = self._read(key, lambda _: self.fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        found = {posixpath.basename(entry.rstrip("/")) for entry in entries if entry.rstrip("/") != path}
        return sorted(name for name in found if not name.endswith(".tmp"))

    def find(self, key: str) -> list[str]:
        """Return the sorted keys of all objects under a key; empty when there is none."""
        try:
            entries = self._read(key, lambda path: self.fs.find(path, detail=True))
        except FileNotFoundError:
            return []
        start = len(self.root.rstrip("/")) + 1
        objects = (path[start:] for path, entry in entries.items() if entry["type"] == "file")
        return sorted(found for found in objects if not found.endswith(".tmp"))

    def get_folder(self, key: str, local: str) -> None:
        """Copy everything under a key into a local folder. Raises FileNotFoundError when there is nothing."""
        found = self.find(key)
        if not found:
            raise FileNotFoundError(f"storage has nothing under {key!r}")
        for name in found:
            self.get_file(name, Path(local) / name.removeprefix(f"{key}/"))

    def get_file(self, key: str, local: Path) -> None:
        """Copy an object to a local file. Raises FileNotFoundError."""
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as file:
            file.writelines(self.chunks(key))

    def _read(self, key: str, work: Callable[[str], T], verb: str = "read") -> T:
        path = self.path(key)

        def once() -> T:
            with failing(f"{verb} {key!r}", absent_passes=True):
                return work(path)

        return patiently(once, self._num_retries, self.patience_s)

    # ------------------------------------------------------------------------------------------------ writing

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a whole object; a reader sees the old bytes or the new ones, never a mixture."""

        def once() -> None:
            with self.open_new(key) as file:
                file.write(data)

        patiently(once, self._num_retries, self.patience_s)

    def write_json(self, key: str, value: Any) -> None:
        """Write a value as JSON, whole."""
        self.write_bytes(key, json.dumps(value, indent=1, sort_keys=True).encode())

    def write_file(self, key: str, source: IO[bytes]) -> None:
        """Write an object from an open local file, from its beginning."""

        def once() -> None:
            source.seek(0)
            with self.open_new(key) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)

        patiently(once, self._num_retries, self.patience_s)

    def put_folder(self, local: str, key: str) -> None:
        """Copy a local folder's files under a key, one after the other."""
        for path in sorted(Path(local).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    self.write_file(f"{key}/{path.relative_to(local).as_posix()}", file)

    @contextmanager
    def open_new(self, key: str) -> Iterator[ObjectWriter]:
        """Open an object for streaming; it appears when the block ends, and leaves nothing after an error.

        What was written cannot be written again, so that this call repeats nothing.
        """
        path, what = self.path(key), f"write {key!r}"
        with local_upload(path, what) if self.is_local else remote_upload(self.fs, path, what) as file:
            yield file

    def delete(self, key: str) -> None:
        """Remove an object or a folder; nothing happens when there is none."""
        with suppress(FileNotFoundError):
            self._read(key, lambda path: self.fs.rm(path, recursive=True), "delete")

    def delete_unfinished(self, key: str) -> None:
        """Remove what writers that were killed left under a key.

        Only for a local folder: an object store keeps unfinished uploads out of sight and ends them by a
        lifecycle rule.
        """
        if self.is_local:
            for path in self._read(key, self.fs.find):
                if path.endswith(".tmp"):
                    self.delete(path[len(self.root.rstrip("/")) + 1 :])


def _reopen(url: str, patience_s: float) -> Storage:
    return Storage(url, patience_s=patience_s)


def dataset_key(dataset_id: str) -> str:
    """Rows of a data set."""
    return f"datasets/{dataset_id}/rows.jsonl"


def unowned_key(dataset_id: str) -> str:
    """Mark of rows that no data set may name: their upload goes on, or their data set is being deleted."""
    return f"datasets/{dataset_id}/unowned"


def outputs_key(dataset_id: str) -> str:
    """Folder of what models answered to the rows of a data set."""
    return f"outputs/{dataset_id}"


def plan_key(run_id: str) -> str:
    """The RunPlan of a run."""
    return f"runs/{run_id}/plan.json"


def desired_key(run_id: str) -> str:
    """What the control plane wants of a run."""
    return f"runs/{run_id}/desired.json"


def train_key(run_id: str) -> str:
    """Folder of Ray Train's own checkpoints."""
    return f"runs/{run_id}/train"


def attempt_key(run_id: str, attempt: int) -> str:
    """Folder of one attempt."""
    return f"runs/{run_id}/a{attempt}"


def events_key(run_id: str, attempt: int) -> str:
    """Folder of an attempt's event segments."""
    return f"{attempt_key(run_id, attempt)}/events"


def logs_key(run_id: str, attempt: int) -> str:
    """Folder of what an attempt's processes printed, one folder each."""
    return f"{attempt_key(run_id, attempt)}/logs"


def tensorboard_key(run_id: str, attempt: int) -> str:
    """Folder of an attempt's TensorBoard files."""
    return f"{attempt_key(run_id, attempt)}/tensorboard"


def outcome_key(run_id: str, attempt: int) -> str:
    """How an attempt's driver ended."""
    return f"{attempt_key(run_id, attempt)}/outcome.json"


def worker_outcome_key(run_id: str, attempt: int) -> str:
    """How an attempt's workers ended; the driver turns it into the outcome."""
    return f"{attempt_key(run_id, attempt)}/worker_outcome.json"


def task_key(run_id: str, attempt: int, task_index: int) -> str:
    """Folder of one trained task."""
    return f"{attempt_key(run_id, attempt)}/tasks/{task_index}"
