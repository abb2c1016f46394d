"""Attempts of a run: each is one Ray job. Begin one, end one, and decide what follows an end.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.orm import Session

from service.db.tables import Attempt, Run, utc_now
from service.jobs import repository
from service.jobs.events import add_event
from service.jobs.ingest import open_tasks
from service.jobs.states import AttemptState, Reason, RunState, TaskState, change_state


def submission_id(run_id: str, attempt: int) -> str:
    """Name the Ray job of an attempt."""
    return f"{run_id}-a{attempt}"


def entrypoint(run_id: str, attempt: int) -> str:
    """The Ray job's command: constant but for generated ids, because Ray gives it to a shell."""
    return f"python -m service.workers.driver --run {run_id} --attempt {attempt}"


def begin_attempt(session: Session, run: Run) -> None:
    """Add the run's next attempt and move the run to submitting."""
    number = len(repository.attempts_of(session, run.id)) + 1
    session.add(
        Attempt(
            run_id=run.id,
            number=number,
            submission_id=submission_id(run.id, number),
            state=AttemptState.SUBMITTING,
        )
    )
    run.started_at = run.started_at or utc_now()
    run.not_before = None
    add_event(session, run.job_id, "attempt.started", {"attempt": number}, run_id=run.id, attempt=number)
    repository.set_run_state(session, run, RunState.SUBMITTING)


def set_attempt_state(session: Session, run_id: str, number: int, state: AttemptState) -> None:
    """Note what Ray says of an attempt."""
    row = session.get_one(Attempt, (run_id, number))
    change_state(row, f"attempt {row.submission_id}", state)


def end_attempt(
    session: Session, run: Run, number: int, state: AttemptState, reason: str | None, message: str | None
) -> None:
    """Note how an attempt ended; a failed or lost one is an event."""
    row = session.get_one(Attempt, (run.id, number))
    change_state(row, f"attempt {row.submission_id}", state)
    row.reason, row.message, row.finished_at = reason, message, utc_now()
    if state in (AttemptState.LOST, AttemptState.FAILED):
        data = {"attempt": number, "reason": reason, "message": message}
        add_event(session, run.job_id, f"attempt.{state}", data, run_id=run.id, attempt=number)


def stop_run(session: Session, run: Run, number: int, reason: str | None, message: str | None) -> bool:
    """End an attempt whose run was asked to stop, as it was asked; False when nobody asked.

    reason and message: what is known of the attempt's end. A run that stops because of its deadline failed.
    """
    if run.state == RunState.PAUSING:
        end_attempt(session, run, number, AttemptState.PAUSED, reason, message)
        _reset_open_tasks(session, run)
        repository.set_run_state(session, run, RunState.PAUSED, message=repository.PAUSED_BY_USER)
    elif run.state == RunState.CANCELLING and run.reason == Reason.DEADLINE:
        end_attempt(session, run, number, AttemptState.CANCELLED, reason, message)
        repository.set_run_state(session, run, RunState.FAILED, reason=run.reason, message=run.message)
    elif run.state == RunState.CANCELLING:
        end_attempt(session, run, number, AttemptState.CANCELLED, reason, message)
        repository.set_run_state(session, run, RunState.CANCELLED, message=repository.CANCELLED_BY_USER)
    else:
        return False
    return True


def try_again(
    session: Session,
    run: Run,
    number: int,
    state: AttemptState,
    *,
    reason: str,
    message: str,
    max_attempts: int,
) -> None:
    """End an attempt that a repeat can help; the run waits for its next one.

    A run that was asked to stop stops instead; one with max_attempts attempts since its last commit fails.
    """
    if stop_run(session, run, number, reason, message):
        return
    run.attempts_without_commit += 1
    end_attempt(session, run, number, state, reason, message)
    if run.attempts_without_commit >= max_attempts:
        tried = f"{run.attempts_without_commit} attempts without a finished task; the last one: {message}"
        repository.set_run_state(session, run, RunState.FAILED, reason=reason, message=tried)
        return
    _reset_open_tasks(session, run)
    pause = back_off(run.attempts_without_commit)
    run.not_before = utc_now() + pause
    waits = (
        f"waits {pause.total_seconds():.0f} s, then for a free place," if pause else "waits for a free place"
    )
    repository.set_run_state(
        session, run, RunState.QUEUED, message=f"{waits} after attempt {number}: {message}"
    )


def back_off(num_failed: int) -> timedelta:
    """Return the pause before the next attempt: none after the first failure, then 2, 4, 8... up to 60 s."""
    return timedelta(seconds=0 if num_failed <= 1 else min(60, 2 ** (num_failed - 1)))


def _reset_open_tasks(session: Session, run: Run) -> None:
    for task in open_tasks(session, run.id):
        change_state(task, f"task {task.name!r}", TaskState.PENDING)
    repository.get_job(session, run.job_id).progress = {}
