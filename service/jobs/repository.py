"""Reads and changes of jobs, runs and tasks. Every function works inside the caller's transaction.

A transaction that changes a job calls lock_job first: it then sees the newest state of the job and its rows,
and whoever else wants to change the job waits until it ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import bindparam, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, defer

from service.db.tables import DEFAULT_OWNER, Attempt, Job, Run, Task, utc_now
from service.errors import Conflict, NotFound
from service.ids import new_id
from service.jobs.events import add_event, next_event
from service.jobs.states import (
    AT_WORK_RUN_STATES,
    FINAL_RUN_STATES,
    STOPPING_RUN_STATES,
    UNFINISHED_RUN_STATES,
    WAITING_RUN_STATES,
    Reason,
    RunState,
    TaskState,
    change_state,
)
from service.specs import JobSpec, PlannedTask, TaskSpec

CANCELLED_BY_USER = "cancelled by the user"
PAUSED_BY_USER = "paused by the user"
WAITS_FOR_PLACE = "waits for a free place"
_SHOWN_RUN_STATES = FINAL_RUN_STATES | STOPPING_RUN_STATES | WAITING_RUN_STATES
"""Changes to these are events; the others have events of their own, such as run.submitted."""


# made once: every submission runs it, and to make it takes longer than to run it
_TAKEN_BY = select(Job.id, Job.state).where(Job.adapter == bindparam("adapter"))


class NewJob(NamedTuple):
    """What create_job stored."""

    job: Job
    run: Run
    tasks: list[Task]


# ------------------------------------------------------------------------------------------------------ reads


def get_job(session: Session, job_id: str) -> Job:
    """Return a job. Raises NotFound."""
    found = session.get(Job, job_id)
    if found is None:
        raise NotFound(f"no job {job_id!r}", code="job_not_found")
    return found


def lock_job(session: Session, job_id: str) -> Job:
    """Return a job that nobody else changes until this transaction ends. Raises NotFound."""
    found = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if found is None:
        raise NotFound(f"no job {job_id!r}", code="job_not_found")
    return found


def lock_run(session: Session, run_id: str) -> Run:
    """Return a run whose job is locked. Raises NotFound."""
    job_id = session.scalar(select(Run.job_id).where(Run.id == run_id))
    if job_id is None:
        raise NotFound(f"no run {run_id!r}", code="run_not_found")
    lock_job(session, job_id)
    return session.get_one(Run, run_id, populate_existing=True)


def get_run(session: Session, run_id: str) -> Run:
    """Return a run. Raises NotFound."""
    found = session.get(Run, run_id)
    if found is None:
        raise NotFound(f"no run {run_id!r}", code="run_not_found")
    return found


def list_jobs(
    session: Session, *, limit: int, after: str | None, newest_first: bool, status: str | None
) -> tuple[Sequence[Job], bool]:
    """Return a page of jobs, without their specs, and whether more follow."""
    wanted = select(Job).options(defer(Job.spec, raiseload=True)).limit(limit + 1)
    wanted = wanted.order_by(Job.id.desc() if newest_first else Job.id)
    if after is not None:
        wanted = wanted.where(Job.id < after if newest_first else Job.id > after)
    if status is not None:
        wanted = wanted.where(Job.state == status)
    page = session.scalars(wanted).all()
    return page[:limit], len(page) > limit


def tasks_of(session: Session, job_id: str) -> Sequence[Task]:
    """Return the job's tasks in order."""
    return session.scalars(select(Task).where(Task.job_id == job_id).order_by(Task.index)).all()


def runs_of(session: Session, job_id: str) -> Sequence[Run]:
    """Return the job's runs, oldest first."""
    return session.scalars(select(Run).where(Run.job_id == job_id).order_by(Run.number)).all()


def attempts_of(session: Session, run_id: str) -> Sequence[Attempt]:
    """Return the run's attempts, oldest first."""
    return session.scalars(select(Attempt).where(Attempt.run_id == run_id).order_by(Attempt.number)).all()


