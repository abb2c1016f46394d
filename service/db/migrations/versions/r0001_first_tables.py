"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    json_value = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("format", sa.String(255), nullable=False),
        sa.Column("num_rows", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(255), nullable=False),
        sa.Column("statistics", json_value, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
    )
    op.create_index(op.f("ix_datasets_name"), "datasets", ["name"])
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("adapter", sa.String(255), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(255), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("spec", json_value, nullable=False),
        sa.Column("base_model_path", sa.Text(), nullable=False),
        sa.Column("base_model_id", sa.String(255), nullable=False),
        sa.Column("labels", json_value, nullable=False),
        sa.Column("num_tasks", sa.Integer(), nullable=False),
        sa.Column("num_committed", sa.Integer(), nullable=False),
        sa.Column("progress", json_value, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("adapter", name=op.f("uq_jobs_adapter")),
    )
    op.create_index(op.f("ix_jobs_name"), "jobs", ["name"])
    op.create_index("ix_jobs_state_id", "jobs", ["state", "id"])
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("latest_version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_adapters_job_id")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_adapters")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapters_job_id")),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(255), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("task_indexes", json_value, nullable=False),
        sa.Column("attempts_without_commit", sa.Integer(), nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_runs_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("job_id", "number", name=op.f("uq_runs_job_id_number")),
    )
    op.create_index("ix_runs_state_id", "runs", ["state", "id"])
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("run_id", sa.String(255), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("task_index", sa.Integer(), nullable=False),
        sa.Column("task_name", sa.String(255), nullable=False),
        sa.Column("task_dir", sa.String(255), nullable=False),
        sa.Column("manifest", json_value, nullable=False),
        sa.Column("manifest_sha256", sa.String(255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name=op.f("fk_adapter_versions_adapter")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_adapter_versions_job_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_adapter_versions_run_id")),
        sa.PrimaryKeyConstraint("adapter", "version", name=op.f("pk_adapter_versions")),
        sa.UniqueConstraint("job_id", "task_index", name=op.f("uq_adapter_versions_job_id_task_index")),
    )
    op.create_table(
        "aliases",
        sa.Column("adapter", sa.String(255), nullable=False),
        sa.Column("alias", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name=op.f("fk_aliases_adapter")),
        sa.PrimaryKeyConstraint("adapter", "alias", name=op.f("pk_aliases")),
    )
    op.create_table(
        "attempts",
        sa.Column("run_id", sa.String(255), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("submission_id", sa.String(255), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(255), nullable=True),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_attempts_run_id")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_attempts")),
        sa.UniqueConstraint("submission_id", name=op.f("uq_attempts_submission_id")),
    )
    op.create_table(
        "events",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("run_id", sa.String(255), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("seq", sa.Integer(), nullable=True),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("type", sa.String(255), nullable=False),
        sa.Column("data", json_value, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_events_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_events")),
        sa.UniqueConstraint("run_id", "attempt", "seq", name=op.f("uq_events_run_id_attempt_seq")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"])
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(255), nullable=False),
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("run_id", sa.String(255), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("spec", json_value, nullable=False),
        sa.Column("planned", json_value, nullable=False),
        sa.Column("dataset_id", sa.String(255), nullable=False),
        sa.Column("eval_dataset_id", sa.String(255), nullable=False),
        sa.Column("state", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["dataset_id"], ["datasets.id"], name=op.f("fk_tasks_dataset_id")),
        sa.ForeignKeyConstraint(["eval_dataset_id"], ["datasets.id"], name=op.f("fk_tasks_eval_dataset_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_tasks_job_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_tasks_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("job_id", "index", name=op.f("uq_tasks_job_id_index")),
        sa.UniqueConstraint("job_id", "name", name=op.f("uq_tasks_job_id_name")),
    )
    op.create_index(op.f("ix_tasks_dataset_id"), "tasks", ["dataset_id"])
    op.create_index(op.f("ix_tasks_eval_dataset_id"), "tasks", ["eval_dataset_id"])
    op.create_index(op.f("ix_tasks_run_id"), "tasks", ["run_id"])


def downgrade() -> None:
    """Drop every table."""
    for table in (
        "tasks",
        "events",
        "attempts",
        "aliases",
        "adapter_versions",
        "runs",
        "adapters",
        "jobs",
        "datasets",
    ):
        op.drop_table(table)
