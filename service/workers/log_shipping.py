"""What a process prints, shipped to storage while it works: readable after the cluster is gone.

runs/<run>/a<n>/logs/<process>/<offset>.log are immutable segments; <offset> counts the bytes that the process
shipped before. Segments end with a line where a line ends in time; bytes are kept as they are, text or not.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from service.adapters.storage import Storage, StorageError, logs_key

SHIP_EVERY_S, SHIP_AT_LEAST_EVERY_S = 1.0, 30.0
SEGMENT_BYTES = 2**20
_PRINTED = ("/proc/self/fd/1", "/proc/self/fd/2")


@contextmanager
def shipped_log(storage: Storage, run_id: str, attempt: int, process: str) -> Iterator[None]:
    """Ship what this process prints until the block ends; an exception's traceback belongs to it."""
    shipper = LogShipper(storage, f"{logs_key(run_id, attempt)}/{process}", _printed_files())
    shipper.start()
    try:
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        shipper.stop()


class LogShipper:
    """A thread that copies what files grow by to segments under a key."""

    def __init__(self, storage: Storage, key: str, paths: tuple[str, ...]) -> None:
        self._storage, self._key = storage, _unused(storage, key)
        self._files = [open(path, "rb", buffering=0) for path in paths]  # noqa: SIM115
        self._pending: list[bytes] = [b""] * len(paths)
        """What was read and not yet shipped: less than a line, or what the store did not take."""
        self._num_shipped = 0
        self._start = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-shipping", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ship the rest and end. A store that does not take it loses the rest, never the run."""
        self._stopping.set()
        self._thread.join()
        try:
            self.ship(is_end=True)
        except StorageError as error:
            sys.stderr.write(f"the end of this log is not in storage: {error}\n")
        for file in self._files:
            file.close()

    def ship(self, *, is_end: bool = False) -> None:
        """Write the whole lines that came since the last call, and all that came if this is the end.

        Raises StorageError; what was not written is tried again by the next call.
        """
        for number, file in enumerate(self._files):
            while True:
                pending = self._pending[number]
                data = file.read(SEGMENT_BYTES - len(pending)) if len(pending) < SEGMENT_BYTES else b""
                pending = self._pending[number] = pending + data
                is_full = len(pending) >= SEGMENT_BYTES
                end = pending.rfind(b"\n") + 1
                if is_end or (is_full and not end):
                    end = len(pending)
                if not end:
                    break
                self._storage.write_bytes(f"{self._key}/{self._num_shipped:012d}.log", pending[:end])
                self._num_shipped += end
                self._pending[number] = pending[end:]

    def _run(self) -> None:
        said = ""
        while not self._stopping.wait(self._pause_s()):
            try:
                self.ship()
            except StorageError as error:  # the next look tries again
                if str(error) != said:
                    said = str(error)
                    sys.stderr.write(f"this log waits for storage: {said}\n")

    def _pause_s(self) -> float:
        """A second, and more for a process that works for long: a week must not make a million segments."""
        return min(SHIP_AT_LEAST_EVERY_S, max(SHIP_EVERY_S, (time.monotonic() - self._start) / 100))


def _printed_files() -> tuple[str, ...]:
    """Return where this process prints to, files only: what goes to a pipe is someone's already."""
    found: dict[tuple[int, int], str] = {}
    for path in _PRINTED:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            found.setdefault((status.st_dev, status.st_ino), path)
    return tuple(found.values())


def _unused(storage: Storage, key: str) -> str:
    """Return a folder that nobody ships to: process numbers of two machines may be equal."""
    taken, number = set(storage.names(os.path.dirname(key))), 1
    name = process = os.path.basename(key)
    while name in taken:
        number += 1
        name = f"{process}.{number}"
    return f"{os.path.dirname(key)}/{name}"