def runs_in(session: Session, states: Collection[RunState]) -> Sequence[Run]:
    """Return the runs in these states, oldest first."""
    wanted = select(Run).where(Run.state.in_(states)).order_by(Run.created_at, Run.id)
    return session.scalars(wanted).all()


# ---------------------------------------------------------------------------------------------------- changes


def create_job(
    session: Session,
    spec: JobSpec,
    planned: Sequence[PlannedTask],
    *,
    base_model_path: str,
    owner: str = DEFAULT_OWNER,
) -> NewJob:
    """Store a job with its first run and tasks. Raises Conflict when the adapter's name is taken.

    A new job has nothing to read back or to lock, so this takes one statement per table. Every column has its
    value here: a bulk insert leaves no defaults in the objects.
    """
    adapter = spec.adapter or spec.name
    check_adapter_name(session, adapter)
    now = utc_now()
    job = Job(
        id=new_id("job"),
        name=spec.name,
        adapter=adapter,
        state=RunState.QUEUED,
        message=WAITS_FOR_PLACE,
        spec=spec.model_dump(mode="json"),
        base_model_path=base_model_path,
        base_model_id=spec.base_model.id,
        labels=dict(spec.labels),
        owner=owner,
        priority=spec.priority,
        num_tasks=len(planned),
        num_committed=0,
        progress={},
        last_event=0,
        created_at=now,
        updated_at=now,
    )
    created = {"name": job.name, "adapter": job.adapter, "num_tasks": len(planned)}
    events = [next_event(job, "job.created", created)]
    run = _new_run(job, [], [plan.index for plan in planned])
    events.append(next_event(job, "run.queued", _queued_data(run), run_id=run.id))
    tasks = _new_tasks(run, spec.tasks, planned)
    try:
        session.bulk_save_objects([job, run, *tasks, *events])
    except IntegrityError as error:  # another replica was faster
        raise Conflict(f"adapter name {adapter!r} was just taken", code="adapter_name_taken") from error
    return NewJob(job, run, tasks)


def check_adapter_name(session: Session, adapter: str) -> None:
    """Raise Conflict when a job has an adapter of this name."""
    taken_by = session.execute(_TAKEN_BY, {"adapter": adapter}).first()
    if taken_by is None:
        return
    url = f"POST /v1/jobs/{taken_by.id}"
    way = {
        RunState.CANCELLED: ", which is cancelled: ",
        RunState.FAILED: f", which failed: retry it with {url}:retry, or ",
    }.get(taken_by.state, f": append tasks to it with {url}/tasks, or ")
    raise Conflict(
        f"adapter name {adapter!r} belongs to job {taken_by.id}{way}give another name in `adapter`",
        code="adapter_name_taken",
    )


def check_appendable(job: Job) -> None:
    """Raise Conflict unless the job takes more tasks: it is succeeded or still at work."""
    if job.state == RunState.FAILED:
        raise Conflict(
            f"job {job.id} failed: retry first with POST /v1/jobs/{job.id}:retry, then append",
            code="job_failed",
        )
    if job.state in (RunState.CANCELLED, RunState.CANCELLING):
        raise Conflict(f"job {job.id} is {job.state}: a cancelled job takes no tasks", code="job_cancelled")


def append_tasks(
    session: Session, job: Job, tasks: Sequence[TaskSpec], planned: Sequence[PlannedTask]
) -> Run:
    """Add tasks as a new run; it waits until the job's earlier runs succeeded."""
    check_appendable(job)
    return _add_run_with_tasks(session, job, tasks, planned)


def cancel_job(session: Session, job: Job) -> None:
    """Cancel what waits at once and ask what is at work to stop. Raises Conflict on a finished job."""
    if job.state in (RunState.CANCELLED, RunState.CANCELLING):
        return
    if job.state in FINAL_RUN_STATES:
        raise Conflict(f"job {job.id} is {job.state} and cannot be cancelled", code="job_finished")
    for run in runs_of(session, job.id):
        if run.state in AT_WORK_RUN_STATES:
            run.stop_requested_at = utc_now()
            set_run_state(session, run, RunState.CANCELLING)
    for run in runs_of(session, job.id):
        if run.state in WAITING_RUN_STATES:
            set_run_state(session, run, RunState.CANCELLED, message=CANCELLED_BY_USER)


