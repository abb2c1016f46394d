"""What processes printed, as they shipped it: runs/<run>/a<n>/logs/<process>/<offset>.log."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from service.adapters.storage import Storage, logs_key

DRIVER = "driver"


def worker_process(rank: int, pid: int) -> str:
    """Name a training worker's log."""
    return f"worker-{rank}-{pid}"


def log_processes(storage: Storage, run_id: str, attempt: int) -> list[str]:
    """Return the processes of an attempt that shipped anything."""
    return storage.names(logs_key(run_id, attempt))


def log_text(storage: Storage, run_id: str, attempt: int, process: str) -> Iterator[str]:
    """Yield what a process printed, piece by piece; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for key in storage.find(f"{logs_key(run_id, attempt)}/{process}"):
        yield decoder.decode(storage.read_bytes(key))
    yield decoder.decode(b"", final=True)
