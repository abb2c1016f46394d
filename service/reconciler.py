"""Make Ray run what the database wants: one process at a time, by a lease.

One tick stops runs that are late, looks at every run at work (service.jobs.advance), starts waiting runs
where places are free, and removes files that nobody needs. It may be repeated at any moment and after any
crash.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.adapters.storage import Storage
from service.db.engines import is_away
from service.db.session import Sessions
from service.db.tables import Run, utc_now
from service.errors import ServiceError
from service.jobs import clean, queue, repository
from service.jobs.advance import Parts, advance, refuse
from service.jobs.attempts import begin_attempt
from service.jobs.leases import RECONCILER, FencedSessions, Lease, LeaseLost, acquire, release
from service.jobs.runner import JobRunner, RunnerUnreachable
from service.jobs.states import AT_WORK_RUN_STATES, STOPPING_RUN_STATES, Reason, RunState
from service.settings import Settings

CLEAN_UPLOADS_EVERY_S = 3600.0
_SELF, _FILES = "the reconciler", "unneeded files"
"""What warnings are about beside runs."""
logger = logging.getLogger(__name__)


class Reconciler:
    """A thread that calls tick() every poll interval, or at once after wake()."""

    def __init__(
        self, settings: Settings, *, sessions: Sessions, storage: Storage, runner: JobRunner
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._storage = storage
        self._runner = runner
        self._holder = uuid.uuid4().hex
        self._lease: Lease | None = None
        self._awake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned: dict[str, str] = {}
        """Subject -> the warning that holds since it was logged."""
        self._next_clean_up = 0.0

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self.run, name="reconciler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the tick at work and let another process take over at once. Runs go on without it."""
        self._stopping.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look now, not at the next interval."""
        self._awake.set()

    def run(self) -> None:
        """Tick until stop() is called."""
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                self.tick()
                self._warned.pop(_SELF, None)
            except LeaseLost as error:
                self._lease = None
                self._warn(_SELF, str(error))
            except Exception as error:
                if isinstance(error, SQLAlchemyError) and is_away(error):
                    self._warn(_SELF, f"the database does not answer: {_first_line(error)}")
                else:
                    self._complain(_SELF, "the tick failed; the next one tries again", error)
            self._awake.wait(self._settings.poll_interval_s)
        try:
            self._release()
        except SQLAlchemyError as error:
            logger.warning("the lease could not be given back, it expires by itself: %s", _first_line(error))

    def tick(self) -> bool:
        """Look at everything once; False while another process holds the lease.

        Raises LeaseLost when another process took over meanwhile: nothing more is written then.
        """
        if not self._hold_lease():
            return False
        assert self._lease is not None
        parts = Parts(
            self._settings, FencedSessions(self._sessions, self._lease), self._storage, self._runner
        )
        with parts.sessions.read() as session:
            at_work = [run.id for run in repository.runs_in(session, AT_WORK_RUN_STATES)]
        for ended in self._warned.keys() - {_SELF, _FILES, *at_work}:
            del self._warned[ended]
        self._stop_late(parts)
        for run_id in at_work:
            self._guard(parts, run_id)
        for run_id in self._start_waiting(parts):
            self._guard(parts, run_id)
        self._clean(parts)
        return True

    # ------------------------------------------------------------------------------------------------- lease

    def _hold_lease(self) -> bool:
        ttl = timedelta(seconds=self._settings.lease_s)
        if self._lease is not None and not self._lease.needs_renewal(ttl):
            return True
        with self._sessions.write() as session:
            lease = acquire(session, RECONCILER, self._holder, ttl)
        if lease is None and self._lease is not None:
            logger.warning("another reconciler took over")
        elif lease is not None and self._lease is None:
            logger.info("this process reconciles now (token %d)", lease.token)
        self._lease = lease
        return lease is not None

    def _release(self) -> None:
        if self._lease is not None:
            with self._sessions.write() as session:
                release(session, self._lease)
            self._lease = None

    # -------------------------------------------------------------------------------------------------- runs

    def _guard(self, parts: Parts, run_id: str) -> None:
        """Advance a run; what goes wrong with one run must not stop the others."""
        if not self._hold_lease():
            raise LeaseLost("another reconciler took over during a tick")
        try:
            try:
                odd = advance(parts, run_id)
            except ServiceError as error:  # our own refusal, which does not change by itself
                refuse(parts, run_id, str(error))
                return
            if odd is None:
                self._warned.pop(run_id, None)
            else:
                self._warn(run_id, odd)
        except LeaseLost:
            raise
        except (RunnerUnreachable, OSError) as error:
            self._warn(run_id, f"state unknown: {error}")
        except Exception as error:
            if isinstance(error, SQLAlchemyError) and is_away(error):
                raise
            self._complain(run_id, "could not be looked at; the next tick tries again", error)

    def _warn(self, subject: str, text: str) -> None:
        """Log a warning; the same one tick after tick is logged once."""
        if self._warned.get(subject) != text:
            self._warned[subject] = text
            logger.warning("%s: %s", subject, text)

    def _complain(self, subject: str, text: str, error: Exception) -> None:
        """Log an error of ours with its traceback; the same one tick after tick is logged once."""
        said = f"{text}: {type(error).__name__}: {error}"
        if self._warned.get(subject) != said:
            self._warned[subject] = said
            logger.error("%s: %s", subject, said, exc_info=error)

    def _clean(self, parts: Parts) -> None:
        """Remove files that nobody needs. A store that is away is asked again at another tick."""
        try:
            clean.clean_ended_runs(parts.sessions, parts.storage, keep_s=self._settings.keep_files_s)
            if time.monotonic() >= self._next_clean_up:
                clean.clean_broken_uploads(parts.sessions, parts.storage)
                self._next_clean_up = time.monotonic() + CLEAN_UPLOADS_EVERY_S
            self._warned.pop(_FILES, None)
        except OSError as error:
            self._warn(_FILES, f"could not be removed: {error}")

    def _start_waiting(self, parts: Parts) -> list[str]:
        """Give free places to waiting runs; returns the runs that begin an attempt."""
        with parts.sessions.read() as session:
            at_work = Counter(queue.owners_at_work(session))
            num_free = self._settings.max_concurrent_runs - at_work.total()
            if num_free <= 0:
                return []
            waiting = queue.runs_that_can_start(session, utc_now(), most=num_free)
            several = len({run.owner for run in waiting}) > 1
            chosen = queue.choose(
                waiting,
                num_free=num_free,
                at_work=at_work,
                last_started=queue.last_started(session) if several else {},
            )
        return [run_id for run_id in chosen if self._begin(parts, run_id)]

    def _begin(self, parts: Parts, run_id: str) -> bool:
        """Begin a run's next attempt; False when it was cancelled or paused meanwhile."""
        with parts.sessions.write() as session:
            run = repository.lock_run(session, run_id)
            if run.state != RunState.QUEUED:
                return False
            begin_attempt(session, run)
            return True

    def _stop_late(self, parts: Parts) -> None:
        """Ask runs that are past their deadline to stop; those that wait fail at once."""
        with parts.sessions.read() as session:
            late = [run.id for run in queue.late_runs(session, utc_now())]
        for run_id in late:
            with parts.sessions.write() as session:
                _give_up(session, repository.lock_run(session, run_id))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _give_up(session: Session, run: Run) -> None:
    said = "the deadline passed before every task was finished"
    if run.state == RunState.QUEUED:
        repository.set_run_state(session, run, RunState.FAILED, reason=Reason.DEADLINE, message=said)
    elif run.state in AT_WORK_RUN_STATES and run.state != RunState.CANCELLING:
        if run.state not in STOPPING_RUN_STATES:
            run.stop_requested_at = utc_now()
        repository.set_run_state(session, run, RunState.CANCELLING, reason=Reason.DEADLINE, message=said)
