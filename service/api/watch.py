"""One look at the database for everybody who follows a job in this process.

A follower that waits costs no query of its own: a single task asks, a few times a second, which of the
watched jobs have a newer event or have ended, and wakes those who wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from service.db.engines import is_away
from service.db.session import Sessions
from service.db.tables import Job
from service.jobs.states import FINAL_RUN_STATES

LOOK_EVERY_S = 0.1
JOBS_PER_QUERY = 1000


@dataclass(eq=False)
class _Waiting:
    """Somebody who has seen a job's events up to a number."""

    job_id: str
    after: int
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class Watch:
    """Wakes followers of jobs. Lives on one event loop; its task runs only while somebody waits."""

    def __init__(self, sessions: Sessions, stopping: threading.Event) -> None:
        self._sessions = sessions
        self._stopping = stopping
        self._waiting: set[_Waiting] = set()
        self._task: asyncio.Task[None] | None = None

    async def wait(self, job_id: str, after: int, timeout_s: float) -> None:
        """Return when the job has an event after this one or has ended, at the latest after timeout_s.

        Returns at once when the server stops. Raises what went wrong with the database, unless it is away.
        """
        mine = _Waiting(job_id, after)
        self._waiting.add(mine)
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._look_on())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await mine.woken.wait()
        finally:
            self._waiting.discard(mine)

    async def _look_on(self) -> None:
        """Look until nobody waits or the server stops. An error wakes everybody: their own look meets it."""
        try:
            while self._waiting and not self._stopping.is_set():
                await asyncio.sleep(LOOK_EVERY_S)
                try:
                    news = await run_sync(self._news, {one.job_id for one in self._waiting})
                except SQLAlchemyError as error:
                    if not is_away(error):
                        raise
                    continue  # they go on when it is back
                for one in self._waiting:
                    last_event, is_final = news.get(one.job_id, (0, True))
                    if last_event > one.after or is_final:
                        one.woken.set()
        finally:
            for one in self._waiting:
                one.woken.set()

    def _news(self, job_ids: set[str]) -> dict[str, tuple[int, bool]]:
        """Return each job's newest event and whether the job has ended."""
        wanted = sorted(job_ids)
        found: dict[str, tuple[int, bool]] = {}
        with self._sessions.read() as session:
            for first in range(0, len(wanted), JOBS_PER_QUERY):
                some = Job.id.in_(wanted[first : first + JOBS_PER_QUERY])
                for row in session.execute(select(Job.id, Job.last_event, Job.state).where(some)):
                    found[row.id] = (row.last_event, row.state in FINAL_RUN_STATES)
        return found
