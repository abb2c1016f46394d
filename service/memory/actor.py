"""The memory actor: replay buffer and Fisher state of one run, held outside the training workers.

Every write is saved to storage before it is answered, so a restarted actor goes on with its last two
versions. It imports no torch: arrays travel as numpy through Ray's object store, without copies on one
machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from clcore.engine.memory import InProcessMemory, Row, State
from service.adapters.storage import Storage, attempt_key
from service.memory.rows import RowReader

NAMESPACE = "clpeft"


def actor_name(run_id: str, attempt: int) -> str:
    """Name of an attempt's memory actor in NAMESPACE."""
    return f"memory-{run_id}-a{attempt}"


class MemoryActor:
    """Serves one attempt's MemoryStore.

    start_key: storage folder of the snapshot to begin with; None begins empty.
    """

    def __init__(
        self, storage_url: str, run_id: str, attempt: int, generation: str, start_key: str | None
    ) -> None:
        self._storage = Storage(storage_url)
        self._folder = f"{attempt_key(run_id, attempt)}/memory"
        self._memory = InProcessMemory(RowReader(self._storage), generation=generation)
        saved = [f"{self._folder}/{name}" for name in self._saved_versions()]
        for key in saved or ([start_key] if start_key else []):
            self._restore(key)

    def newest(self) -> int:
        """Return the newest version's number."""
        return self._memory.newest

    def read(self, version: int, key: str) -> State:
        """See MemoryStore.read."""
        return self._memory.read(version, key)

    def rows(self, version: int, refs: Sequence[str]) -> list[Row]:
        """See MemoryStore.rows."""
        return self._memory.rows(version, refs)

    def write(
        self, op_id: str, base_version: int, states: Mapping[str, State], refs: Mapping[str, Sequence[str]]
    ) -> int:
        """See MemoryStore.write; rows are loaded here, by reference. Saved to storage before it returns."""
        rows: dict[str, dict[str, Row]] = {key: {ref: {} for ref in of_key} for key, of_key in refs.items()}
        version = self._memory.write(op_id, base_version, states, rows)
        with tempfile.TemporaryDirectory() as folder:
            self._memory.snapshot(version, Path(folder))
            self._storage.put_folder(folder, f"{self._folder}/{version}")
        for name in self._saved_versions()[:-2]:
            self._storage.delete(f"{self._folder}/{name}")
        return version

    def snapshot(self, version: int) -> tuple[str, dict[str, bytes]]:
        """Return a snapshot's sha256 and its files, name -> bytes."""
        with tempfile.TemporaryDirectory() as folder:
            digest = self._memory.snapshot(version, Path(folder))
            return digest, {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    def replace_row(self, ref: str, row: Row) -> None:
        """Overwrite one stored row: the next task that reads it trains on the new text."""
        self._memory.replace_row(ref, row)

    def _saved_versions(self) -> list[str]:
        return sorted(self._storage.names(self._folder), key=int)

    def _restore(self, key: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._storage.get_folder(key, folder)
            self._memory.restore(Path(folder))


def start_memory(storage_url: str, run_id: str, attempt: int, generation: str, start_key: str | None) -> Any:
    """Start the actor of an attempt; it ends with the driver that started it, and restarts if it dies."""
    remote = ray.remote(MemoryActor).options(
        name=actor_name(run_id, attempt),
        namespace=NAMESPACE,
        num_cpus=0,  # embedded clusters have as many logical CPUs as training workers
        max_restarts=-1,
        max_task_retries=3,
    )
    return remote.remote(storage_url, run_id, attempt, generation, start_key)
