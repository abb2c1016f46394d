"""The database as such: URLs, hidden passwords, time limits, and a server that goes and comes back."""

from __future__ import annotations

import json
import logging
import sys
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.db import engines, postgresql
from service.db.engines import DatabaseUrlError, is_away, make_engine, parse_url
from service.db.session import Sessions, open_database
from service.db.tables import Dataset
from service.settings import Settings
from tests.service.control import Service, write_events
from tests.service.postgres import PASSWORD, PostgresServer


def dataset(name: str) -> Dataset:
    """A row that needs no other."""
    return Dataset(id=name, name=name, format="completion", num_rows=1, bytes=1, sha256="0", statistics={})


def num_datasets(sessions: Sessions) -> int:
    """Count the rows that dataset() made."""
    with sessions.read() as session:
        return int(session.scalar(text("SELECT count(*) FROM datasets")) or 0)


# ------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_way_to_name_postgresql_takes_psycopg(scheme: str) -> None:
    engine = make_engine(f"{scheme}://someone:secret@127.0.0.1:1/clpeft")
    assert (engine.dialect.name, engine.driver) == ("postgresql", "psycopg")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql+psycopg2://u:hunter2@h/d", r"begins with postgresql\+psycopg2://; allowed"),
        ("mysql://u:hunter2@h/d", "begins with mysql://; allowed"),
        ("postgresql://u:hunter2@h:port/d", "cannot be read"),
        ("hunter2", "cannot be read"),
        ("", "cannot be read"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(DatabaseUrlError, match=said) as raised:
        parse_url(url)
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_without_psycopg_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.db.postgresql")
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseUrlError, match=r"pip install 'cl-peft\[postgres\]'"):
        make_engine("postgresql://u:p@127.0.0.1:1/d")


