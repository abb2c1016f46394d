"""Make Ray run what the database wants, and bring into the database what workers left in storage.

One tick looks at every unfinished run. It may be repeated at any moment and after any crash: a submission id
names the run and attempt, events are unique by (run, attempt, seq), and a task is committed once. A tick that
finds nothing new does not write. A Jobs API that does not answer means unknown, not failed: the run stays.
The file is a little long because one class holds one run's whole way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from service.adapters import registry
from service.adapters.registry import ManifestError
from service.adapters.storage import Storage, desired_key, outcome_key, plan_key
from service.db.session import Sessions
from service.db.tables import Attempt, Run, utc_now
from service.errors import ServiceError
from service.jobs import repository
from service.jobs.attempts import begin_attempt, end_attempt, entrypoint, try_again
from service.jobs.events import add_event
from service.jobs.ingest import ingest_events, ingest_manifests, open_tasks
from service.jobs.runner import JobRunner, RayJobState, RunnerRefused, RunnerUnreachable
from service.jobs.states import AT_WORK_RUN_STATES, AttemptState, Reason, RunState, TaskState
from service.planner import plan_run
from service.settings import Settings
from service.specs import JobSpec, ParentVersion, PlannedTask

logger = logging.getLogger(__name__)

CANCEL_GRACE = timedelta(seconds=120)
"""How long a cancelled run may go on until Ray is told to end its processes."""
RETRIED_REASONS = frozenset({Reason.WORKER_LOST, Reason.CLUSTER_LOST, Reason.STORAGE_ERROR})
WORKER_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class Reconciler:
    """A thread that calls tick() every poll interval, or at once after wake()."""

    def __init__(
        self, settings: Settings, *, sessions: Sessions, storage: Storage, runner: JobRunner
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._storage = storage
        self._runner = runner
        self._awake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_warning: tuple[str, str] | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="reconciler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the tick at work. Runs go on without it."""
        self._stopping.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look now, not at the next interval."""
        self._awake.set()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._awake.clear()
            try:
                self.tick()
            except Exception:  # the database or the storage is away; the next tick looks again
                logger.exception("the reconciler's tick failed")
            self._awake.wait(self._settings.poll_interval_s)

    def tick(self) -> None:
        """Look at every unfinished run once."""
        with self._sessions.read() as session:
            runs = repository.unfinished_runs(session)
        for run in runs:
            if run.state in AT_WORK_RUN_STATES:
                self._guard(run)
        self._start_queued()

    def _guard(self, run: Run) -> None:
        """Advance a run; what goes wrong with one run must not stop the others."""
        try:
            self._advance(run.id)
        except RunnerUnreachable as error:
            self._warn(run.id, f"state unknown: {error}")
        except ServiceError as error:  # our own refusal, which does not change by itself
            self._refuse(run.id, error)
        except Exception:
            logger.exception("run %s could not be looked at; the next tick tries again", run.id)

    def _refuse(self, run_id: str, error: ServiceError) -> None:
        with self._sessions.read() as session:
            attempt = repository.attempts_of(session, run_id)[-1]
        self._runner.stop(attempt.submission_id)
        self._fail(run_id, attempt.number, Reason.INTERNAL, str(error))

    def _warn(self, run_id: str, text: str) -> None:
        """Log a warning; the same one tick after tick is logged once."""
        if self._last_warning != (run_id, text):
            self._last_warning = (run_id, text)
            logger.warning("run %s: %s", run_id, text)

    # ----------------------------------------------------------------------------------------------- starting

    def _start_queued(self) -> None:
        with self._sessions.read() as session:
            runs = repository.unfinished_runs(session)
        num_free = self._settings.max_concurrent_runs - sum(run.state in AT_WORK_RUN_STATES for run in runs)
        busy_jobs: set[str] = set()
        for run in runs:
            if run.state == RunState.QUEUED and run.job_id not in busy_jobs and num_free > 0:
                num_free -= 1
                if self._claim(run.id):
                    self._guard(run)
            busy_jobs.add(run.job_id)  # a job's later runs wait for this one

    def _claim(self, run_id: str) -> bool:
        """Move a queued run to submitting with its first attempt; False when it was cancelled meanwhile."""
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            if run.state != RunState.QUEUED:
                return False
            run.started_at = utc_now()
            begin_attempt(session, run)
            return True

    def _store_plan(self, run_id: str) -> None:
        """Write the run's plan; once written it never changes, so that every attempt finds the same."""
        if self._storage.exists(plan_key(run_id)):
            return
        with self._sessions.read() as session:
            run = repository.get_run(session, run_id)
            job = repository.get_job(session, run.job_id)
            tasks = repository.tasks_of(session, job.id)
            earlier = [task for task in tasks if task.run_id != run_id and task.state == TaskState.COMMITTED]
            newest = registry.latest_version(session, job.id)
            parent = None
            if newest is not None:
                parent = ParentVersion(version=newest.version, task_dir=newest.task_dir)
            spec = JobSpec.model_validate(job.spec)
            general = spec.evaluation.general
            own_set = None
            if general is not None and general != "default":
                own_set = repository.planned_dataset(session, general)
            plan = plan_run(
                spec,
                run_id=run_id,
                job_id=job.id,
                base_model_path=job.base_model_path,
                tasks=[PlannedTask.model_validate(task.planned) for task in tasks if task.run_id == run_id],
                earlier_tasks=[PlannedTask.model_validate(task.planned) for task in earlier],
                parent=parent,
                general_dataset=own_set,
            )
        self._storage.write_json(plan_key(run_id), plan.model_dump(mode="json"))

    def _submit(self, run_id: str, attempt: Attempt) -> None:
        self._store_plan(run_id)
        self._write_desired(run_id, "running")
        env = {
            "CLPEFT_STORAGE_URL": self._settings.storage_url,
            "CLPEFT_CAPACITY_WAIT_S": str(self._settings.capacity_wait_s),
            **WORKER_ENV,
        }
        try:
            self._runner.submit(attempt.submission_id, entrypoint(run_id, attempt.number), env)
        except RunnerRefused as error:
            self._fail(run_id, attempt.number, Reason.INTERNAL, str(error))
            return
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            _attempt(session, attempt).state = AttemptState.PENDING
            add_event(
                session,
                run.job_id,
                "run.submitted",
                {"attempt": attempt.number, "submission_id": attempt.submission_id},
                run_id=run_id,
                attempt=attempt.number,
            )
            if run.state == RunState.SUBMITTING:  # not when it was cancelled meanwhile
                repository.set_run_state(session, run, RunState.SCHEDULING)

    def _write_desired(self, run_id: str, state: str) -> None:
        key = desired_key(run_id)
        if not self._storage.exists(key) or self._storage.read_json(key) != {"state": state}:
            self._storage.write_json(key, {"state": state})

    # ----------------------------------------------------------------------------------------------- watching

    def _advance(self, run_id: str) -> None:
        with self._sessions.read() as session:
            run = repository.get_run(session, run_id)
            attempts = repository.attempts_of(session, run_id)
        attempt = attempts[-1]
        cancelling = run.state == RunState.CANCELLING
        if cancelling:
            self._write_desired(run_id, "cancelled")
        elif run.state == RunState.SUBMITTING:
            self._submit(run_id, attempt)
            return
        outcome = self._read_outcome(run_id, attempt.number)
        # The rest of storage is read after the outcome: the driver writes the outcome last.
        ingest_events(self._sessions, self._storage, run_id, attempt.number)
        broken = self._ingest_manifests(run_id, [attempt.number])
        if self._finish_if_committed(run_id, attempt.number):
            return
        if outcome is not None:
            self._end_with_outcome(run_id, attempt.number, outcome)
            return
        state = self._runner.state(attempt.submission_id)
        if state is None or state.is_final:
            outcome = self._read_outcome(run_id, attempt.number)
            if outcome is None:
                self._end_lost(run_id, attempt, state)
            # else it was written between the two looks; the next tick takes it
            return
        if broken is not None:
            self._warn(run_id, broken)
        self._note_state(attempt, state)
        overdue = run.cancel_requested_at is not None and utc_now() - run.cancel_requested_at > CANCEL_GRACE
        if cancelling and overdue:
            self._runner.stop(attempt.submission_id)

    def _read_outcome(self, run_id: str, attempt: int) -> Mapping[str, Any] | None:
        try:
            outcome: Mapping[str, Any] = self._storage.read_json(outcome_key(run_id, attempt))
        except FileNotFoundError:
            return None
        return outcome

    def _note_state(self, attempt: Attempt, state: RayJobState) -> None:
        new = AttemptState.RUNNING if state == RayJobState.RUNNING else AttemptState.PENDING
        if attempt.state != new:
            with self._sessions.write() as session:
                _attempt(session, attempt).state = new

    def _ingest_manifests(self, run_id: str, attempts: Sequence[int]) -> str | None:
        """Commit what attempts finished; says what is wrong with a manifest that cannot be taken."""
        broken = None
        for attempt in attempts:
            try:
                ingest_manifests(self._sessions, self._storage, run_id, attempt)
            except ManifestError as error:
                broken = str(error)
        return broken

    # ------------------------------------------------------------------------------------------------- ending

    def _end_with_outcome(self, run_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        # The attempts are over, so what any of them finished since our last look can be taken.
        broken = self._ingest_manifests(run_id, range(attempt, 0, -1))
        if self._finish_if_committed(run_id, attempt):
            return
        state, message = str(outcome.get("state")), str(outcome.get("message", ""))
        reason = str(outcome.get("reason") or Reason.INTERNAL)
        if state == RunState.CANCELLED and self._finish_if_cancelling(run_id, attempt):
            return
        if state == RunState.FAILED and reason in RETRIED_REASONS:
            self._try_again(run_id, attempt, AttemptState.FAILED, reason, message)
        elif state == RunState.FAILED:
            self._fail(run_id, attempt, reason, message)
        elif broken is not None:
            self._try_again(run_id, attempt, AttemptState.FAILED, Reason.STORAGE_ERROR, broken)
        else:
            said = f"the driver ended with {state!r}, but not every task is committed"
            self._fail(run_id, attempt, Reason.INTERNAL, said)

    def _end_lost(self, run_id: str, attempt: Attempt, state: RayJobState | None) -> None:
        ingest_events(self._sessions, self._storage, run_id, attempt.number)
        broken = self._ingest_manifests(run_id, range(attempt.number, 0, -1))
        if self._finish_if_committed(run_id, attempt.number):
            return
        if broken is not None:
            reason, message = Reason.STORAGE_ERROR, broken
        elif state is None:
            reason, message = Reason.CLUSTER_LOST, "the cluster does not know the Ray job"
        else:
            reason, message = Reason.WORKER_LOST, f"the driver ended without an outcome; Ray says {state}"
        self._try_again(run_id, attempt.number, AttemptState.LOST, reason, message)

    def _finish_if_committed(self, run_id: str, attempt: int) -> bool:
        with self._sessions.read() as session:
            if open_tasks(session, run_id):
                return False
        self._end(run_id, attempt, AttemptState.SUCCEEDED, RunState.SUCCEEDED, None, None)
        return True

    def _finish_if_cancelling(self, run_id: str, attempt: int) -> bool:
        with self._sessions.read() as session:
            if repository.get_run(session, run_id).state != RunState.CANCELLING:
                return False
        said = repository.CANCELLED_BY_USER
        self._end(run_id, attempt, AttemptState.CANCELLED, RunState.CANCELLED, None, said)
        return True

    def _fail(self, run_id: str, attempt: int, reason: str, message: str) -> None:
        self._end(run_id, attempt, AttemptState.FAILED, RunState.FAILED, reason, message)

    def _end(
        self,
        run_id: str,
        attempt: int,
        attempt_state: AttemptState,
        state: RunState,
        reason: str | None,
        message: str | None,
    ) -> None:
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            end_attempt(session, run, attempt, attempt_state, reason, message)
            repository.set_run_state(session, run, state, reason=reason, message=message)
        self.wake()

    def _try_again(self, run_id: str, attempt: int, state: AttemptState, reason: str, message: str) -> None:
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            max_attempts = self._settings.max_attempts
            try_again(session, run, attempt, state, reason=reason, message=message, max_attempts=max_attempts)
        self.wake()


def _attempt(session: Session, attempt: Attempt) -> Attempt:
    return session.get_one(Attempt, (attempt.run_id, attempt.number))
