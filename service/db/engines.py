"""Engines for the two databases: SQLite for one machine, PostgreSQL for several replicas."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.db.text import clean_parameters, to_json

BUSY_TIMEOUT_S = 30
"""How long SQLite waits for another writer."""
POOL_SIZE = 10
MAX_OVERFLOW = 10
"""Connections beyond the pool in a rush: one process holds at most 20."""
POOL_TIMEOUT_S = 10
_COMMON: dict[str, Any] = {"hide_parameters": True, "json_serializer": to_json}
_POSTGRESQL = ("postgresql", "postgresql+psycopg", "postgres")


class DatabaseUrlError(ValueError):
    """A database URL that cannot be used. The text never holds the URL, because a password may be in it."""


def make_engine(url: str, *, migrates: bool = False) -> Engine:
    """Make an engine; nothing is connected yet. A SQLite file's folder is made.

    With migrates its transactions may change tables: they take as long as they need, and in SQLite foreign
    keys are not checked before their end. Raises DatabaseUrlError.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(parsed, migrates=migrates)
    return _postgresql(parsed, migrates=migrates)


def parse_url(url: str) -> URL:
    """Read a URL and choose its driver. Raises DatabaseUrlError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number is a ValueError
        raise DatabaseUrlError(
            "the database URL cannot be read; it must be like sqlite:////path/clpeft.db or "
            "postgresql://user:password@host:5432/database, with %XX for special characters of the password"
        ) from None
    if parsed.drivername in _POSTGRESQL:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise DatabaseUrlError(
            f"the database URL begins with {parsed.drivername}://; allowed: sqlite://, postgresql://"
        )
    if parsed.database in (None, "", ":memory:"):
        raise DatabaseUrlError(
            f"database URL {url!r} names no file; a SQLite database needs one: sqlite:////path/clpeft.db"
        )
    return parsed


def is_away(error: SQLAlchemyError) -> bool:
    """Does the database not answer, or not now (restart, full pool, lock), so that a repeat can help?"""
    if isinstance(error, OperationalError):
        # SQLite also calls an unknown table or column by this name
        return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or isinstance(error, PoolTimeout)


# ----------------------------------------------------------------------------------------------------- SQLite


def _sqlite(url: URL, *, migrates: bool) -> Engine:
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        # Python's own transaction handling is off: our BEGIN below is the only one.
        connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
        execution_options={"clpeft_writes": migrates},
        **_COMMON,
        pool_size=POOL_SIZE,
        max_overflow=MAX_OVERFLOW,
        pool_timeout=BUSY_TIMEOUT_S,
    )

    def prepare(connection: Any, _record: Any) -> None:
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            # pages go back into the database every 16 MB, not every 4: most are written again meanwhile
            "wal_autocheckpoint=4000",
            # a migration makes a table anew and drops the old one, to which others still point
            f"foreign_keys={'OFF' if migrates else 'ON'}",
            f"busy_timeout={BUSY_TIMEOUT_S * 1000}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", _same_file(str(url.database)))
    event.listen(engine, "begin", _begin_sqlite)
    event.listen(engine, "before_cursor_execute", clean_parameters, retval=True)
    return engine


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("clpeft_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _same_file(path: str) -> Callable[[Connection], None]:
    """Refuse to work once the file was deleted or replaced: what is written then would be lost unseen."""
    first: list[tuple[int, int]] = []

    def check(_connection: Connection) -> None:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            found = None
        inode = (0, 0) if found is None else (found.st_dev, found.st_ino)
        if not first:
            first.append(inode)
        if inode != first[0]:
            said = f"the database file {path} was deleted or replaced; start the service again"
            raise OperationalError("BEGIN", None, sqlite3.OperationalError(said))

    return check


# ------------------------------------------------------------------------------------------------- PostgreSQL


def _postgresql(url: URL, *, migrates: bool) -> Engine:
    try:
        from service.db.postgresql import connect, connection_parameters
    except ImportError as error:
        raise DatabaseUrlError(
            f"a postgresql:// database needs psycopg: pip install 'cl-peft[postgres]' ({error})"
        ) from error
    engine = create_engine(
        url,
        connect_args=connection_parameters(url.query, migrates=migrates),
        **_COMMON,
        pool_size=POOL_SIZE,
        max_overflow=MAX_OVERFLOW,
        pool_timeout=POOL_TIMEOUT_S,
        pool_pre_ping=True,
    )

    def do_connect(_dialect: Dialect, _record: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return connect(*args, patient=migrates, **given)

    event.listen(engine, "do_connect", do_connect)
    event.listen(engine, "before_cursor_execute", clean_parameters, retval=True)
    return engine
