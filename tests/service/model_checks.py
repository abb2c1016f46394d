"""What must hold in the database and in storage whatever happens: the invariants of the model-based test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters.storage import Storage, desired_key
from service.db.session import Sessions
from service.db.tables import AdapterVersion, Attempt, Event, Job, Run, Table, Task, utc_now
from service.jobs import repository
from service.jobs.states import (
    AT_WORK_RUN_STATES,
    FINAL_ATTEMPT_STATES,
    FINAL_RUN_STATES,
    UNFINISHED_RUN_STATES,
    Reason,
    RunState,
    TaskState,
)
from tests.service.lying_runner import LyingRunner

MAY_CHANGE = {"cleaned_at", "last_seq"}
"""Of a final row: when its files were removed, and how far the events of an ended attempt were read."""


class Checks:
    """Checks a database again and again and remembers which rows were final."""

    def __init__(self, sessions: Sessions, storage: Storage, runner: LyingRunner, max_runs: int) -> None:
        self._sessions, self._storage, self._runner, self._max_runs = sessions, storage, runner, max_runs
        self._final: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}

    def check(self) -> None:
        """Check everything that holds after every step."""
        with self._sessions.read() as session:
            rows = {table: session.scalars(select(table)).all() for table in (Run, Attempt, Task, Event)}
            jobs = session.scalars(select(Job)).all()
            versions = session.scalars(select(AdapterVersion).order_by(AdapterVersion.version)).all()
        runs: dict[str, list[Run]] = defaultdict(list)
        for run in sorted(rows[Run], key=lambda run: run.number):
            runs[run.job_id].append(run)
        self._final_rows_stay([*rows[Run], *rows[Attempt], *rows[Task], *rows[Event], *versions])
        _one_live_attempt_per_run(rows[Run], rows[Attempt])
        assert sum(run.state in AT_WORK_RUN_STATES for run in rows[Run]) <= self._max_runs
        for job in jobs:
            _shows_the_right_run(job, runs[job.id])
            ids = sorted(event.id for event in rows[Event] if event.job_id == job.id)
            assert ids == list(range(1, job.last_event + 1)), f"event ids of {job.name}"
            tasks = [task for task in rows[Task] if task.job_id == job.id]
            self._one_chain_of_versions(tasks, [row for row in versions if row.job_id == job.id])
        worker_events = [(event.run_id, event.attempt, event.seq) for event in rows[Event] if event.seq]
        assert len(set(worker_events)) == len(worker_events)

    def check_after_tick(self) -> None:
        """Check what one undisturbed look at everything brings about."""
        for job in self._runner.all_jobs():
            driver, newest = job.driver, self._runner.started.get(job.driver.run_id, 0)
            if driver.attempt < newest:
                desired = self._storage.read_json(desired_key(driver.run_id))
                assert desired["attempt"] > driver.attempt, f"a{driver.attempt} is not fenced from a{newest}"
        with self._sessions.read() as session:
            num_at_work = len(repository.runs_in(session, AT_WORK_RUN_STATES))
            for run in repository.runs_in(session, {RunState.QUEUED}):
                _wait_is_explained(session, run, has_free_place=num_at_work < self._max_runs)

    def _final_rows_stay(self, rows: Sequence[Table]) -> None:
        found = {}
        for row in rows:
            mapper = type(row).__mapper__
            values = {
                column.key: getattr(row, column.key)
                for column in mapper.column_attrs
                if column.key not in MAY_CHANGE
            }
            key = (type(row).__tablename__, tuple(mapper.primary_key_from_instance(row)))
            if _is_final(row):
                found[key] = values
            if key in self._final:
                assert values == self._final[key], f"{key} was final"
        assert self._final.keys() <= found.keys(), "final rows are gone"
        self._final = found

    def _one_chain_of_versions(self, tasks: Sequence[Task], versions: Sequence[AdapterVersion]) -> None:
        committed = {task.index: task.version for task in tasks if task.state == TaskState.COMMITTED}
        assert committed == {row.task_index: row.version for row in versions}
        parent = None
        for number, row in enumerate(versions):
            assert (row.version, row.task_index) == (number + 1, number), "versions in task order, no gap"
            assert row.manifest["parent_dir"] == parent, f"parent of version {row.version}"
            assert self._storage.exists(f"{row.task_dir}/manifest.json")
            parent = row.task_dir


def _is_final(row: Table) -> bool:
    match row:
        case Run():
            return row.state in FINAL_RUN_STATES
        case Attempt():
            return row.state in FINAL_ATTEMPT_STATES
        case Task():
            return row.state == TaskState.COMMITTED
    return True  # versions and events


def _one_live_attempt_per_run(runs: Sequence[Run], attempts: Sequence[Attempt]) -> None:
    live = defaultdict(list)
    for attempt in attempts:
        if attempt.state not in FINAL_ATTEMPT_STATES:
            live[attempt.run_id].append(attempt.number)
    for run in runs:
        expected = 1 if run.state in AT_WORK_RUN_STATES else 0
        assert len(live[run.id]) == expected, f"{run.state} run has live attempts {live[run.id]}"
        numbers = sorted(attempt.number for attempt in attempts if attempt.run_id == run.id)
        assert live[run.id] in ([], numbers[-1:])


def _shows_the_right_run(job: Job, runs: Sequence[Run]) -> None:
    unfinished = [run for run in runs if run.state in UNFINISHED_RUN_STATES]
    shown = unfinished[0] if unfinished else [run for run in runs if run.reason != Reason.PARENT_FAILED][-1]
    assert (job.state, job.reason, job.message) == (shown.state, shown.reason, shown.message)
    assert (job.finished_at is None) == bool(unfinished)
    assert all(run.state == RunState.QUEUED for run in unfinished[1:])


def _wait_is_explained(session: Session, run: Run, *, has_free_place: bool) -> None:
    """Is what a waiting run says of its wait true?"""
    said = run.message or ""
    earlier = [
        other.number
        for other in repository.runs_of(session, run.job_id)
        if other.number < run.number and other.state in UNFINISHED_RUN_STATES
    ]
    if earlier:
        assert said == f"waits for run {earlier[-1]} of this job"
        return
    backs_off = run.not_before is not None and run.not_before > utc_now()
    assert backs_off or not has_free_place, f"{said!r}, but it could start"
    assert ("waits for a free place" in said) or (
        run.not_before is not None and "then for a free place" in said
    )
