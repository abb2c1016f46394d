"""Queue, pause, deadlines, leases and metrics; events are numbered per job; what is final cannot change.

Existing events keep their order and are numbered anew from 1 in each job: a client's Last-Event-ID from
before the upgrade means nothing after it.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from service.db.migrations.triggers import create_triggers, drop_triggers

revision = "0002"
down_revision = "0001"

JSON_VALUE = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
TIME = sa.DateTime(timezone=True)
INDEXES = (
    ("ix_datasets_name_id", "datasets", ["name", "id"]),
    ("ix_datasets_owner_bytes", "datasets", ["owner", "bytes"]),
    ("ix_jobs_owner", "jobs", ["owner"]),
    ("ix_jobs_base_model_id_num_committed", "jobs", ["base_model_id", "num_committed"]),
    ("ix_runs_state_deadline_at", "runs", ["state", "deadline_at"]),
    ("ix_runs_cleaned_at_finished_at", "runs", ["cleaned_at", "finished_at"]),
)
EVENT_FIELDS = "run_id, attempt, seq, time, type, data"


def upgrade() -> None:
    """Add columns and tables, number the events anew, protect final rows."""
    op.add_column("jobs", sa.Column("owner", sa.String(255), nullable=False, server_default="default"))
    op.add_column("datasets", sa.Column("owner", sa.String(255), nullable=False, server_default="default"))
    op.add_column("adapter_versions", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    _count_bytes()
    op.add_column("jobs", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("last_event", sa.Integer(), nullable=False, server_default="0"))
    for name in ("not_before", "deadline_at", "paused_at", "cleaned_at"):
        op.add_column("runs", sa.Column(name, TIME, nullable=True))
    op.execute("ALTER TABLE runs RENAME COLUMN cancel_requested_at TO stop_requested_at")
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("task_index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("time", TIME, nullable=False),
        sa.Column("data", JSON_VALUE, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metrics_job_id")),
        sa.PrimaryKeyConstraint("job_id", "task_index", "step", name=op.f("pk_metrics")),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("holder", sa.String(255), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    _rebuild_events(
        sa.Column("job_id", sa.String(255), nullable=False),
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        key=("job_id", "id"),
        number="row_number() OVER (PARTITION BY job_id ORDER BY id)",
    )
    for name in ("ix_datasets_name", "ix_runs_state_id"):
        op.drop_index(name)
    for name, table, columns in INDEXES:
        op.create_index(name, table, columns)
    op.execute("UPDATE jobs SET last_event = (SELECT count(*) FROM events WHERE events.job_id = jobs.id)")
    create_triggers()


def downgrade() -> None:
    """Go back to events that are numbered over all jobs; paused runs become cancelled ones."""
    drop_triggers()
    op.execute("UPDATE runs SET state = 'cancelled', message = 'was paused' WHERE state = 'paused'")
    op.execute("UPDATE runs SET state = 'cancelling' WHERE state = 'pausing'")
    op.execute("UPDATE jobs SET state = 'cancelled', message = 'was paused' WHERE state = 'paused'")
    op.execute("UPDATE jobs SET state = 'cancelling' WHERE state = 'pausing'")
    op.execute("UPDATE attempts SET state = 'cancelled' WHERE state = 'paused'")
    _rebuild_events(
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("job_id", sa.String(255), nullable=False),
        key=("id",),
        number="row_number() OVER (ORDER BY time, job_id, id)",
    )
    op.create_index("ix_events_job_id_id", "events", ["job_id", "id"])
    if _is_postgres():
        op.execute("SELECT setval('events_id_seq', (SELECT coalesce(max(id), 0) + 1 FROM events), false)")
    for name, table, _ in INDEXES:
        op.drop_index(name, table)
    op.create_index("ix_datasets_name", "datasets", ["name"])
    op.create_index("ix_runs_state_id", "runs", ["state", "id"])
    op.drop_table("leases")
    op.drop_table("metrics")
    op.execute("ALTER TABLE runs RENAME COLUMN stop_requested_at TO cancel_requested_at")
    for name in ("not_before", "deadline_at", "paused_at", "cleaned_at"):
        op.execute(f"ALTER TABLE runs DROP COLUMN {name}")
    for name in ("owner", "priority", "last_event"):
        op.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
    op.execute("ALTER TABLE datasets DROP COLUMN owner")
    op.execute("ALTER TABLE adapter_versions DROP COLUMN bytes")


def _is_postgres() -> bool:
    return op.get_bind().dialect.name == "postgresql"


def _count_bytes() -> None:
    """Fill in how large each version's files are."""
    versions = sa.table(
        "adapter_versions",
        *(sa.column(name, type_) for name, type_ in (("adapter", sa.String), ("version", sa.Integer))),
        sa.column("manifest", JSON_VALUE),
        sa.column("bytes", sa.BigInteger),
    )
    connection = op.get_bind()
    for row in connection.execute(
        sa.select(versions.c.adapter, versions.c.version, versions.c.manifest)
    ).all():
        num_bytes = sum(file["bytes"] for file in row.manifest.get("files", {}).values())
        this = (versions.c.adapter == row.adapter) & (versions.c.version == row.version)
        connection.execute(versions.update().where(this).values(bytes=num_bytes))


def _rebuild_events(*columns: sa.Column[object], key: tuple[str, ...], number: str) -> None:
    """Put the events into a new table of this key; `number` is the SQL of their new ids."""
    op.execute("ALTER TABLE events RENAME TO old_events")
    if _is_postgres():  # names of constraints are the schema's there, and the new table takes them
        for name in ("pk_events", "uq_events_run_id_attempt_seq", "fk_events_job_id", "fk_events_run_id"):
            op.execute(f"ALTER TABLE old_events RENAME CONSTRAINT {name} TO old_{name}")
        op.execute("ALTER SEQUENCE IF EXISTS events_id_seq RENAME TO old_events_id_seq")
    op.create_table(
        "events",
        *columns,
        sa.Column("run_id", sa.String(255), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("seq", sa.Integer(), nullable=True),
        sa.Column("time", TIME, nullable=False),
        sa.Column("type", sa.String(255), nullable=False),
        sa.Column("data", JSON_VALUE, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_events_run_id")),
        sa.PrimaryKeyConstraint(*key, name=op.f("pk_events")),
        sa.UniqueConstraint("run_id", "attempt", "seq", name=op.f("uq_events_run_id_attempt_seq")),
        **({"sqlite_autoincrement": True} if key == ("id",) else {}),
    )
    op.execute(
        f"INSERT INTO events (job_id, id, {EVENT_FIELDS}) "
        f"SELECT job_id, {number}, {EVENT_FIELDS} FROM old_events"
    )
    op.drop_table("old_events")
