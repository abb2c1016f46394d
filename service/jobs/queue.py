"""Which waiting runs take the free places: pure functions.

Ray can neither cancel nor delete a job that waits for resources, so runs wait here and not in Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

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
