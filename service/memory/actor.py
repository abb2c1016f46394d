"""The memory actor: replay buffer and Fisher state of one run, held outside the training workers.

Every write is saved to storage before it is answered, so a restarted actor goes on with its last two
versions. It imports no torch: arrays travel as numpy through Ray's object store, without copies on one
machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import ray

from clcore.engine.memory import InProcessMemory, Row, State
from service.adapters.manifest import STATE
from service.adapters.storage import Storage, attempt_key
from service.adapters.store_calls import PATIENCE_S
from service.adapters.version_files import fetch_folder
from service.memory.rows import RowReader
from service.scratch import remove_abandoned_folders, scratch_folder

NAMESPACE = "clpeft"
SNAPSHOT_FILES = ("memory.json", "memory.safetensors")


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
        remove_abandoned_folders()
        self._storage = Storage(storage_url, patience_s=PATIENCE_S)
        self._folder = f"{attempt_key(run_id, attempt)}/memory"
        self._generation, self._start_key = generation, start_key
        self._num_saved = 0
        """The newest version that lies in storage."""

    @cached_property
    def _memory(self) -> InProcessMemory:
        """Loaded by the first call, which then raises what is wrong; Ray hides errors of a constructor."""
        memory = InProcessMemory(RowReader(self._storage), generation=self._generation)
        saved = self._saved_versions()
        for version in saved:
            self._restore(memory, f"{self._folder}/{version}")
        if not saved and self._start_key:
            self._restore(memory, self._start_key)
        self._num_saved = memory.newest
        return memory

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
        if version > self._num_saved:  # a repeat of a write that could not be saved is saved now
            with scratch_folder() as folder:
                self._memory.snapshot(version, folder)
                self._storage.put_folder(str(folder), f"{self._folder}/{version}")
            self._num_saved = version
            for old in self._saved_versions()[:-2]:
                self._storage.delete(f"{self._folder}/{old}")
        return version

    def snapshot(self, version: int) -> tuple[str, dict[str, bytes]]:
        """Return a snapshot's sha256 and its files, name -> bytes."""
        with scratch_folder() as folder:
            digest = self._memory.snapshot(version, folder)
            return digest, {path.name: path.read_bytes() for path in folder.iterdir()}

    def replace_row(self, ref: str, row: Row) -> None:
        """Overwrite one stored row: the next task that reads it trains on the new text."""
        self._memory.replace_row(ref, row)

    def _saved_versions(self) -> list[int]:
        """Return the versions whose files are all there, oldest first."""
        found = set(self._storage.find(self._folder))
        versions = {int(key.removeprefix(f"{self._folder}/").partition("/")[0]) for key in found}
        whole = [v for v in versions if {f"{self._folder}/{v}/{name}" for name in SNAPSHOT_FILES} <= found]
        return sorted(whole)

    def _restore(self, memory: InProcessMemory, key: str) -> None:
        task_dir, _, name = key.rpartition("/")
        with scratch_folder() as folder:
            if name == STATE:  # a version's files have their checksums in its manifest
                fetch_folder(self._storage, task_dir, STATE, folder)
            else:
                self._storage.get_folder(key, str(folder))
            memory.restore(folder)


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
