"""Progress of an attempt as immutable event segments in storage; the control plane reads and keeps them."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from service.adapters.storage import Storage, StorageError, events_key

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 0.5
RETRY_EVERY_S = 2.0


class EventWriter:
    """Writes events of one attempt, numbered from 1 without gaps, also across restarts of the worker."""

    def __init__(self, storage: Storage, run_id: str, attempt: int) -> None:
        self._storage, self._folder = storage, events_key(run_id, attempt)
        self._pending: list[dict[str, Any]] = []
        self._segment: tuple[str, bytes] | None = None
        """What a write that failed may have left behind: written again as it was, before what came after."""
        self._last_flush = self._not_before = 0.0
        self._next = self._first_free()
        self.is_continued = self._next > 1
        """Did an earlier worker of this attempt write events?"""

    def emit(self, type_: str, *, flush: bool = True, **data: Any) -> None:
        """Add an event. flush False lets frequent events share a segment for up to FLUSH_EVERY_S.

        Events that storage does not take wait for a later one.
        """
        event = {"seq": self._next, "time": datetime.now(UTC).isoformat(), "type": type_, "data": data}
        self._pending.append(event)
        self._next += 1
        now = time.monotonic()
        if now >= self._not_before and (flush or now - self._last_flush >= FLUSH_EVERY_S):
            try:
                self._write(self._storage.without_patience())  # training goes on while the store is away
            except StorageError as error:
                logger.warning("events of %s wait for storage: %s", self._folder, error)
                self._not_before = time.monotonic() + RETRY_EVERY_S

    def flush(self) -> None:
        """Write what is pending, in order. Raises StorageError when the store does not take it in time."""
        self._write(self._storage)

    def _write(self, storage: Storage) -> None:
        while self._segment or self._pending:
            if self._segment is None:
                text = "".join(json.dumps(event) + "\n" for event in self._pending)
                self._segment = f"{self._folder}/{self._pending[0]['seq']:012d}.jsonl", text.encode()
                self._pending.clear()
            storage.write_bytes(*self._segment)
            self._segment = None
            self._last_flush = time.monotonic()

    def _first_free(self) -> int:
        """Return the number after the last line, whole or torn: readers count lines too."""
        segments = self._storage.names(self._folder)
        if not segments:
            return 1
        lines = self._storage.read_bytes(f"{self._folder}/{segments[-1]}").splitlines()
        return int(segments[-1].removesuffix(".jsonl")) + len(lines)
