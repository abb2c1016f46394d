"""The database: schema, transactions, and the states that jobs and runs may take."""

from __future__ import annotations

import threading
from datetime import datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_mock_engine, select
from sqlalchemy.exc import IntegrityError

from service.db.session import Sessions, open_database
from service.db.tables import Dataset, Job, Run, Table, Task, utc_now
from service.jobs import repository
from service.jobs.events import add_event, events_after
from service.jobs.states import FINAL_RUN_STATES, RUN_CHANGES, RunState, change_state
from service.planner import KnownDataset, plan_tasks
from service.settings import Settings
from service.specs import BaseModelSpec, JobSpec, PlannedDataset, TaskSpec


@pytest.fixture
def job_id(sessions: Sessions) -> str:
    """A stored job of two tasks."""
    with sessions.write() as session:
        session.add(
            Dataset(
                id="ds_1", name="rows", format="completion", num_rows=8, bytes=1, sha256="0", statistics={}
            )
        )
        tasks = (TaskSpec(name="one", dataset="ds_1"), TaskSpec(name="two", dataset="ds_1"))
        spec = JobSpec(name="demo", base_model=BaseModelSpec(id="tiny"), tasks=tasks)
        known = KnownDataset(PlannedDataset(id="ds_1", path="p", sha256="0", num_rows=8), "completion")
        planned = plan_tasks(tasks, training=spec.training, datasets={"ds_1": known})
        return repository.create_job(session, spec, planned, base_model_path="/m").job.id


def test_the_migrations_make_exactly_the_tables_of_the_code(settings: Settings) -> None:
    for _ in range(2):  # the second opening finds an upgraded schema
        opened = open_database(settings.database_url)
    with opened.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    opened.close()


def test_every_table_has_a_form_in_postgresql() -> None:
    statements: list[str] = []

    def collect(statement: object, *_: object) -> None:
        statements.append(str(statement.compile(dialect=engine.dialect)))  # type: ignore[attr-defined]

    engine = create_mock_engine("postgresql+psycopg://", collect)
    Table.metadata.create_all(engine, checkfirst=False)
    text = "".join(statements)
    assert "JSONB" in text


def test_a_database_without_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="names no file"):
        open_database("sqlite://")


def test_a_failed_transaction_leaves_nothing(sessions: Sessions, job_id: str) -> None:
    def fail() -> None:
        with sessions.write() as session:
            add_event(session, job_id, "job.odd", {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with sessions.read() as session:
        assert "job.odd" not in [event.type for event in events_after(session, job_id, 0, 100)]


def test_writers_take_turns_and_none_is_lost(sessions: Sessions, job_id: str) -> None:
    def count_up() -> None:
        for _ in range(20):
            with sessions.write() as session:
                job = session.get_one(Job, job_id, with_for_update=True)
                job.num_committed = job.num_committed + 1

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sessions.read() as session:
        assert repository.get_job(session, job_id).num_committed == 80


def test_times_keep_their_zone_and_need_one(sessions: Sessions, job_id: str) -> None:
    with sessions.read() as session:
        created_at = repository.get_job(session, job_id).created_at
    assert abs((utc_now() - created_at).total_seconds()) < 60
    with pytest.raises(Exception, match="no time zone"), sessions.write() as session:
        repository.get_job(session, job_id).finished_at = datetime(2026, 1, 1)


def test_the_database_itself_refuses_a_second_event_of_one_number(sessions: Sessions, job_id: str) -> None:
    with sessions.read() as session:
        run_id = session.scalars(select(Run.id)).one()

    def add() -> None:
        with sessions.write() as session:
            add_event(session, job_id, "step", {}, run_id=run_id, attempt=1, seq=1)

    add()
    with pytest.raises(IntegrityError):
        add()


def test_a_task_needs_a_data_set_that_exists(sessions: Sessions, job_id: str) -> None:
    with pytest.raises(IntegrityError), sessions.write() as session:
        session.scalars(select(Task).where(Task.job_id == job_id, Task.index == 0)).one().dataset_id = "ds_x"


def test_an_ended_run_stays_as_it_is() -> None:
    for old in RunState:
        for new in set(RunState) - {old}:
            run = Run(state=old)
            if new in RUN_CHANGES[old]:
                change_state(run, "run_1", new)
                assert run.state == new
            else:
                with pytest.raises(ValueError, match=f"run_1 cannot go from {old} to {new}"):
                    change_state(run, "run_1", new)
                assert run.state == old
    assert [state for state in RunState if not RUN_CHANGES[state]] == sorted(
        FINAL_RUN_STATES, key=list(RunState).index
    )


def test_a_job_shows_its_oldest_unfinished_run_else_its_latest(sessions: Sessions, job_id: str) -> None:
    def states(session: object) -> tuple[str, list[str]]:
        job = session.get(Job, job_id)  # type: ignore[attr-defined]
        return job.state, [run.state for run in repository.runs_of(session, job_id)]  # type: ignore[arg-type]

    with sessions.write() as session:
        (first,) = repository.runs_of(session, job_id)
        known = KnownDataset(PlannedDataset(id="ds_1", path="p", sha256="0", num_rows=8), "completion")
        task = TaskSpec(name="three", dataset="ds_1")
        job = repository.get_job(session, job_id)
        spec = JobSpec.model_validate(job.spec)
        planned = plan_tasks([task], training=spec.training, datasets={"ds_1": known}, first_index=2)
        repository.append_tasks(session, job, [task], planned)
        repository.set_run_state(session, first, RunState.SUBMITTING)
        assert states(session) == ("submitting", ["submitting", "queued"])
        repository.set_run_state(session, first, RunState.RUNNING)
        repository.set_run_state(session, first, RunState.SUCCEEDED)
        assert states(session) == ("queued", ["succeeded", "queued"])
        assert job.finished_at is None
        second = repository.runs_of(session, job_id)[1]
        repository.set_run_state(session, second, RunState.SUBMITTING)
        repository.set_run_state(session, second, RunState.FAILED, reason="oom", message="no memory")
        assert states(session) == ("failed", ["succeeded", "failed"])
        assert (job.reason, job.message) == ("oom", "no memory")
        assert job.finished_at is not None
        repository.retry_job(session, job)
        assert states(session)[0] == "queued"
        assert job.finished_at is None
