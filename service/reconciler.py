"""Make Ray run what the database wants, and bring into the database what workers left in storage.

One tick looks at every unfinished run. It may be repeated at any moment and after any crash: a submission id
names the run and attempt, events are unique by (run, attempt, seq), and a task is committed once. A tick that
finds nothing new does not write. A Jobs API that does not answer means unknown, not failed: the run stays as it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from service.adapters import registry
from service.adapters.registry import ManifestError
from service.adapters.storage import Storage, desired_key, outcome_key, plan_key, task_key
from service.db.session import Sessions
from service.db.tables import Attempt, Run, Task, utc_now
from service.jobs import repository
from service.jobs.events import WorkerEvent, add_event, read_worker_events
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


def submission_id(run_id: str, attempt: int) -> str:
    """Name the Ray job of an attempt."""
    return f"{run_id}-a{attempt}"


def entrypoint(run_id: str, attempt: int) -> str:
    """The Ray job's command: constant but for generated ids, because Ray gives it to a shell."""
    return f"python -m service.workers.driver --run {run_id} --attempt {attempt}"


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
            logger.warning("run %s: state unknown: %s", run.id, error)
        except ManifestError as error:
            logger.warning("run %s: %s", run.id, error)
        except Exception:
            logger.exception("run %s could not be looked at; the next tick tries again", run.id)

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
            self._add_attempt(session, run)
            return True

    def _add_attempt(self, session: Session, run: Run) -> None:
        number = len(repository.attempts_of(session, run.id)) + 1
        session.add(
            Attempt(
                run_id=run.id,
                number=number,
                submission_id=submission_id(run.id, number),
                state=AttemptState.SUBMITTING,
            )
        )
        add_event(session, run.job_id, "attempt.started", {"attempt": number}, run_id=run.id, attempt=number)
        repository.set_run_state(session, run, RunState.SUBMITTING)

    def _submit(self, run_id: str, attempt: Attempt) -> None:
        with self._sessions.read() as session:
            run = repository.get_run(session, run_id)
            job = repository.get_job(session, run.job_id)
            tasks = repository.tasks_of(session, job.id)
            newest = registry.latest_version(session, job.id)
            plan = plan_run(
                JobSpec.model_validate(job.spec),
                run_id=run.id,
                job_id=job.id,
                base_model_path=job.base_model_path,
                # The plan of a run never changes, so attempts after a commit find it as it was.
                tasks=[PlannedTask.model_validate(task.planned) for task in tasks if task.run_id == run.id],
                earlier_tasks=[
                    PlannedTask.model_validate(task.planned)
                    for task in tasks
                    if task.run_id != run.id and task.state == TaskState.COMMITTED
                ],
                parent=None
                if newest is None
                else ParentVersion(version=newest.version, task_dir=newest.task_dir),
            )
        if not self._storage.exists(plan_key(run_id)):
            self._storage.write_json(plan_key(run_id), plan.model_dump(mode="json"))
        self._write_desired(run_id, "running")
        env = {"CLPEFT_STORAGE_URL": self._settings.storage_url, **WORKER_ENV}
        try:
            self._runner.submit(attempt.submission_id, entrypoint(run_id, attempt.number), env)
        except RunnerRefused as error:
            self._end(
                run_id, attempt.number, AttemptState.FAILED, RunState.FAILED, Reason.INTERNAL, str(error)
            )
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
        # Storage is read after the outcome: the driver writes the outcome last, so nothing can follow it.
        self._ingest_events(run_id, attempt)
        self._ingest_manifests(run_id, attempt.number)
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

    def _ingest_events(self, run_id: str, attempt: Attempt) -> None:
        events = read_worker_events(self._storage, run_id, attempt.number, attempt.last_seq)
        if not events:
            return
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            row = _attempt(session, attempt)
            for event in events:
                if event.seq <= row.last_seq:  # another tick was faster
                    continue
                add_event(
                    session,
                    run.job_id,
                    event.type,
                    event.data,
                    run_id=run_id,
                    attempt=row.number,
                    seq=event.seq,
                    time=event.time,
                )
                _apply(session, run, event)
                row.last_seq = event.seq

    def _ingest_manifests(self, run_id: str, attempt: int) -> None:
        """Commit this attempt's finished tasks, in order."""
        while (task := self._next_task(run_id)) is not None:
            if not self._commit_chain(run_id, task_key(run_id, attempt, task.index)):
                return

    def _commit_chain(self, run_id: str, task_dir: str) -> bool:
        """Commit a task folder, and before it the folders of earlier attempts that it was trained from.

        False when there is no manifest yet. An attempt that was given up may have finished a task after our last
        look at it; the next attempt that continued from it says so by its parent.
        """
        stored = registry.read_manifest(self._storage, task_dir)
        if stored is None:
            return False
        task = self._next_task(run_id)
        parent = stored.manifest.parent_dir
        if (
            task is not None
            and stored.manifest.task_index > task.index
            and parent is not None
            and parent != task_dir
        ):
            self._commit_chain(run_id, parent)
        with self._sessions.write() as session:
            next_task = _next_task(session, run_id)
            if next_task is None or next_task.index != stored.manifest.task_index:
                return False
            run = repository.get_run(session, run_id)
            job = repository.get_job(session, run.job_id)
            newest = registry.latest_version(session, job.id)
            if parent != (None if newest is None else newest.task_dir):
                raise ManifestError(f"{task_dir} was trained from {parent}, not from the newest version")
            registry.commit(session, job, next_task, stored, alias=job.spec["promotion"]["alias"])
            run.attempts_without_commit = 0
        return True

    def _next_task(self, run_id: str) -> Task | None:
        with self._sessions.read() as session:
            return _next_task(session, run_id)

    def _finish_if_committed(self, run_id: str, attempt: int) -> bool:
        if self._next_task(run_id) is not None:
            return False
        self._end(run_id, attempt, AttemptState.SUCCEEDED, RunState.SUCCEEDED, None, None)
        return True

    def _note_state(self, attempt: Attempt, state: RayJobState) -> None:
        new = AttemptState.RUNNING if state == RayJobState.RUNNING else AttemptState.PENDING
        if attempt.state != new:
            with self._sessions.write() as session:
                _attempt(session, attempt).state = new

    # ------------------------------------------------------------------------------------------------- ending

    def _end_with_outcome(self, run_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
        state, message = str(outcome.get("state")), str(outcome.get("message", ""))
        reason = outcome.get("reason")
        if state == RunState.CANCELLED:
            self._end(
                run_id,
                attempt,
                AttemptState.CANCELLED,
                RunState.CANCELLED,
                None,
                repository.CANCELLED_BY_USER,
            )
        elif state == RunState.FAILED and reason in RETRIED_REASONS:
            self._retry_or_fail(run_id, attempt, AttemptState.FAILED, str(reason), message)
        elif state == RunState.FAILED:
            self._end(
                run_id, attempt, AttemptState.FAILED, RunState.FAILED, str(reason or Reason.INTERNAL), message
            )
        else:
            said = f"the driver ended with {state!r}, but not every task is committed"
            self._end(run_id, attempt, AttemptState.FAILED, RunState.FAILED, Reason.INTERNAL, said)

    def _end_lost(self, run_id: str, attempt: Attempt, state: RayJobState | None) -> None:
        # All attempts are over: what they left between our last look and their end is taken now.
        self._ingest_events(run_id, attempt)
        for number in range(attempt.number, 0, -1):
            self._ingest_manifests(run_id, number)
        if self._finish_if_committed(run_id, attempt.number):
            return
        if state is None:
            reason, message = Reason.CLUSTER_LOST, "the cluster does not know the Ray job"
        else:
            reason, message = Reason.WORKER_LOST, f"the driver ended without an outcome; Ray says {state}"
        self._retry_or_fail(run_id, attempt.number, AttemptState.LOST, reason, message)

    def _retry_or_fail(
        self, run_id: str, attempt: int, state: AttemptState, reason: str, message: str
    ) -> None:
        with self._sessions.write() as session:
            run = repository.get_run(session, run_id)
            if run.state == RunState.CANCELLING:
                _end_attempt(session, run, attempt, AttemptState.CANCELLED, reason, message)
                repository.set_run_state(
                    session, run, RunState.CANCELLED, message=repository.CANCELLED_BY_USER
                )
                return
            run.attempts_without_commit += 1
            _end_attempt(session, run, attempt, state, reason, message)
            if run.attempts_without_commit >= self._settings.max_attempts:
                tried = (
                    f"{run.attempts_without_commit} attempts without a finished task; the last one: {message}"
                )
                repository.set_run_state(session, run, RunState.FAILED, reason=reason, message=tried)
                return
            for task in repository.tasks_of(session, run.job_id):
                if task.run_id == run_id and task.state in (TaskState.TRAINING, TaskState.EVALUATING):
                    task.state = TaskState.PENDING
            repository.get_job(session, run.job_id).progress = {}
            self._add_attempt(session, run)
        self.wake()

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
            _end_attempt(session, run, attempt, attempt_state, reason, message)
            repository.set_run_state(session, run, state, reason=reason, message=message)
        self.wake()


def _attempt(session: Session, attempt: Attempt) -> Attempt:
    return session.get_one(Attempt, (attempt.run_id, attempt.number))


def _end_attempt(
    session: Session, run: Run, number: int, state: AttemptState, reason: str | None, message: str | None
) -> None:
    row = session.get_one(Attempt, (run.id, number))
    row.state, row.reason, row.message, row.finished_at = state, reason, message, utc_now()
    if state in (AttemptState.LOST, AttemptState.FAILED):
        data = {"attempt": number, "reason": reason, "message": message}
        add_event(session, run.job_id, f"attempt.{state}", data, run_id=run.id, attempt=number)


def _next_task(session: Session, run_id: str) -> Task | None:
    """Return the run's first task that is not committed."""
    run = repository.get_run(session, run_id)
    open_tasks = (
        task
        for task in repository.tasks_of(session, run.job_id)
        if task.run_id == run_id and task.state != TaskState.COMMITTED
    )
    return next(open_tasks, None)


def _apply(session: Session, run: Run, event: WorkerEvent) -> None:
    """Show in the run, its tasks and its job what a worker's event says."""
    if event.type == "run.started":
        if run.state in (RunState.SUBMITTING, RunState.SCHEDULING):
            repository.set_run_state(session, run, RunState.RUNNING)
    elif event.type == "step":
        repository.get_job(session, run.job_id).progress = event.data
    elif event.type in _TASK_STATES:
        for task in repository.tasks_of(session, run.job_id):
            is_named = task.run_id == run.id and task.name == event.data.get("task")
            if is_named and task.state != TaskState.COMMITTED:
                task.state = _TASK_STATES[event.type]


_TASK_STATES = {
    "task.started": TaskState.TRAINING,
    "task.trained": TaskState.EVALUATING,
    "task.evaluating": TaskState.EVALUATING,
    "task.evaluated": TaskState.EVALUATING,
}
