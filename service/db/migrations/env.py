"""Alembic's entry: runs the migrations on the connection that open_database passes."""

from __future__ import annotations

from alembic import context

from service.db.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite cannot alter columns in place
)
with context.begin_transaction():
    context.run_migrations()
