"""One run's way: submit its attempt, watch it, take in what it leaves in storage, end it.

advance() may be repeated at any moment and after any crash: a submission id names run and attempt, events are
unique by (run, attempt, seq), and a task is committed once. When there is nothing new it does not write. A
Jobs API that does not answer means unknown, not failed: the run stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from service.adapters import registry
from service.adapters.registry import ManifestError
from service.adapters.storage import Storage, desired_key, outcome_key, plan_key
from service.db.session import Sessions
from service.db.tables import Attempt, Run, utc_now
from service.errors import Invalid
from service.jobs import repository
from service.jobs.attempts import (
    end_attempt,
    entrypoint,
    set_attempt_state,
    stop_run,
    try_again,
)
from service.jobs.datasets import get_dataset, planned_dataset
from service.jobs.events import add_event
from service.jobs.ingest import ingest_events, ingest_manifests, open_tasks
from service.jobs.runner import JobRunner, RayJobState, RunnerRefused
from service.jobs.states import (
    FINAL_ATTEMPT_STATES,
    STOPPING_RUN_STATES,
    AttemptState,
    Reason,
    RunState,
    TaskState,
)
from service.planner import plan_run
from service.settings import Settings
from service.specs import JobSpec, ParentVersion, PlannedTask

RETRIED_REASONS = frozenset({Reason.WORKER_LOST, Reason.CLUSTER_LOST, Reason.STORAGE_ERROR})
_DESIRED = {RunState.PAUSING: "paused", RunState.CANCELLING: "cancelled"}
WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # Ray Train asks its workers so often whether they live; its default is 2 s
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # how long what is left of a broken group may take to leave it, before it is killed; the default is 30 s
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}


@dataclass(frozen=True)
class Parts:
    """What a run's way leads through; sessions refuse to write once another process took over."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    runner: JobRunner


def advance(parts: Parts, run_id: str) -> str | None:
    """Look at a run that has an attempt, once; says what is wrong but may still become right.

    Raises RunnerUnreachable, StorageError, ServiceError (our own refusal, which a repeat does not change).
    """
    with parts.sessions.read() as session:
        run = repository.get_run(session, run_id)
        attempt = repository.attempts_of(session, run_id)[-1]
    if run.state == RunState.SUBMITTING:
        _submit(parts, run_id, attempt)
        return None
    # Again at each look: what a frozen reconciler writes after it was replaced must not stay.
    _write_desired(parts, run_id, _DESIRED.get(RunState(run.state), "running"), attempt)
    outcome = _read_outcome(parts, run_id, attempt.number)
    # The rest of storage is read after the outcome: the driver writes the outcome last.
    ingest_events(parts.sessions, parts.storage, attempt)
    broken = _ingest_manifests(parts, run_id, [attempt.number])
    if _finish_if_committed(parts, run_id, attempt.number):
        return None
    if outcome is not None:
        _end_with_outcome(parts, run_id, attempt.number, outcome)
        return None
    state = parts.runner.state(attempt.submission_id)
    if state is None or state.is_final:
        if _read_outcome(parts, run_id, attempt.number) is None:
            _end_lost(parts, run_id, attempt, state)
        return None  # an outcome was written between the two looks; the next one takes it
    _note_state(parts, attempt, state)
    if run.state in STOPPING_RUN_STATES and run.stop_requested_at is not None:
        overdue_s = (utc_now() - run.stop_requested_at).total_seconds() - parts.settings.stop_grace_s
        if overdue_s > 0:
            parts.runner.stop(attempt.submission_id)
    return broken


def refuse(parts: Parts, run_id: str, message: str) -> None:
    """Fail a run that can never work."""
    with parts.sessions.read() as session:
        attempt = repository.attempts_of(session, run_id)[-1]
    parts.runner.stop(attempt.submission_id)
    _fail(parts, run_id, attempt.number, Reason.INTERNAL, message)


# --------------------------------------------------------------------------------------------------- starting


