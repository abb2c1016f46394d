"""Jobs: submit, plan, list, show, append, cancel, retry; their runs, attempts and logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Query
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session

from service.adapters.logs import DRIVER, log_processes, log_text
from service.api.deps import (
    OwnerDep,
    ReconcilerDep,
    RunnerDep,
    SessionsDep,
    SettingsDep,
    StorageDep,
)
from service.api.problems import invalid_from
from service.api.views import AttemptView, JobSummary, JobView, Page, RunView, answer, job_view, task_view
from service.basemodels import find_base_model
from service.db.tables import Dataset, Job
from service.errors import Invalid, NotFound, Problem, Unavailable
from service.jobs import repository
from service.jobs.datasets import datasets_of, planned_dataset
from service.jobs.quota import check_quota
from service.jobs.runner import RunnerUnreachable
from service.jobs.states import RunState
from service.planner import KnownDataset, check_training, plan_tasks, resolve_strategies
from service.specs import JobSpec, PlannedTask, Spec, TaskSpec

router = APIRouter(prefix="/v1", tags=["jobs"])


async def _changer(sessions: SessionsDep, reconciler: ReconcilerDep) -> Callable[..., JobView]:
    """Change a job in one transaction, wake the reconciler, show the result."""

    def change(job_id: str, verb: Callable[[Session, Job], object]) -> JobView:
        with sessions.write() as session:
            job = repository.lock_job(session, job_id)
            verb(session, job)
            shown = _show(session, job)
        reconciler.wake()
        return shown

    return change


ChangeDep = Annotated[Callable[..., JobView], Depends(_changer)]


class TaskList(Spec):
    """Tasks to append."""

    tasks: tuple[TaskSpec, ...] = Field(min_length=1, max_length=1000)


class JobPlan(Spec):
    """What a job would do, with every default filled in."""

    spec: JobSpec
    base_model_path: str
    tasks: tuple[PlannedTask, ...]
    num_steps: int


@router.post("/jobs", status_code=201, response_model=JobView)
def submit(
    spec: JobSpec, settings: SettingsDep, sessions: SessionsDep, reconciler: ReconcilerDep, owner: OwnerDep
) -> Response:
    """Submit a job; its first run starts when the cluster has a place for it."""
    spec, path = _resolve(spec, settings)
    with sessions.write() as session:
        check_quota(session, owner, settings.owner_quota_bytes)
        planned = _plan(session, spec.tasks, spec)
        new = repository.create_job(session, spec, planned, base_model_path=path, owner=owner)
    reconciler.wake()
    runs = [RunView.model_validate(new.run)]
    return answer(job_view(new.job, [task_view(task) for task in new.tasks], runs), status_code=201)


@router.post("/jobs:plan")
def plan(spec: JobSpec, settings: SettingsDep, sessions: SessionsDep, owner: OwnerDep) -> JobPlan:
    """Check a job and fill in its defaults; nothing is stored."""
    spec, path = _resolve(spec, settings)
    with sessions.read() as session:
        check_quota(session, owner, settings.owner_quota_bytes)
        repository.check_adapter_name(session, spec.adapter or spec.name)
        tasks = _plan(session, spec.tasks, spec)
    return JobPlan(spec=spec, base_model_path=path, tasks=tasks, num_steps=sum(task.steps for task in tasks))


@router.get("/jobs")
def list_jobs(
    sessions: SessionsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    status: RunState | None = None,
) -> Page[JobSummary]:
    """List jobs, newest first."""
    with sessions.read() as session:
        jobs, has_more = repository.list_jobs(
            session, limit=limit, after=after, newest_first=order == "desc", status=status
        )
    data = [JobSummary.model_validate(job) for job in jobs]
    return Page(data=data, has_more=has_more, next_cursor=data[-1].id if has_more else None)


@router.get("/jobs/{job_id}")
def show(job_id: str, sessions: SessionsDep) -> JobView:
    """Show a job with its tasks and runs."""
    with sessions.read() as session:
        return _show(session, repository.get_job(session, job_id))


@router.post("/jobs/{job_id}/tasks", status_code=201)
def append(
    job_id: str,
    body: Annotated[dict[str, Any], Body()],
    settings: SettingsDep,
    sessions: SessionsDep,
    reconciler: ReconcilerDep,
) -> JobView:
    """Append one task, or {"tasks": [...]}: a new run continues from the newest version."""
    tasks, is_list = _read_tasks(body)
    with sessions.write() as session:
        job = repository.lock_job(session, job_id)
        repository.check_appendable(job)
        check_quota(session, job.owner, settings.owner_quota_bytes)
        earlier = repository.tasks_of(session, job_id)
        try:
            planned = _plan(
                session,
                tasks,
                JobSpec.model_validate(job.spec),
                first_index=len(earlier),
                taken_names=[task.name for task in earlier],
            )
        except Invalid as error:
            raise error if is_list else _without_prefix(error) from None
        repository.append_tasks(session, job, tasks, planned)
        shown = _show(session, job)
    reconciler.wake()
    return shown


@router.post("/jobs/{job_id}:cancel", status_code=202)
def cancel(job_id: str, change: ChangeDep) -> JobView:
    """Stop a job for good: what waits is cancelled at once, what runs stops at its next step."""
    return change(job_id, repository.cancel_job)


@router.post("/jobs/{job_id}:pause", status_code=202)
def pause(job_id: str, change: ChangeDep) -> JobView:
    """Stop a job at its next step and keep its place in the task; its resources become free."""
    return change(job_id, repository.pause_job)


@router.post("/jobs/{job_id}:resume", status_code=202)
def resume(job_id: str, change: ChangeDep) -> JobView:
    """Let a paused job wait for a place and go on from the step where it stopped."""
    return change(job_id, repository.resume_job)


@router.post("/jobs/{job_id}:retry", status_code=202)
def retry(job_id: str, change: ChangeDep) -> JobView:
    """Train the tasks of a failed or cancelled job that are not committed, in a new run."""
    return change(job_id, repository.retry_job)


@router.get("/jobs/{job_id}/runs")
def list_runs(job_id: str, sessions: SessionsDep) -> Page[RunView]:
    """List a job's runs, oldest first."""
    with sessions.read() as session:
        repository.get_job(session, job_id)
        runs = repository.runs_of(session, job_id)
    return Page(data=[RunView.model_validate(run) for run in runs])