def pause_job(session: Session, job: Job) -> None:
    """Stop a job where it is; resume_job goes on from there. Raises Conflict on an ended job."""
    if job.state in (RunState.PAUSED, RunState.PAUSING):
        return
    if job.state in FINAL_RUN_STATES or job.state == RunState.CANCELLING:
        raise Conflict(f"job {job.id} is {job.state} and cannot be paused", code="not_pausable")
    run = next(run for run in runs_of(session, job.id) if run.state in UNFINISHED_RUN_STATES)
    if run.state == RunState.QUEUED:
        set_run_state(session, run, RunState.PAUSED, message=PAUSED_BY_USER)
    else:
        run.stop_requested_at = utc_now()
        set_run_state(session, run, RunState.PAUSING)


def resume_job(session: Session, job: Job) -> None:
    """Let a paused job wait for a place again. Raises Conflict unless it is paused."""
    if job.state == RunState.QUEUED:
        return
    if job.state == RunState.PAUSING:
        raise Conflict(f"job {job.id} is still pausing: resume it once it is paused", code="job_pausing")
    if job.state != RunState.PAUSED:
        raise Conflict(f"job {job.id} is {job.state}: only paused jobs are resumed", code="not_paused")
    run = next(run for run in runs_of(session, job.id) if run.state == RunState.PAUSED)
    for late in runs_of(session, job.id):  # time in a pause does not count
        if late.deadline_at is not None and run.paused_at is not None and late.state in WAITING_RUN_STATES:
            late.deadline_at += utc_now() - max(run.paused_at, late.created_at)
    run.not_before = None
    run.attempts_without_commit = 0  # somebody looked at it
    set_run_state(session, run, RunState.QUEUED, message=WAITS_FOR_PLACE)


def retry_job(session: Session, job: Job) -> Run:
    """Give all tasks that are not committed to a new run. Raises Conflict unless failed or cancelled."""
    if job.state not in (RunState.FAILED, RunState.CANCELLED):
        raise Conflict(
            f"job {job.id} is {job.state}: only failed or cancelled jobs are retried", code="not_retryable"
        )
    tasks = [task for task in tasks_of(session, job.id) if task.state != TaskState.COMMITTED]
    run = _add_run(session, job, [task.index for task in tasks])
    for task in tasks:
        task.run_id = run.id
        change_state(task, f"task {task.name!r}", TaskState.PENDING)
    refresh_job(session, job)
    return run


def set_run_state(
    session: Session, run: Run, state: RunState, *, reason: str | None = None, message: str | None = None
) -> None:
    """Move a run and bring its tasks, the runs that wait for it and its job along."""
    if run.state == state:
        return
    change_state(run, f"run {run.id}", state)
    run.reason, run.message = reason, message
    job = get_job(session, run.job_id)
    if state in FINAL_RUN_STATES:
        run.finished_at = utc_now()
        _end_tasks(session, run)
    if state == RunState.PAUSED:
        run.paused_at = utc_now()
    if state in _SHOWN_RUN_STATES:
        add_event(session, run.job_id, f"run.{state}", {"reason": reason, "message": message}, run_id=run.id)
    if state == RunState.SUCCEEDED:
        _give_turn(session, run)
    elif state in FINAL_RUN_STATES:
        _cancel_waiting(session, run)
    refresh_job(session, job)


