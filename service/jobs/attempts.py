"""Attempts of a run: each is one Ray job. Begin one, end one, and decide what follows an end.

Every function works inside the caller's transaction.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from service.db.tables import Attempt, Run, utc_now
from service.jobs import repository
from service.jobs.events import add_event
from service.jobs.ingest import open_tasks
from service.jobs.states import AttemptState, RunState, TaskState


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
    add_event(session, run.job_id, "attempt.started", {"attempt": number}, run_id=run.id, attempt=number)
    repository.set_run_state(session, run, RunState.SUBMITTING)


def end_attempt(
    session: Session, run: Run, number: int, state: AttemptState, reason: str | None, message: str | None
) -> None:
    """Note how an attempt ended; a failed or lost one is an event."""
    row = session.get_one(Attempt, (run.id, number))
    row.state, row.reason, row.message, row.finished_at = state, reason, message, utc_now()
    if state in (AttemptState.LOST, AttemptState.FAILED):
        data = {"attempt": number, "reason": reason, "message": message}
        add_event(session, run.job_id, f"attempt.{state}", data, run_id=run.id, attempt=number)


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
    """End an attempt that a repeat can help, and begin the next.

    A run that is to be cancelled ends instead; so does one with max_attempts attempts since its last commit.
    """
    if run.state == RunState.CANCELLING:
        end_attempt(session, run, number, AttemptState.CANCELLED, reason, message)
        repository.set_run_state(session, run, RunState.CANCELLED, message=repository.CANCELLED_BY_USER)
        return
    run.attempts_without_commit += 1
    end_attempt(session, run, number, state, reason, message)
    if run.attempts_without_commit >= max_attempts:
        tried = f"{run.attempts_without_commit} attempts without a finished task; the last one: {message}"
        repository.set_run_state(session, run, RunState.FAILED, reason=reason, message=tried)
        return
    for task in open_tasks(session, run.id):
        task.state = TaskState.PENDING
    repository.get_job(session, run.job_id).progress = {}
    begin_attempt(session, run)
