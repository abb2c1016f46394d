"""Stops on request: desired.json says that a run pauses or ends, or that a newer attempt may work."""

from __future__ import annotations

import logging
import time
from enum import StrEnum

from service.adapters.storage import Storage, desired_key

logger = logging.getLogger(__name__)

READ_DESIRED_EVERY_S = 2.0


class Stop(StrEnum):
    """Why an attempt stops before its work is done; also the state of its outcome."""

    PAUSED = "paused"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    """A newer attempt may work: this one writes no checkpoint and no version any more."""


class StoppedRun(Exception):
    """The attempt stops on request."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop)
        self.stop = stop

    def __str__(self) -> str:
        return f"{self.stop} on request" if self.stop != Stop.SUPERSEDED else "a newer attempt may work"


def read_stop(storage: Storage, run_id: str, attempt: int) -> Stop | None:
    """Return why an attempt must stop; None while it may work.

    Raises OSError when storage does not answer, ValueError for a state that this version does not know.
    """
    desired = storage.read_json(desired_key(run_id))
    if int(desired.get("attempt", attempt)) > attempt:
        return Stop.SUPERSEDED
    return None if desired["state"] == "running" else Stop(desired["state"])


class StopSign:
    """One process's view of desired.json, read at most every READ_DESIRED_EVERY_S; a stop once seen stays."""

    def __init__(self, storage: Storage, run_id: str, attempt: int) -> None:
        self._storage = storage.without_patience()  # training goes on while the store is away
        self._run_id, self._attempt = run_id, attempt
        self._next_look = 0.0
        self.seen: Stop | None = None

    def look(self, *, now: bool = False) -> Stop | None:
        """Return why to stop, None while the attempt may work. now: read, however short ago the last look.

        What cannot be read says nothing: storage being away does not end a healthy run.
        """
        if self.seen is None and (now or time.monotonic() >= self._next_look):
            try:
                self.seen = read_stop(self._storage, self._run_id, self._attempt)
            except (OSError, ValueError) as error:
                logger.warning("desired.json of run %s cannot be read, working on: %s", self._run_id, error)
            self._next_look = time.monotonic() + READ_DESIRED_EVERY_S
        return self.seen

    def leave(self) -> None:
        """Raise StoppedRun, in this process alone, once a stop is seen."""
        if stop := self.look():
            raise StoppedRun(stop)
