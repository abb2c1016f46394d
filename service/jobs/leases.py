"""A lease: of several processes that could do a work, one does it, and a stopped one notices that it lost it.

The holder renews its lease while it works. Its token grows with every new holder and is checked inside each
of the holder's transactions, so that what a frozen holder writes after it was replaced is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.db.session import Sessions
from service.db.tables import LeaseRow, utc_now

RECONCILER = "reconciler"
"""The only lease."""


class LeaseLost(RuntimeError):
    """Another process holds the lease now: what this one wanted to write is not written."""


@dataclass(frozen=True)
class Lease:
    """A lease as its holder knows it."""

    name: str
    holder: str
    token: int
    expires_at: datetime
    """By this process's clock."""

    def needs_renewal(self, ttl: timedelta) -> bool:
        """Is less than half of its time left?"""
        return self.expires_at - utc_now() < ttl / 2


def acquire(session: Session, name: str, holder: str, ttl: timedelta) -> Lease | None:
    """Take a lease that is free or expired, or renew one's own; None while another process holds it.

    Times are the database's where it has a clock of its own, so that hosts need not agree.
    """
    asked_at = utc_now()
    row = session.get(LeaseRow, name, with_for_update=True, populate_existing=True)
    now = _database_time(session)
    if row is None:  # of two processes that come first, one fails here and tries again
        row = LeaseRow(name=name, holder="", token=0, expires_at=now)
        session.add(row)
    if row.holder != holder and row.expires_at > now:
        return None
    if row.holder != holder:
        row.holder, row.token = holder, row.token + 1
    row.expires_at = now + ttl
    # by the holder's own clock from before the question, so that it never believes too long
    return Lease(name, holder, row.token, asked_at + ttl)


def release(session: Session, lease: Lease) -> None:
    """Let the next process take the lease at once; nothing happens when it is lost already."""
    row = session.get_one(LeaseRow, lease.name, with_for_update=True, populate_existing=True)
    if row.token == lease.token:
        row.holder, row.expires_at = "", _database_time(session)


def check(session: Session, lease: Lease) -> None:
    """Raise LeaseLost unless the lease is still ours; nobody takes it before this transaction ends."""
    wanted = select(LeaseRow.token, LeaseRow.holder).where(LeaseRow.name == lease.name)
    found = session.execute(wanted.with_for_update(read=True)).one()
    if (found.token, found.holder) != (lease.token, lease.holder):
        raise LeaseLost(f"the lease {lease.name!r} went from {lease.holder} to {found.holder or 'nobody'}")


class FencedSessions(Sessions):
    """Sessions whose writes are refused once the lease is lost."""

    def __init__(self, sessions: Sessions, lease: Lease) -> None:
        super().__init__(sessions.engine, turn=sessions.turn)
        self._lease = lease

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a transaction that commits at the block's end. Raises LeaseLost before anything is done."""
        with super().write() as session:
            check(session, self._lease)
            yield session


def _database_time(session: Session) -> datetime:
    if session.get_bind().dialect.name == "postgresql":
        found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return found
    return utc_now()
