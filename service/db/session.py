"""Open the database: the two kinds of transaction, on a schema that is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.db import admin
from service.db.engines import make_engine

_READ_ONLY = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


class Sessions:
    """Transactions of one database: read() sees one state, write() commits when its block ends."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
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
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            session.connection(execution_options={"clpeft_writes": True})
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


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