def refresh_job(session: Session, job: Job) -> None:
    """Bring the job's state up to date: its oldest unfinished run's, else its latest run's."""
    session.flush()
    runs = runs_of(session, job.id)
    unfinished = [run for run in runs if run.state in UNFINISHED_RUN_STATES]
    # A run that never started because of its parent says less than the parent itself.
    ended = [run for run in runs if run.reason != Reason.PARENT_FAILED]
    shown = unfinished[0] if unfinished else ended[-1]
    was_final = job.state in FINAL_RUN_STATES
    job.state, job.reason, job.message = shown.state, shown.reason, shown.message
    job.num_tasks = session.scalar(select(func.count()).where(Task.job_id == job.id)) or 0
    if unfinished:
        job.finished_at = None
    elif not was_final:
        job.finished_at = utc_now()
        job.progress = {}
        add_event(session, job.id, f"job.{job.state}", {"reason": job.reason, "message": job.message})


def _add_run_with_tasks(
    session: Session, job: Job, tasks: Sequence[TaskSpec], planned: Sequence[PlannedTask]
) -> Run:
    run = _add_run(session, job, [plan.index for plan in planned])
    session.add_all(_new_tasks(run, tasks, planned))
    refresh_job(session, job)
    return run


def _new_tasks(run: Run, tasks: Sequence[TaskSpec], planned: Sequence[PlannedTask]) -> list[Task]:
    return [
        Task(
            id=new_id("task"),
            job_id=run.job_id,
            run_id=run.id,
            index=plan.index,
            name=task.name,
            spec=task.model_dump(mode="json"),
            planned=plan.model_dump(mode="json"),
            dataset_id=plan.dataset.id,
            eval_dataset_id=plan.eval_dataset.id,
            state=TaskState.PENDING,
        )
        for task, plan in zip(tasks, planned, strict=True)
    ]


def _add_run(session: Session, job: Job, task_indexes: list[Any]) -> Run:
    run = _new_run(job, runs_of(session, job.id), task_indexes)
    session.add(run)
    session.flush()
    add_event(session, job.id, "run.queued", _queued_data(run), run_id=run.id)
    return run


def _new_run(job: Job, earlier: Sequence[Run], task_indexes: list[Any]) -> Run:
    number = len(earlier) + 1
    waits_for = [run for run in earlier if run.state in UNFINISHED_RUN_STATES]
    deadline_s = job.spec.get("limits", {}).get("deadline_s")
    now = utc_now()
    return Run(
        id=new_id("run"),
        job_id=job.id,
        number=number,
        state=RunState.QUEUED,
        message=f"waits for run {waits_for[-1].number} of this job" if waits_for else WAITS_FOR_PLACE,
        task_indexes=task_indexes,
        deadline_at=None if deadline_s is None else now + timedelta(seconds=deadline_s),
        attempts_without_commit=0,
        created_at=now,
    )


def _queued_data(run: Run) -> dict[str, Any]:
    return {"number": run.number, "task_indexes": run.task_indexes}


def _end_tasks(session: Session, run: Run) -> None:
    at_work = (TaskState.TRAINING, TaskState.EVALUATING)
    for task in session.scalars(select(Task).where(Task.run_id == run.id, Task.state != TaskState.COMMITTED)):
        failed = run.state == RunState.FAILED and task.state in at_work
        change_state(task, f"task {task.name!r}", TaskState.FAILED if failed else TaskState.SKIPPED)


def _give_turn(session: Session, run: Run) -> None:
    """The run that waited for this one waits for a place now."""
    following = select(Run).where(Run.job_id == run.job_id, Run.number > run.number).order_by(Run.number)
    for later in session.scalars(following.where(Run.state == RunState.QUEUED).limit(1)):
        later.message = WAITS_FOR_PLACE


def _cancel_waiting(session: Session, run: Run) -> None:
    message = f"run {run.number} of this job {run.state}"
    for later in runs_of(session, run.job_id):
        if later.number > run.number and later.state == RunState.QUEUED:
            change_state(later, f"run {later.id}", RunState.CANCELLED)
            later.finished_at = utc_now()
            later.reason, later.message = Reason.PARENT_FAILED, message
            _end_tasks(session, later)
            data = {"reason": later.reason, "message": message}
            add_event(session, run.job_id, "run.cancelled", data, run_id=later.id)
