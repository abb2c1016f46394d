"""Open the database: the two kinds of transaction, on a schema that is up to date."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sqlalchemy import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from service.db import admin
from service.db.engines import BUSY_TIMEOUT_S, make_engine

_READ_ONLY = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


class Sessions:
    """Transactions of one database: read() sees one state, write() commits when its block ends."""

    def __init__(self, engine: Engine, *, turn: AbstractContextManager[object] | None = None) -> None:
        """turn: held by one of this process's writers at a time; sessions of one engine share it."""
        self.engine = engine
        self.turn = turn or (_Turn() if engine.dialect.name == "sqlite" else nullcontext())
        self._reading = {} if engine.dialect.name == "sqlite" else _READ_ONLY

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a transaction that changes nothing."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.connection(execution_options=self._reading)
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that commits at the block's end and rolls back on an error.

        In SQLite it takes the write lock at its start, so that what it read stays true until it writes. In
        PostgreSQL it sees what others commit meanwhile, and locks the rows that it must find unchanged.
        """
        with self.turn, Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.connection(execution_options={"clpeft_writes": True})
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


class _Turn:
    """A lock for the writers of one process, who queue here: SQLite lets them sleep and try again.

    SQLite's own lock is between processes; many threads on it wait ever longer while it is free.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=BUSY_TIMEOUT_S):
            raise PoolTimeout(f"the writers before this one took more than {BUSY_TIMEOUT_S} s")

    def __exit__(self, *_error: object) -> None:
        self._lock.release()


def open_database(url: str) -> Sessions:
    """Connect and bring the schema up to date.

    Raises DatabaseUrlError; SchemaError when a newer version has migrated the database; and SQLAlchemy's
    OperationalError when it does not answer.
    """
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            found = admin.schema_state(connection)
        if found.current != found.newest:
            admin.upgrade(url)
    except BaseException:
        engine.dispose()
        raise
    return Sessions(engine)
