"""The tables. A job's state and counters are kept in its row, so that a list of jobs reads one table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

JsonValue = JSON().with_variant(JSONB(), "postgresql")
DEFAULT_OWNER = "default"


def utc_now() -> datetime:
    """Return the time now, with its zone."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """A time with zone UTC; SQLite forgets the zone, so it is put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return (
            None
            if value is None
            else value.replace(tzinfo=UTC)
            if value.tzinfo is None
            else value.astimezone(UTC)
        )


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        datetime: UtcDateTime,
        dict[str, Any]: JsonValue,
        list[Any]: JsonValue,
        str: String(255),
    }


class Dataset(Table):
    """Uploaded rows; the rows themselves are in storage."""

    __tablename__ = "datasets"
    __table_args__ = (
        Index("ix_datasets_name_id", "name", "id"),
        Index("ix_datasets_owner_bytes", "owner", "bytes"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    format: Mapped[str]
    """completion or messages."""
    num_rows: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    statistics: Mapped[dict[str, Any]]
    owner: Mapped[str] = mapped_column(default=DEFAULT_OWNER, server_default=DEFAULT_OWNER)
    """Who uploaded it."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Job(Table):
    """A growable sequence of tasks for one adapter."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_state_id", "state", "id"),
        Index("ix_jobs_owner", "owner"),
        Index("ix_jobs_base_model_id_num_committed", "base_model_id", "num_committed"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    adapter: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str]
    """That of the oldest unfinished run, else of the latest."""
    reason: Mapped[str | None]
    message: Mapped[str | None] = mapped_column(Text)
    spec: Mapped[dict[str, Any]]
    """The JobSpec as given, defaults filled in; appended tasks are in the tasks table."""
    base_model_path: Mapped[str] = mapped_column(Text)
    base_model_id: Mapped[str]
    labels: Mapped[dict[str, Any]]
    owner: Mapped[str] = mapped_column(default=DEFAULT_OWNER, server_default=DEFAULT_OWNER)
    """Who submitted it: places are shared fairly between owners."""
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    """Among the owner's own jobs, the higher one starts first."""
    num_tasks: Mapped[int]
    num_committed: Mapped[int] = mapped_column(default=0)
    progress: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """The newest step event's data of the run at work."""
    last_event: Mapped[int] = mapped_column(default=0, server_default="0")
    """The newest event's id."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
    finished_at: Mapped[datetime | None]


class Run(Table):
    """One execution of tasks that are fixed at its creation."""

    __tablename__ = "runs"
    __table_args__ = (
        UniqueConstraint("job_id", "number"),
        Index("ix_runs_state_deadline_at", "state", "deadline_at"),
        Index("ix_runs_cleaned_at_finished_at", "cleaned_at", "finished_at"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    """1 for the job's first run."""
    state: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str | None] = mapped_column(Text)
    task_indexes: Mapped[list[Any]]
    attempts_without_commit: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[datetime | None]
    """After a failed attempt: when the next one may begin."""
    deadline_at: Mapped[datetime | None]
    stop_requested_at: Mapped[datetime | None]
    """When it was asked to pause or to end."""
    paused_at: Mapped[datetime | None]
    cleaned_at: Mapped[datetime | None]
    """When the files that nobody needs any more were removed."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Task(Table):
    """One task of a job, and the run that trains it."""

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("job_id", "index"), UniqueConstraint("job_id", "name"))
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    index: Mapped[int]
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    planned: Mapped[dict[str, Any]]
    """The PlannedTask."""
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    eval_dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    state: Mapped[str]
    version: Mapped[int | None]


class Attempt(Table):
    """One Ray job of a run."""

    __tablename__ = "attempts"
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str | None] = mapped_column(Text)
    last_seq: Mapped[int] = mapped_column(default=0)
    """Newest event of the workers that was read."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[datetime | None]


class Event(Table):
    """What happened to a job. The id counts the job's events from 1, without a gap; rows never change."""

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("run_id", "attempt", "seq"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id"))
    attempt: Mapped[int | None]
    seq: Mapped[int | None]
    """Number within the attempt; None for the control plane's own events."""
    time: Mapped[datetime] = mapped_column(default=utc_now)
    type: Mapped[str]
    data: Mapped[dict[str, Any]]


class Metric(Table):
    """What one optimizer step measured; a step that is trained again replaces its row."""

    __tablename__ = "metrics"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    task_index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    time: Mapped[datetime]
    data: Mapped[dict[str, Any]]


class LeaseRow(Table):
    """Who may do a work that one process does at a time; the token grows with every new holder."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    token: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[datetime]


class Adapter(Table):
    """An adapter with at least one version."""

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    latest_version: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class AdapterVersion(Table):
    """An immutable version: the adapter after one task."""

    __tablename__ = "adapter_versions"
    __table_args__ = (UniqueConstraint("job_id", "task_index"),)
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    attempt: Mapped[int]
    task_index: Mapped[int]
    task_name: Mapped[str]
    task_dir: Mapped[str]
    manifest: Mapped[dict[str, Any]]
    manifest_sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Of all its files."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Alias(Table):
    """A name that points at one version of an adapter and can be moved."""

    __tablename__ = "aliases"
    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)