def _submit(parts: Parts, run_id: str, attempt: Attempt) -> None:
    _store_plan(parts, run_id)
    _write_desired(parts, run_id, "running", attempt)  # the fence: an older attempt that still lives stops
    env = {
        "CLPEFT_STORAGE_URL": parts.settings.storage_url,
        "CLPEFT_CAPACITY_WAIT_S": str(parts.settings.capacity_wait_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(parts.settings.worker_silence_s),
        **WORKER_ENV,
    }
    try:
        parts.runner.submit(attempt.submission_id, entrypoint(run_id, attempt.number), env)
    except RunnerRefused as error:
        _fail(parts, run_id, attempt.number, Reason.INTERNAL, str(error))
        return
    with parts.sessions.write() as session:
        run = repository.lock_run(session, run_id)
        set_attempt_state(session, run_id, attempt.number, AttemptState.PENDING)
        data = {"attempt": attempt.number, "submission_id": attempt.submission_id}
        add_event(session, run.job_id, "run.submitted", data, run_id=run.id, attempt=attempt.number)
        if run.state == RunState.SUBMITTING:  # not when it was asked to stop meanwhile
            repository.set_run_state(session, run, RunState.SCHEDULING)


def _store_plan(parts: Parts, run_id: str) -> None:
    """Write the run's plan; once written it never changes, so that every attempt finds the same."""
    if parts.storage.exists(plan_key(run_id)):
        return
    with parts.sessions.read() as session:
        run = repository.get_run(session, run_id)
        job = repository.get_job(session, run.job_id)
        tasks = repository.tasks_of(session, job.id)
        earlier = [task for task in tasks if task.run_id != run_id and task.state == TaskState.COMMITTED]
        newest = registry.latest_version(session, job.id)
        parent = None
        if newest is not None:
            parent = ParentVersion(version=newest.version, task_dir=newest.task_dir)
        try:
            spec = JobSpec.model_validate(job.spec)
        except ValidationError as error:
            raise Invalid(f"this release cannot read the job's specification: {error}") from error
        general = spec.evaluation.general
        own_set = None
        if general is not None and general != "default":
            own_set = planned_dataset(get_dataset(session, general))
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
    parts.storage.write_json(plan_key(run_id), plan.model_dump(mode="json"))


def _write_desired(parts: Parts, run_id: str, state: str, attempt: Attempt) -> None:
    key, wanted = desired_key(run_id), {"state": state, "attempt": attempt.number}
    try:
        found = parts.storage.read_json(key)
    except FileNotFoundError:
        found = {}
    if {name: found.get(name) for name in wanted} == wanted:
        return
    with parts.sessions.read() as session:
        newest = registry.latest_version(session, repository.get_run(session, run_id).job_id)
    # An attempt goes on from the version that is the newest when it begins.
    parent = None if newest is None else newest.task_dir
    parts.storage.write_json(key, {**wanted, "parent": parent})


# --------------------------------------------------------------------------------------------------- watching


def _read_outcome(parts: Parts, run_id: str, attempt: int) -> Mapping[str, Any] | None:
    try:
        outcome: Mapping[str, Any] = parts.storage.read_json(outcome_key(run_id, attempt))
    except FileNotFoundError:
        return None
    return outcome


def _note_state(parts: Parts, attempt: Attempt, state: RayJobState) -> None:
    new = AttemptState.RUNNING if state == RayJobState.RUNNING else AttemptState.PENDING
    if attempt.state != new:
        with parts.sessions.write() as session:
            repository.lock_run(session, attempt.run_id)
            set_attempt_state(session, attempt.run_id, attempt.number, new)


def _ingest_manifests(parts: Parts, run_id: str, attempts: Sequence[int]) -> str | None:
    """Commit what attempts finished, newest first; says what is wrong with a manifest of the first of them.

    A manifest of an older one that cannot be taken is what it left after it should have stopped.
    """
    broken = None
    for attempt in attempts:
        try:
            ingest_manifests(parts.sessions, parts.storage, run_id, attempt)
        except ManifestError as error:
            broken = str(error) if attempt == attempts[0] else broken
    return broken


# ----------------------------------------------------------------------------------------------------- ending


def _end_with_outcome(parts: Parts, run_id: str, attempt: int, outcome: Mapping[str, Any]) -> None:
    # The attempts are over, so what any of them finished since our last look can be taken.
    broken = _ingest_manifests(parts, run_id, range(attempt, 0, -1))
    if _finish_if_committed(parts, run_id, attempt):
        return
    state, message = str(outcome.get("state")), str(outcome.get("message", ""))
    reason = str(outcome.get("reason") or Reason.INTERNAL)
    if state in ("paused", "cancelled") and _stop(parts, run_id, attempt):
        return
    if state == "failed" and reason in RETRIED_REASONS:
        _try_again(parts, run_id, attempt, AttemptState.FAILED, reason, message)
    elif state == "failed":
        _fail(parts, run_id, attempt, reason, message)
    elif broken is not None:
        _try_again(parts, run_id, attempt, AttemptState.FAILED, Reason.STORAGE_ERROR, broken)
    else:
        said = f"the driver ended with {state!r}, but not every task is committed"
        _fail(parts, run_id, attempt, Reason.INTERNAL, said)


def _end_lost(parts: Parts, run_id: str, attempt: Attempt, state: RayJobState | None) -> None:
    ingest_events(parts.sessions, parts.storage, attempt)
    broken = _ingest_manifests(parts, run_id, range(attempt.number, 0, -1))
    if _finish_if_committed(parts, run_id, attempt.number):
        return
    if broken is not None:
        reason, message = Reason.STORAGE_ERROR, broken
    elif state is None:
        reason, message = Reason.CLUSTER_LOST, "the cluster does not know the Ray job"
    else:
        reason, message = Reason.WORKER_LOST, f"the driver ended without an outcome; Ray says {state}"
    _try_again(parts, run_id, attempt.number, AttemptState.LOST, reason, message)


def _finish_if_committed(parts: Parts, run_id: str, attempt: int) -> bool:
    with parts.sessions.read() as session:
        if open_tasks(session, run_id):
            return False
    _end(parts, run_id, attempt, AttemptState.SUCCEEDED, RunState.SUCCEEDED, None, None)
    return True


def _stop(parts: Parts, run_id: str, attempt: int) -> bool:
    with parts.sessions.write() as session:
        run = repository.lock_run(session, run_id)
        return not _is_over(session, run, attempt) and stop_run(session, run, attempt, None, None)


def _fail(parts: Parts, run_id: str, attempt: int, reason: str, message: str) -> None:
    _end(parts, run_id, attempt, AttemptState.FAILED, RunState.FAILED, reason, message)


def _end(
    parts: Parts,
    run_id: str,
    attempt: int,
    attempt_state: AttemptState,
    state: RunState,
    reason: str | None,
    message: str | None,
) -> None:
    with parts.sessions.write() as session:
        run = repository.lock_run(session, run_id)
        if not _is_over(session, run, attempt):
            end_attempt(session, run, attempt, attempt_state, reason, message)
            repository.set_run_state(session, run, state, reason=reason, message=message)


def _try_again(
    parts: Parts, run_id: str, attempt: int, state: AttemptState, reason: str, message: str
) -> None:
    with parts.sessions.write() as session:
        run = repository.lock_run(session, run_id)
        if _is_over(session, run, attempt):
            return
        limit = repository.get_job(session, run.job_id).spec.get("limits", {}).get("max_attempts")
        try_again(
            session,
            run,
            attempt,
            state,
            reason=reason,
            message=message,
            max_attempts=limit or parts.settings.max_attempts,
        )


def _is_over(session: Any, run: Run, attempt: int) -> bool:
    """Did the attempt end since we looked?"""
    row = session.get_one(Attempt, (run.id, attempt))
    return row.state in FINAL_ATTEMPT_STATES
