"""Reads and changes of jobs, runs and tasks. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from service.adapters.storage import dataset_key
from service.db.tables import Attempt, Dataset, Job, Run, Task, utc_now
from service.errors import Conflict, NotFound
from service.ids import new_id
from service.jobs.events import add_event
from service.jobs.states import (
    AT_WORK_RUN_STATES,
    FINAL_RUN_STATES,
    UNFINISHED_RUN_STATES,
    Reason,
    RunState,
    TaskState,
    check_run_change,
)
from service.specs import JobSpec, PlannedDataset, PlannedTask, TaskSpec

CANCELLED_BY_USER = "cancelled by the user"


# ------------------------------------------------------------------------------------------------------ reads


def get_dataset(session: Session, dataset_id: str) -> Dataset:
    """Return a data set. Raises NotFound."""
    found = session.get(Dataset, dataset_id)
    if found is None:
        raise NotFound(f"no data set {dataset_id!r}", code="dataset_not_found")
    return found


def planned_dataset(session: Session, dataset_id: str) -> PlannedDataset:
    """Return a data set as a worker finds it. Raises NotFound."""
    row = get_dataset(session, dataset_id)
    return PlannedDataset(id=row.id, path=dataset_key(row.id), sha256=row.sha256, num_rows=row.num_rows)


def get_job(session: Session, job_id: str) -> Job:
    """Return a job. Raises NotFound."""
    found = session.get(Job, job_id)
    if found is None:
        raise NotFound(f"no job {job_id!r}", code="job_not_found")
    return found


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


def unfinished_runs(session: Session) -> Sequence[Run]:
    """Return the runs that are not at an end, oldest first."""
    wanted = select(Run).where(Run.state.in_(UNFINISHED_RUN_STATES)).order_by(Run.created_at, Run.id)
    return session.scalars(wanted).all()


# ---------------------------------------------------------------------------------------------------- changes


def create_job(
    session: Session, spec: JobSpec, planned: Sequence[PlannedTask], *, base_model_path: str
) -> Job:
    """Store a job and its first run. Raises Conflict when the adapter's name is taken."""
    adapter = spec.adapter or spec.name
    owner = session.scalar(select(Job.id).where(Job.adapter == adapter))
    if owner is not None:
        raise Conflict(
            f"adapter name {adapter!r} belongs to job {owner}: append tasks to it with "
            f"POST /v1/jobs/{owner}/tasks, or give another name in `adapter`",
            code="adapter_name_taken",
        )
    job = Job(
        id=new_id("job"),
        name=spec.name,
        adapter=adapter,
        state=RunState.QUEUED,
        spec=spec.model_dump(mode="json"),
        base_model_path=base_model_path,
        base_model_id=spec.base_model.id,
        labels=dict(spec.labels),
        num_tasks=0,
    )
    session.add(job)
    session.flush()
    add_event(
        session, job.id, "job.created", {"name": job.name, "adapter": job.adapter, "num_tasks": len(planned)}
    )
    _add_run_with_tasks(session, job, spec.tasks, planned)
    return job


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
            run.cancel_requested_at = utc_now()
            set_run_state(session, run, RunState.CANCELLING)
    for run in runs_of(session, job.id):
        if run.state == RunState.QUEUED:
            set_run_state(session, run, RunState.CANCELLED, message=CANCELLED_BY_USER)


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
        task.state = TaskState.PENDING
    refresh_job(session, job)
    return run


def set_run_state(
    session: Session, run: Run, state: RunState, *, reason: str | None = None, message: str | None = None
) -> None:
    """Move a run and bring its tasks, the runs that wait for it and its job along."""
    check_run_change(run.id, run.state, state)
    run.state = state
    run.reason, run.message = reason, message
    job = get_job(session, run.job_id)
    if state in FINAL_RUN_STATES:
        run.finished_at = utc_now()
        _end_tasks(session, run)
        add_event(session, run.job_id, f"run.{state}", {"reason": reason, "message": message}, run_id=run.id)
        if state != RunState.SUCCEEDED:
            _cancel_waiting(session, run)
    elif state == RunState.CANCELLING:
        add_event(session, run.job_id, "run.cancelling", {}, run_id=run.id)
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
    job.num_tasks = len(tasks_of(session, job.id))
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
    for task, plan in zip(tasks, planned, strict=True):
        session.add(
            Task(
                id=new_id("task"),
                job_id=job.id,
                run_id=run.id,
                index=plan.index,
                name=task.name,
                spec=task.model_dump(mode="json"),
                planned=plan.model_dump(mode="json"),
                dataset_id=plan.dataset.id,
                eval_dataset_id=plan.eval_dataset.id,
                state=TaskState.PENDING,
            )
        )
    refresh_job(session, job)
    return run


def _add_run(session: Session, job: Job, task_indexes: list[Any]) -> Run:
    number = len(runs_of(session, job.id)) + 1
    run = Run(
        id=new_id("run"), job_id=job.id, number=number, state=RunState.QUEUED, task_indexes=task_indexes
    )
    session.add(run)
    session.flush()
    add_event(session, job.id, "run.queued", {"number": number, "task_indexes": task_indexes}, run_id=run.id)
    return run


def _end_tasks(session: Session, run: Run) -> None:
    at_work = (TaskState.TRAINING, TaskState.EVALUATING)
    for task in session.scalars(select(Task).where(Task.run_id == run.id, Task.state != TaskState.COMMITTED)):
        failed = run.state == RunState.FAILED and task.state in at_work
        task.state = TaskState.FAILED if failed else TaskState.SKIPPED


def _cancel_waiting(session: Session, run: Run) -> None:
    message = f"run {run.number} of this job {run.state}"
    waiting = select(Run).where(Run.job_id == run.job_id, Run.state == RunState.QUEUED).order_by(Run.number)
    for later in session.scalars(waiting).all():
        later.state, later.finished_at = RunState.CANCELLED, utc_now()
        later.reason, later.message = Reason.PARENT_FAILED, message
        _end_tasks(session, later)
        add_event(
            session,
            run.job_id,
            "run.cancelled",
            {"reason": later.reason, "message": message},
            run_id=later.id,
        )
