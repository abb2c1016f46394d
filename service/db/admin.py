"""The schema's revisions: which one a database has, and the way up and down.

Every way is one transaction: it is done wholly or not at all, also in SQLite. Of several processes that start
together one migrates, and the others wait and find it done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import inspect, select, text
from sqlalchemy.engine import Connection

from service.db.engines import make_engine, parse_url
from service.db.tables import LeaseRow, utc_now

BASE = "base"
"""The revision of an empty database."""
_LOCK = 0x636C70656674
"""Number of the advisory lock under which PostgreSQL is migrated."""


class SchemaError(RuntimeError):
    """The schema cannot be used or changed as asked."""


@dataclass(frozen=True)
class SchemaState:
    """What a database has, and what this version of the code needs."""

    current: str
    """Revision of the database; "base" when it is empty."""
    newest: str


def schema_state(connection: Connection) -> SchemaState:
    """Read a database's revision. Raises SchemaError when a newer version of the code has migrated it."""
    scripts = ScriptDirectory.from_config(_config())
    current = MigrationContext.configure(connection).get_current_revision() or BASE
    newest = _newest(scripts)
    if current not in {BASE, *(script.revision for script in scripts.walk_revisions())}:
        raise SchemaError(
            f"the database has schema revision {current}, which this version of CL-PEFT does not know (its "
            f"newest is {newest}): a newer version has migrated it. Run that version, or with it "
            f"'clpeft db downgrade {newest}'"
        )
    return SchemaState(current, newest)


def current(url: str) -> SchemaState:
    """Look at a database and change nothing. Raises SchemaError, DatabaseUrlError."""
    parsed = parse_url(url)
    if parsed.drivername.startswith("sqlite") and not Path(str(parsed.database)).exists():
        return SchemaState(BASE, _newest(ScriptDirectory.from_config(_config())))
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            return schema_state(connection)
    finally:
        engine.dispose()


def upgrade(url: str, revision: str = "head") -> SchemaState:
    """Go up to a revision; return what the database has then. Raises SchemaError, DatabaseUrlError."""
    with _migration(url) as (connection, config):
        command.upgrade(config, revision)
        return schema_state(connection)


def downgrade(url: str, revision: str) -> SchemaState:
    """Go down to a revision; what only later ones hold is lost.

    "base" empties the database. Raises SchemaError, also while a reconciler works there, DatabaseUrlError.
    """
    with _migration(url) as (connection, config):
        _check_unused(connection)
        command.downgrade(config, revision)
        return schema_state(connection)


def _newest(scripts: ScriptDirectory) -> str:
    return scripts.get_current_head() or BASE


@contextmanager
def _migration(url: str) -> Iterator[tuple[Connection, Config]]:
    """Open the one transaction that may change the schema now."""
    engine = make_engine(url, migrates=True)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            schema_state(connection)
            config = _config()
            config.attributes["connection"] = connection
            try:
                yield connection, config
            except CommandError as error:
                raise SchemaError(str(error)) from error
            if connection.dialect.name == "sqlite":
                _check_foreign_keys(connection)
    finally:
        engine.dispose()


def _check_unused(connection: Connection) -> None:
    if not inspect(connection).has_table(LeaseRow.__tablename__):
        return
    held = select(LeaseRow.expires_at).where(LeaseRow.holder != "", LeaseRow.expires_at > utc_now())
    if connection.scalar(held) is not None:
        raise SchemaError(
            "a reconciler works on this database; stop every process of the service first. After a crash, "
            "its lease ends by itself within seconds (CLPEFT_LEASE_S)"
        )


def _check_foreign_keys(connection: Connection) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        tables = ", ".join(sorted({str(row[0]) for row in broken}))
        raise SchemaError(f"rows of {tables} would point at rows that do not exist; nothing was changed")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config