@router.get("/runs/{run_id}")
def show_run(run_id: str, sessions: SessionsDep) -> RunView:
    """Show a run."""
    with sessions.read() as session:
        return RunView.model_validate(repository.get_run(session, run_id))


@router.get("/runs/{run_id}/attempts")
def list_attempts(run_id: str, sessions: SessionsDep) -> Page[AttemptView]:
    """List a run's attempts, oldest first."""
    with sessions.read() as session:
        repository.get_run(session, run_id)
        attempts = repository.attempts_of(session, run_id)
    return Page(data=[AttemptView.model_validate(row) for row in attempts])


@router.get("/jobs/{job_id}/logs", response_class=PlainTextResponse)
def logs(
    job_id: str,
    sessions: SessionsDep,
    storage: StorageDep,
    runner: RunnerDep,
    run: str | None = None,
    attempt: Annotated[int | None, Query(ge=1)] = None,
    process: str = DRIVER,
) -> Response:
    """Return what a process printed: by default the newest attempt's driver.

    X-Log-Processes names all processes of the attempt. It is read from storage, so it outlives the cluster; a
    driver that has stored nothing yet is asked for at the cluster.
    """
    with sessions.read() as session:
        repository.get_job(session, job_id)
        runs = [row.id for row in repository.runs_of(session, job_id) if run in (None, row.id)]
        every = [row for run_id in runs for row in repository.attempts_of(session, run_id)]
    if not runs:
        raise NotFound(f"job {job_id} has no run {run!r}", code="run_not_found")
    attempts = [row for row in every if attempt in (None, row.number)]
    if not attempts:
        wanted = "attempt" if attempt is None else f"attempt {attempt}"
        there = ", ".join(str(row.number) for row in every) or "none yet"
        raise NotFound(f"job {job_id} has no {wanted}; it has: {there}", code="no_log")
    newest = attempts[-1]
    known = log_processes(storage, newest.run_id, newest.number)
    if process in known:
        text = log_text(storage, newest.run_id, newest.number, process)
        return StreamingResponse(text, media_type="text/plain", headers={"X-Log-Processes": ", ".join(known)})
    if process != DRIVER:
        shown = ", ".join(known) or "none yet"
        raise NotFound(f"{newest.submission_id} has no log of {process!r}; it has: {shown}", code="no_log")
    try:
        found = runner.logs(newest.submission_id)
    except RunnerUnreachable as error:
        raise Unavailable(str(error), code="ray_unavailable") from error
    if found is None:
        raise NotFound(f"the cluster has no log of {newest.submission_id}", code="no_log")
    return PlainTextResponse(found)


def _resolve(spec: JobSpec, settings: SettingsDep) -> tuple[JobSpec, str]:
    check_training(spec.training)
    strategies = resolve_strategies(spec.strategy)
    path = find_base_model(spec.base_model, settings.models_dir)
    return spec.model_copy(update={"strategy": strategies, "adapter": spec.adapter or spec.name}), path


def _plan(
    session: Session, tasks: Sequence[TaskSpec], spec: JobSpec, **options: Any
) -> tuple[PlannedTask, ...]:
    ids = {found for task in tasks for found in (task.dataset, task.eval_dataset) if found is not None}
    datasets = {
        row.id: KnownDataset(planned=planned_dataset(row), format=row.format)
        for row in datasets_of(session, ids)
    }
    _check_general(session, spec)
    return plan_tasks(tasks, training=spec.training, datasets=datasets, **options)


def _check_general(session: Session, spec: JobSpec) -> None:
    general = spec.evaluation.general
    if general not in (None, "default") and session.get(Dataset, general) is None:
        detail = f"no data set {general!r}; upload one to POST /v1/datasets, or use 'default' or null"
        raise Invalid(detail, problems=[Problem("/evaluation/general", detail)])


def _read_tasks(body: dict[str, Any]) -> tuple[tuple[TaskSpec, ...], bool]:
    try:
        if "tasks" in body:
            return TaskList.model_validate(body).tasks, True
        return (TaskSpec.model_validate(body),), False
    except ValidationError as error:
        raise invalid_from(error) from error


def _without_prefix(error: Invalid) -> Invalid:
    """Point into the single task that was sent instead of a list."""
    problems = [type(p)(p.pointer.removeprefix("/tasks/0") or "/", p.detail) for p in error.problems]
    return Invalid(error.detail.replace("/tasks/0", "", 1), code=error.code, problems=problems)


def _show(session: Session, job: Job) -> JobView:
    tasks = [task_view(task) for task in repository.tasks_of(session, job.id)]
    runs = [RunView.model_validate(run) for run in repository.runs_of(session, job.id)]
    return job_view(job, tasks, runs)
