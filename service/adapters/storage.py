"""The storage layout, in one place, over any fsspec file system.

datasets/<dataset>/rows.jsonl
outputs/<dataset>/<key>/<segment>       what models answered to its rows; <key> hashes model and settings
runs/<run>/plan.json                    the RunPlan, written by the control plane before the first attempt
runs/<run>/desired.json                 {"state": "running" | "paused" | "cancelled", "attempt": n}: what the
                                        control plane wants; n is the attempt that may work
runs/<run>/a<n>/events/<seq>.jsonl      immutable segments; <seq> is the first sequence number, 12 digits
runs/<run>/a<n>/tensorboard/            TensorBoard event files, where the job asks for them
runs/<run>/a<n>/outcome.json            {"state", "reason", "message"}: how the driver ended
runs/<run>/a<n>/worker_outcome.json     the same, as the workers saw it
runs/<run>/a<n>/tasks/<i>/              one trained task, complete once manifest.json is there
runs/<run>/train/a<n>/                  Ray Train's own checkpoints
"""

from __future__ import annotations

import json
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec

_SAFE_KEY = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")


class Storage:
    """Read and write whole objects under one root; writes are atomic where the file system can rename."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url.rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **options)
        self.is_local = "file" in self.fs.protocol

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

    def exists(self, key: str) -> bool:
        """Is there an object or folder at this key?"""
        return bool(self.fs.exists(self.path(key)))

    def read_bytes(self, key: str) -> bytes:
        """Read a whole object. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(key)))

    def read_json(self, key: str) -> Any:
        """Read a JSON object. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(key))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write a whole object; a reader sees the old bytes or the new ones, never a mixture."""
        with self.open_new(key) as file:
            file.write(data)

    def write_json(self, key: str, value: Any) -> None:
        """Write a value as JSON, whole."""
        self.write_bytes(key, json.dumps(value, indent=1, sort_keys=True).encode())

    @contextmanager
    def open_new(self, key: str) -> Iterator[IO[bytes]]:
        """Open an object for streaming; it becomes visible when the block ends without an error."""
        path = self.path(key)
        if not self.is_local:  # object stores publish on close
            with self.fs.open(path, "wb") as file:
                yield file
            return
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with self.fs.open(temporary, "wb") as file:
                yield file
                file.flush()
            self.fs.mv(temporary, path)
        finally:
            if self.fs.exists(temporary):
                self.fs.rm_file(temporary)

    def put_folder(self, local: str, key: str) -> None:
        """Copy a local folder's files under a key."""
        target = self.path(key)
        self.fs.makedirs(target, exist_ok=True)
        self.fs.put(local.rstrip("/") + "/", target + "/", recursive=True)

    def get_folder(self, key: str, local: str) -> None:
        """Copy everything under a key into a local folder."""
        self.fs.get(self.path(key) + "/", local.rstrip("/") + "/", recursive=True)

    def names(self, key: str) -> list[str]:
        """Return the sorted names directly under a key; empty when there is none."""
        path = self.path(key)
        self.fs.invalidate_cache(path)
        if not self.fs.exists(path):
            return []
        found = (posixpath.basename(entry.rstrip("/")) for entry in self.fs.ls(path, detail=False))
        return sorted(name for name in found if not name.endswith(".tmp"))

    def delete(self, key: str) -> None:
        """Remove an object or a folder; nothing happens when there is none."""
        path = self.path(key)
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)


def dataset_key(dataset_id: str) -> str:
    """Rows of a data set."""
    return f"datasets/{dataset_id}/rows.jsonl"


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
