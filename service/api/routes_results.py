"""What a job learnt and forgot: its accuracy matrix and its report."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from service.adapters.manifest import Manifest
from service.adapters.registry import versions_of
from service.adapters.storage import Storage
from service.api.deps import SessionsDep, StorageDep
from service.api.views import EvalMatrix, MetricView, Page, answer
from service.db.tables import Metric
from service.errors import Invalid, NotFound
from service.job_report.facts import Facts, read_facts
from service.job_report.matrix import matrix_of
from service.job_report.write import MEDIA_TYPES, WRITERS, ReportFormat
from service.jobs import repository

router = APIRouter(prefix="/v1", tags=["jobs"])
MAX_PAGE = 500
"""Steps of one page: more would keep other requests waiting."""


@router.get("/jobs/{job_id}/eval-matrix")
def eval_matrix(job_id: str, sessions: SessionsDep, storage: StorageDep) -> EvalMatrix:
    """Show every score that was measured; the scalars cover the committed tasks."""
    with sessions.read() as session:
        job = repository.get_job(session, job_id)
        names = [task.name for task in repository.tasks_of(session, job_id)]
        versions = versions_of(session, job.adapter)
        adapter = job.adapter
    manifests = [Manifest.model_validate(row.manifest) for row in versions]
    found = matrix_of(storage, [row.task_dir for row in versions], manifests, names)
    return EvalMatrix(job_id=job_id, adapter=adapter, **found)


@router.get("/jobs/{job_id}/metrics", response_model=Page[MetricView])
def metrics(
    job_id: str,
    sessions: SessionsDep,
    task: str | None = None,
    after: Annotated[str | None, Query(pattern=r"^\d{1,9}\.\d{1,9}$", description="task index.step")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
) -> Response:
    """List what the steps measured, each step once, in order of task and step."""
    place = (Metric.task_index, Metric.step)
    wanted = select(Metric).where(Metric.job_id == job_id).order_by(*place).limit(limit + 1)
    if after is not None:
        task_index, _, step = after.partition(".")
        wanted = wanted.where(tuple_(*place) > (int(task_index), int(step)))
    with sessions.read() as session:
        repository.get_job(session, job_id)
        if task is not None:
            tasks = {row.name: row.index for row in repository.tasks_of(session, job_id)}
            if task not in tasks:
                raise NotFound(
                    f"job {job_id} has no task {task!r}; it has {', '.join(tasks)}", code="task_not_found"
                )
            wanted = wanted.where(Metric.task_index == tasks[task])
        rows = session.scalars(wanted).all()
    page = Page[MetricView](data=[MetricView.model_validate(row) for row in rows[:limit]])
    if len(rows) > limit:
        last = page.data[-1]
        page.has_more, page.next_cursor = True, f"{last.task_index}.{last.step}"
    return answer(page)


@router.get("/jobs/{job_id}/report", response_class=Response)
def report(
    job_id: str,
    sessions: SessionsDep,
    storage: StorageDep,
    format: Annotated[ReportFormat, Query(description="html is one page with pictures")] = "html",
    baseline: Annotated[str | None, Query(description="id of a job to compare with")] = None,
) -> Response:
    """Write a report from what is stored: scores, curves, costs, data, configuration, lineage."""
    if baseline == job_id:
        raise Invalid(f"baseline: {baseline!r} is the job itself; give another job's id")
    facts = _facts(sessions, storage, job_id)
    try:
        other = _facts(sessions, storage, baseline) if baseline is not None else None
    except NotFound as error:
        raise NotFound(f"baseline: {error.detail}", code=error.code) from error
    return Response(WRITERS[format](facts, other), media_type=MEDIA_TYPES[format])


def _facts(sessions: SessionsDep, storage: Storage, job_id: str) -> Facts:
    with sessions.read() as session:
        task_dirs = _task_dirs(session, job_id)
    return read_facts(storage, task_dirs)


def _task_dirs(session: Session, job_id: str) -> list[str]:
    job = repository.get_job(session, job_id)
    found = [row.task_dir for row in versions_of(session, job.adapter)]
    if not found:
        raise NotFound(f"job {job_id} has no report yet: no task is committed", code="no_report")
    return found
