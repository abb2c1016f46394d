"""One job seen through the API, as its user sees it: every event with the moment of its arrival."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.client import FINAL_EVENTS, ApiError, Client, JobEvent

PROGRESS = frozenset({"step", "task.trained", "task.evaluated", "task.committed"}) | FINAL_EVENTS
"""Events that say that the job goes on."""
RECONNECT_S = 300.0


@dataclass(frozen=True)
class Seen:
    """An event and when it arrived, on the monotonic clock."""

    event: JobEvent
    at: float


class Watch:
    """Follows a job's events to its end in a thread, across every interruption."""

    def __init__(self, url: str, job_id: str) -> None:
        self.job_id = job_id
        self.seen: list[Seen] = []
        self.failure: ApiError | None = None
        self._url = url
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow, name=f"watch-{job_id}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Was the job's last event seen?"""
        return bool(self.seen) and self.seen[-1].event.type in FINAL_EVENTS

    def wait(self, is_wanted: Callable[[Seen], bool], what: str, timeout_s: float, start: int = 0) -> int:
        """Return the place in seen of the first event from start on that is wanted.

        Raises TimeoutError; RuntimeError when the job ends first or its events cannot be followed.
        """
        deadline = time.monotonic() + timeout_s
        place = start
        with self._news:
            while True:
                while place < len(self.seen):
                    if is_wanted(self.seen[place]):
                        return place
                    place += 1
                if self.failure is not None:
                    raise RuntimeError(f"the events cannot be followed: {self.failure}") from self.failure
                if self.has_ended:
                    raise RuntimeError(f"the job ended with {self.seen[-1].event.type} before {what}")
                if not self._news.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")

    def wait_end(self, timeout_s: float) -> JobEvent:
        """Return the job's last event. Raises TimeoutError, RuntimeError."""
        place = self.wait(lambda seen: seen.event.type in FINAL_EVENTS, "the job's end", timeout_s)
        self._thread.join()
        return self.seen[place].event

    def _follow(self) -> None:
        with Client(self._url, timeout_s=10.0, reconnect_s=RECONNECT_S) as client:
            try:
                for event in client.events(self.job_id):
                    with self._news:
                        self.seen.append(Seen(event, time.monotonic()))
                        self._news.notify_all()
            except ApiError as error:
                with self._news:
                    self.failure = error
                    self._news.notify_all()
