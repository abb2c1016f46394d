"""Progress of an attempt as immutable event segments in storage; the control plane reads and keeps them."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

from service.adapters.storage import Storage, StorageError, events_key

FLUSH_EVERY_S = 0.5
TRY_AGAIN_AFTER_S = 5.0


class EventWriter:
    """Writes events of one attempt, numbered from 1 without gaps, also across restarts of the worker."""

    def __init__(self, storage: Storage, run_id: str, attempt: int) -> None:
        self._storage, self._folder = storage, events_key(run_id, attempt)
        self._pending: list[dict[str, Any]] = []
        self._next_flush = 0.0
        self._next = self._first_free()

    def emit(self, type_: str, *, flush: bool = True, **data: Any) -> None:
        """Add an event. Raises StorageError.

        flush False lets frequent events share a segment for up to FLUSH_EVERY_S; while storage is away they
        wait for it, and training goes on.
        """
        event = {"seq": self._next, "time": datetime.now(UTC).isoformat(), "type": type_, "data": data}
        self._pending.append(event)
        self._next += 1
        if flush:
            self._write(self._storage)
        elif time.monotonic() >= self._next_flush:
            try:
                self._write(self._storage.without_patience())
            except StorageError:  # these events stay pending; the next one tries again
                self._next_flush = time.monotonic() + TRY_AGAIN_AFTER_S

    def _write(self, storage: Storage) -> None:
        """Write what is pending as one segment."""
        text = "".join(json.dumps(event) + "\n" for event in self._pending)
        storage.write_bytes(f"{self._folder}/{self._pending[0]['seq']:012d}.jsonl", text.encode())
        self._pending.clear()
        self._next_flush = time.monotonic() + FLUSH_EVERY_S

    def _first_free(self) -> int:
        segments = self._storage.names(self._folder)
        if not segments:
            return 1
        last = self._storage.read_bytes(f"{self._folder}/{segments[-1]}").splitlines()[-1]
        return int(json.loads(last)["seq"]) + 1
