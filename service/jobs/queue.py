"""Which runs wait, which of them take the free places, and which are late.

Ray can neither cancel nor delete a job that waits for resources, so runs wait here and not in Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.orm import Session, aliased

from service.db.tables import Job, Run
from service.jobs.states import AT_WORK_RUN_STATES, UNFINISHED_RUN_STATES, RunState

_NEVER = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class WaitingRun:
    """A queued run that may start now."""

    run_id: str
    owner: str
    priority: int
    has_started: bool
    """It lost its place with a failed attempt."""
    created_at: datetime


def choose(
    waiting: Sequence[WaitingRun],
    *,
    num_free: int,
    at_work: Mapping[str, int],
    last_started: Mapping[str, datetime],
) -> list[str]:
    """Return the ids of the runs that start now, in order.

    A place goes to the owner with the fewest runs at work, among equals to the one who waited longest since
    a run of theirs started. Of that owner's runs, those that had started before go first, then the highest
    priority, then the oldest. at_work: owner -> runs that have a place; last_started: owner -> time.
    """
    of_owner: dict[str, list[WaitingRun]] = {}
    for run in sorted(waiting, key=_order_of_own, reverse=True):
        of_owner.setdefault(run.owner, []).append(run)
    busy, started = Counter(at_work), dict(last_started)
    chosen: list[str] = []
    while len(chosen) < num_free and of_owner:
        owner = min(
            of_owner,
            key=lambda name: (busy[name], started.get(name, _NEVER), _order_of_own(of_owner[name][-1])),
        )
        chosen.append(of_owner[owner].pop().run_id)
        busy[owner] += 1
        started[owner] = datetime.max.replace(tzinfo=UTC)
        if not of_owner[owner]:
            del of_owner[owner]
    return chosen


def _order_of_own(run: WaitingRun) -> tuple[bool, int, datetime, str]:
    return (not run.has_started, -run.priority, run.created_at, run.run_id)


def owners_at_work(session: Session) -> Sequence[str]:
    """Return the owner of every run that has a place."""
    wanted = select(Job.owner).join(Run, Run.job_id == Job.id).where(Run.state.in_(AT_WORK_RUN_STATES))
    return session.scalars(wanted).all()


def _is_first() -> ColumnElement[bool]:
    """Has the run's job no earlier unfinished run?"""
    earlier = aliased(Run)
    return ~exists().where(
        earlier.job_id == Run.job_id,
        earlier.number < Run.number,
        earlier.state.in_(UNFINISHED_RUN_STATES),
    )


def runs_that_can_start(session: Session, now: datetime, *, most: int) -> list[WaitingRun]:
    """Return the queued runs whose job has no earlier unfinished run and whose back-off is over.

    Of each owner the first `most` only, in the order of choose(): thousands may wait.
    """
    order = (Run.started_at.is_(None), Job.priority.desc(), Run.created_at, Run.id)
    place = func.row_number().over(partition_by=Job.owner, order_by=order)
    ranked = (
        select(Run.id, Job.owner, Job.priority, Run.started_at, Run.created_at, place.label("place"))
        .join(Job, Run.job_id == Job.id)
        .where(Run.state == RunState.QUEUED, _is_first())
        .where((Run.not_before.is_(None)) | (Run.not_before <= now))
        .subquery()
    )
    return [
        WaitingRun(
            run_id=row.id,
            owner=row.owner,
            priority=row.priority,
            has_started=row.started_at is not None,
            created_at=row.created_at,
        )
        for row in session.execute(select(ranked).where(ranked.c.place <= most))
    ]


def last_started(session: Session) -> dict[str, datetime]:
    """Return when each owner's newest run started."""
    wanted = (
        select(Job.owner, func.max(Run.started_at))
        .join(Run, Run.job_id == Job.id)
        .where(Run.started_at.is_not(None))
        .group_by(Job.owner)
    )
    return {owner: started for owner, started in session.execute(wanted) if started is not None}


def late_runs(session: Session, now: datetime) -> Sequence[Run]:
    """Return the runs past their deadline that nobody has asked to end.

    One that waits for an earlier run of its job is not judged before its turn: the job's tasks are trained in
    their order, and while the earlier run is paused, time does not count for either.
    """
    states = UNFINISHED_RUN_STATES - {RunState.CANCELLING, RunState.PAUSED}
    wanted = select(Run).where(Run.state.in_(states), Run.deadline_at < now, _is_first())
    return session.scalars(wanted).all()