def test_a_password_shows_nowhere(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    url = postgres.url("postgres")
    engine = make_engine(url)
    wrong = make_engine(url.replace(PASSWORD, "hunter2"))
    with pytest.raises(OperationalError, match="password authentication failed") as refused:
        wrong.connect()
    with engine.connect() as connection, pytest.raises(ProgrammingError) as failed:
        connection.execute(text("SELECT :value FROM nothing"), {"value": "a user's words"})
    monkeypatch.setenv("CLPEFT_DATABASE_URL", url)
    seen = [repr(engine), repr(refused.value), str(refused.value), str(failed.value), caplog.text]
    seen += [repr(Settings()), str(Settings())]
    for shown in seen:
        assert PASSWORD not in shown
        assert "hunter2" not in shown
        assert "a user's words" not in shown
    engine.dispose()


# ----------------------------------------------------------------------------------------------- transactions


def test_a_reader_sees_one_state_whatever_others_commit(sessions: Sessions) -> None:
    with sessions.read() as reader:
        assert reader.get(Dataset, "ds_1") is None
        with sessions.write() as writer:
            writer.add(dataset("ds_1"))
        assert reader.get(Dataset, "ds_1") is None
    assert num_datasets(sessions) == 1


def test_a_reader_writes_nothing(sessions: Sessions) -> None:
    def leave_it_uncommitted() -> None:
        with sessions.read() as session:
            session.add(dataset("ds_1"))
            session.flush()

    if sessions.engine.dialect.name == "postgresql":
        with pytest.raises(SQLAlchemyError, match="read-only transaction"):
            leave_it_uncommitted()
    else:
        leave_it_uncommitted()
    assert num_datasets(sessions) == 0


# ------------------------------------------------------------------------------------------------ time limits


def test_postgresql_ends_what_takes_too_long(postgres: PostgresServer, migrated_postgres: str) -> None:
    limits = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    ours = {"statement_timeout": "30s", "lock_timeout": "10s", "idle_in_transaction_session_timeout": "15s"}
    url = postgres.url(migrated_postgres)
    for given, expected in (
        (url, ours),
        (f"{url}?options=-c%20lock_timeout%3D2s", ours | {"lock_timeout": "2s"}),
    ):
        engine = make_engine(given)
        with engine.connect() as connection:
            assert {name: connection.scalar(text(f"SHOW {name}")) for name in limits} == expected
        engine.dispose()


def test_a_row_that_another_holds_is_waited_for_and_then_given_up(
    postgres: PostgresServer, migrated_postgres: str
) -> None:
    postgres.wipe(migrated_postgres)
    sessions = open_database(f"{postgres.url(migrated_postgres)}?options=-c%20lock_timeout%3D100ms")
    with sessions.write() as session:
        session.add(dataset("ds_1"))
    with sessions.write() as holder:
        holder.get(Dataset, "ds_1", with_for_update=True)
        with pytest.raises(OperationalError) as raised, sessions.write() as session:
            session.get(Dataset, "ds_1", with_for_update=True)
    assert is_away(raised.value)
    sessions.close()


def test_a_frozen_server_is_given_up_and_used_again_when_it_goes_on(
    postgres: PostgresServer, migrated_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.wipe(migrated_postgres)
    monkeypatch.setattr(postgresql, "ANSWER_TIMEOUT_S", 0.3)
    sessions = open_database(postgres.url(migrated_postgres))
    with sessions.write() as session:
        session.add(dataset("ds_1"))
        session.flush()
        with postgres.frozen(), pytest.raises(OperationalError) as raised:
            session.execute(text("SELECT 1"))
        assert is_away(raised.value)
        assert raised.value.connection_invalidated
        session.rollback()
    monkeypatch.undo()
    assert num_datasets(sessions) == 0  # the broken transaction left nothing
    sessions.close()


def test_an_error_of_ours_does_not_count_as_an_absent_database(sessions: Sessions) -> None:
    with pytest.raises(SQLAlchemyError) as raised, sessions.read() as session:
        session.execute(text("SELECT 1 FROM no_such_table"))
    assert not is_away(raised.value)


def test_a_full_pool_counts_as_an_absent_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POOL_SIZE", 1), ("MAX_OVERFLOW", 0), ("POOL_TIMEOUT_S", 0), ("BUSY_TIMEOUT_S", 0)):
        monkeypatch.setattr(engines, name, value)
    sessions = open_database(database_url)
    with sessions.read(), pytest.raises(PoolTimeout) as raised, sessions.read():
        pass
    assert is_away(raised.value)
    sessions.close()


# ---------------------------------------------------------------------------------------------- away and back


def test_connections_recover_by_themselves_when_the_server_is_back(
    postgres: PostgresServer, migrated_postgres: str
) -> None:
    postgres.wipe(migrated_postgres)
    sessions = open_database(postgres.url(migrated_postgres))
    with sessions.write() as session:
        session.add(dataset("ds_1"))
    with postgres.away(), pytest.raises(OperationalError) as raised:
        num_datasets(sessions)
    assert is_away(raised.value)
    assert num_datasets(sessions) == 1
    sessions.close()


def test_what_was_committed_survives_sigkill_of_the_server_and_what_was_not_is_gone(
    postgres: PostgresServer, migrated_postgres: str
) -> None:
    postgres.wipe(migrated_postgres)
    sessions = open_database(postgres.url(migrated_postgres))
    with sessions.write() as session:
        session.add(dataset("ds_1"))

    def die_inside() -> None:
        with sessions.write() as session:
            session.add(dataset("ds_2"))
            session.flush()
            postgres.kill()

    try:
        with pytest.raises(OperationalError) as raised:
            die_inside()
    finally:
        postgres.start()
    assert is_away(raised.value)
    assert num_datasets(sessions) == 1
    sessions.close()


def test_writers_of_one_row_wait_for_each_other(sessions: Sessions) -> None:
    with sessions.write() as session:
        session.add(dataset("ds_1"))

    def count_up() -> None:
        for _ in range(10):
            with sessions.write() as session:
                row = session.get(Dataset, "ds_1", with_for_update=True)
                assert row is not None
                row.num_rows += 1

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions.read() as session:
        row = session.get(Dataset, "ds_1")
        assert row is not None
        assert row.num_rows == 41


# ----------------------------------------------------------------------------------------------- odd values


def test_what_cannot_be_stored_is_replaced_alike_in_both_databases(sessions: Sessions) -> None:
    odd = "a\0b \ud800 \\u0000 é \U0001f600"
    kept = "a\ufffdb \ufffd \\u0000 é \U0001f600"
    numbers = {"nan": float("nan"), "inf": [float("-inf"), 1.5], "none": None}
    row = dataset(odd)
    row.statistics = {odd: odd, **numbers}
    with sessions.write() as session:
        session.add(row)
    with sessions.read() as session:
        found = session.get(Dataset, odd)
        assert found is not None
        assert (found.id, found.name) == (kept, kept)
        assert found.statistics == {kept: kept, "nan": None, "inf": [None, 1.5], "none": None}


def test_an_object_of_an_odd_name_is_not_found(service: Service) -> None:
    for path in ("/v1/jobs/%00", "/v1/datasets/a%00b", "/v1/adapters/%ed%a0%80", "/v1/runs/%00"):
        assert service.client.get(path).status_code == 404, path
    assert service.client.get("/v1/jobs", params={"after": "\0"}).status_code == 200


def test_a_job_with_odd_labels_is_stored(service: Service) -> None:
    body = json.dumps(service.job_body("one", labels={"a": "b\0"}))
    answer = service.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text
    assert service.job(answer.json()["id"])["labels"] == {"a": "b\ufffd"}


def test_odd_worker_events_are_taken_alike(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    run_id = job["runs"][0]["id"]
    write_events(
        service.storage, run_id, 1, 1, [("step", {"task": "one", "loss": float("nan"), "note": "\0\ud800"})]
    )
    service.storage.write_bytes(f"runs/{run_id}/a1/events/000000000002.jsonl", b'{"\x00\xff')
    write_events(service.storage, run_id, 1, 3, [("x" * 300, {})])
    service.reconciler.tick()
    seen = [
        event
        for event in service.client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
        if event["seq"] is not None
    ]
    assert [event["seq"] for event in seen] == [1, 2, 3]
    assert seen[0]["data"] == {"task": "one", "loss": None, "note": "\ufffd\ufffd"}
    assert [event["type"] for event in seen[1:]] == ["event.unreadable"] * 2
