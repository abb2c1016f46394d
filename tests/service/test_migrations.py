"""Schema revisions on both databases: up and down step by step with data, together, and from the future."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from service.db import admin
from service.db.admin import BASE, SchemaError, current, downgrade, upgrade
from service.db.engines import make_engine
from service.db.session import open_database
from service.db.tables import Table
from service.jobs.leases import RECONCILER, acquire, release
from tests.service.first_rows import FIRST_ROWS
from tests.service.postgres import PostgresServer

REVISIONS = [
    script.revision for script in ScriptDirectory.from_config(admin._config()).walk_revisions(BASE, "heads")
][::-1]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database of its own, without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'own.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    yield server.create("own")
    server.drop("own")


def tables(url: str) -> MetaData:
    """What tables a database has now."""
    engine, found = make_engine(url), MetaData()
    found.reflect(engine)
    engine.dispose()
    return found


def schema(url: str) -> dict[str, Any]:
    """Columns, keys and indexes of every table, comparable."""
    engine = make_engine(url)
    look = inspect(engine)
    found = {
        name: {
            "columns": [(c["name"], str(c["type"]), c["nullable"]) for c in look.get_columns(name)],
            "primary": look.get_pk_constraint(name)["constrained_columns"],
            "foreign": sorted(
                (k["constrained_columns"], k["referred_table"]) for k in look.get_foreign_keys(name)
            ),
            "unique": sorted(k["column_names"] for k in look.get_unique_constraints(name)),
            "indexes": sorted((i["name"] or "", i["column_names"]) for i in look.get_indexes(name)),
        }
        for name in look.get_table_names()
    }
    engine.dispose()
    return found


def test_the_migrations_make_exactly_the_tables_of_the_code(url: str) -> None:
    for _ in range(2):  # the second opening finds an upgraded schema
        sessions = open_database(url)
        with sessions.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            assert compare_metadata(context, Table.metadata) == []
        sessions.close()
    assert current(url) == admin.SchemaState(REVISIONS[-1], REVISIONS[-1])


def test_nothing_goes_down_while_a_reconciler_works(url: str) -> None:
    sessions = open_database(url)
    with sessions.write() as session:
        lease = acquire(session, RECONCILER, "me", timedelta(minutes=1))
    assert lease is not None
    with pytest.raises(SchemaError, match="a reconciler works on this database; stop every process"):
        downgrade(url, BASE)
    assert current(url).current == REVISIONS[-1]
    with sessions.write() as session:
        release(session, lease)
    sessions.close()
    assert downgrade(url, REVISIONS[0]).current == REVISIONS[0]


def test_each_step_down_gives_back_exactly_the_schema_before_it(url: str) -> None:
    before = {BASE: schema(url)}
    for revision in REVISIONS:
        assert upgrade(url, revision).current == revision
        before[revision] = schema(url)
    before[BASE] = {"alembic_version": before[REVISIONS[0]]["alembic_version"]}
    for revision in [BASE, *REVISIONS[:-1]][::-1]:
        assert downgrade(url, "-1").current == revision
        assert schema(url) == before[revision]
    assert upgrade(url).current == REVISIONS[-1]
    assert schema(url) == before[REVISIONS[-1]]


RENAMED = {"runs": {"stop_requested_at": "cancel_requested_at"}}
"""Columns of the first tables that later revisions call otherwise."""


def rows(url: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of the first revision's tables, only its columns, events in their jobs' order without ids."""
    engine, found = make_engine(url), {}
    known = tables(url).tables
    with engine.connect() as connection:
        for name, given in FIRST_ROWS.items():
            table = known[name]
            keys = ["job_id", "id"] if name == "events" else [column.name for column in table.primary_key]
            kept = [column for column in table.c if column.name in given[0]]
            old_names = RENAMED.get(name, {})
            kept += [table.c[new].label(old) for new, old in old_names.items() if new in table.c]
            read = connection.execute(select(*kept).order_by(*(table.c[key] for key in keys))).mappings()
            found[name] = [_plain(row, {"id"} if name == "events" else set()) for row in read]
    engine.dispose()
    return found


def _plain(row: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    return {
        key: value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value
        for key, value in row.items()
        if key not in left_out
    }


def fill(url: str) -> None:
    """Store FIRST_ROWS in a database of the first revision."""
    engine, known = make_engine(url), tables(url).tables
    with engine.begin() as connection:
        for name, given in FIRST_ROWS.items():
            connection.execute(insert(known[name]), given)
    engine.dispose()


def test_rows_survive_every_step_up_and_down(url: str) -> None:
    upgrade(url, REVISIONS[0])
    fill(url)
    events = sorted(FIRST_ROWS["events"], key=lambda row: (row["job_id"], row["id"]))
    expected = FIRST_ROWS | {"events": [_plain(row, {"id"}) for row in events]}
    assert rows(url) == expected
    for revision in REVISIONS[1:]:
        upgrade(url, revision)
        assert rows(url) == expected
    for revision in REVISIONS[-2::-1]:
        downgrade(url, revision)
        assert rows(url) == expected
    upgrade(url)
    assert rows(url) == expected


def test_processes_that_start_together_find_one_whole_schema(url: str) -> None:
    code = "import sys; from service.db.session import open_database; open_database(sys.argv[1]).close()"
    starts = [
        subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [(start.communicate()[1], start.returncode) for start in starts] == [("", 0)] * 3
    assert current(url).current == REVISIONS[-1]


def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(url: str) -> None:
    upgrade(url)
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = schema(url)
    for attempt in (open_database, current, upgrade, lambda url: downgrade(url, "-1")):
        with pytest.raises(SchemaError, match=rf"9999.*newest is {REVISIONS[-1]}.*clpeft db downgrade"):
            attempt(url)
    assert schema(url) == before
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


@pytest.mark.parametrize("direction", [upgrade, downgrade])
def test_an_unknown_revision_is_refused(url: str, direction: Callable[[str, str], object]) -> None:
    upgrade(url)
    with pytest.raises(SchemaError, match="no-such"):
        direction(url, "no-such")
    assert current(url).current == REVISIONS[-1]


def test_a_migration_that_fails_leaves_everything_as_it_was(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(url, REVISIONS[0])
    fill(url)
    before = schema(url)
    whole_upgrade = command.upgrade

    def fail_at_the_end(config: Config, revision: str) -> None:
        whole_upgrade(config, revision)
        config.attributes["connection"].execute(text("SELECT 1 FROM no_such_table"))

    monkeypatch.setattr(command, "upgrade", fail_at_the_end)
    with pytest.raises(SQLAlchemyError, match="no_such_table"):
        upgrade(url)
    assert schema(url) == before
    assert current(url).current == REVISIONS[0]


def test_a_migration_of_sqlite_that_breaks_a_reference_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    upgrade(url, REVISIONS[0])
    fill(url)

    def lose_a_row(config: Config, _revision: str) -> None:
        config.attributes["connection"].execute(text("DELETE FROM datasets"))

    monkeypatch.setattr(command, "upgrade", lose_a_row)
    with pytest.raises(SchemaError, match="rows of tasks would point at rows that do not exist"):
        upgrade(url)
    assert [row["id"] for row in rows(url)["datasets"]] == ["ds_1"]
