"""What the API answers, as pydantic models: the OpenAPI document is made of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from fastapi import Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Row, select

from service.db.tables import AdapterVersion, Job, Task

Item = TypeVar("Item")


class View(BaseModel):
    """Base of all answers; reads table rows by attribute."""

    model_config = ConfigDict(from_attributes=True)


class Page(BaseModel, Generic[Item]):
    """A page of a list; next_cursor goes into `after`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    next_cursor: str | None = None


class DatasetView(View):
    """An uploaded data set."""

    id: str
    name: str
    format: Literal["completion", "messages"]
    num_rows: int
    bytes: int
    sha256: str
    statistics: dict[str, Any]
    owner: str
    created_at: datetime


class JobSummary(View):
    """A job without its specification."""

    id: str
    name: str
    adapter: str
    base_model_id: str
    state: str
    reason: str | None
    message: str | None
    owner: str
    priority: int
    num_tasks: int
    num_committed: int
    progress: dict[str, Any]
    labels: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


class TaskView(View):
    """A task of a job and how far it is."""

    index: int
    name: str
    run_id: str
    state: str
    version: int | None
    dataset_id: str
    eval_dataset_id: str
    spec: dict[str, Any]
    steps: int


class RunView(View):
    """One execution of tasks."""

    id: str
    job_id: str
    number: int
    state: str
    reason: str | None
    message: str | None
    task_indexes: list[int]
    attempts_without_commit: int
    """Attempts since the run last finished a task; the run fails when the budget is spent."""
    not_before: datetime | None
    """When the next attempt may begin, after a failed one."""
    deadline_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class AttemptView(View):
    """One Ray job of a run."""

    run_id: str
    number: int
    submission_id: str
    state: str
    reason: str | None
    message: str | None
    created_at: datetime
    finished_at: datetime | None


class JobView(JobSummary):
    """A job with its tasks and runs."""

    spec: dict[str, Any]
    tasks: list[TaskView]
    runs: list[RunView]


class EventView(View):
    """Something that happened to a job. The id counts the job's events from 1, without a gap."""

    id: int
    job_id: str
    run_id: str | None
    attempt: int | None
    seq: int | None
    time: datetime
    type: str
    data: dict[str, Any]


class MetricView(View):
    """What one optimizer step measured; a step that was trained again is shown once, as it was last."""

    task_index: int
    step: int
    attempt: int
    time: datetime
    data: dict[str, float | None]


class VersionView(View):
    """An immutable version of an adapter."""

    adapter: str
    version: int
    job_id: str
    run_id: str
    attempt: int
    task_index: int
    task_name: str
    manifest_sha256: str
    created_at: datetime
    scores: dict[str, float]
    base_scores: dict[str, float]
    before_scores: dict[str, float] = {}
    general: dict[str, Any] | None = None
    training: dict[str, float | None]
    data_format: str
    parent_dir: str | None = None
    task_dir: str


class AdapterView(View):
    """An adapter: its newest version and its aliases."""

    name: str
    job_id: str
    latest_version: int
    aliases: dict[str, int]
    created_at: datetime
    updated_at: datetime


class AdapterDetail(AdapterView):
    """An adapter with all versions."""

    versions: list[VersionView]


class AliasView(View):
    """Where an alias points."""

    adapter: str
    alias: str
    version: int
    updated_at: datetime


class EvalMatrix(BaseModel):
    """The accuracy matrix. matrix[i][j] is the score on task j after training task i; null was not measured.

    average_accuracy is the mean of the last row (macro); when tasks got worse, forgetting is positive and bwt
    is negative.
    """

    job_id: str
    adapter: str
    tasks: list[str]
    matrix: list[list[float | None]]
    versions: list[int | None]
    base_scores: list[float | None]
    average_accuracy: float | None
    forgetting: float | None
    bwt: float | None
    fwt: float | None
    learning_accuracy: float | None
    intervals_95: dict[str, tuple[float, float] | None]
    """Scalar -> low and high end, from resampling the evaluation rows; null where there are too few."""


def answer(view: BaseModel, status_code: int = 200) -> Response:
    """Send a view as it is; FastAPI would check each of its parts once more."""
    return Response(view.model_dump_json(), status_code, media_type="application/json")


def task_view(task: Task) -> TaskView:
    """Show a task."""
    shown = {name: getattr(task, name) for name in TaskView.model_fields if name != "steps"}
    return TaskView(**shown, steps=task.planned["steps"])


def job_view(job: Job, tasks: list[TaskView], runs: list[RunView]) -> JobView:
    """Show a job with its parts."""
    summary = JobSummary.model_validate(job).model_dump()
    return JobView(**summary, spec=job.spec, tasks=tasks, runs=runs)


VERSIONS = select(
    *(
        getattr(AdapterVersion, name, AdapterVersion.manifest[name]).label(name)
        for name in VersionView.model_fields
    )
)
"""What is shown of versions; a whole manifest, which names every file, is several times as long."""


def version_view(row: Row[Any]) -> VersionView:
    """Show a row of VERSIONS; the manifest was validated when it became a version."""
    return VersionView(**{name: value for name, value in row._mapping.items() if value is not None})
