"""Leases: one holder at a time, takeover after the end, and late writes that are refused."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from service.db.session import Sessions
from service.db.tables import LeaseRow, utc_now
from service.jobs.leases import RECONCILER, FencedSessions, Lease, LeaseLost, acquire, release

TTL = timedelta(seconds=60)


def take(sessions: Sessions, holder: str) -> Lease | None:
    """Ask for the reconciler's lease."""
    with sessions.write() as session:
        return acquire(session, RECONCILER, holder, TTL)


def holder_of(sessions: Sessions) -> str:
    """Who has the lease, as the database says."""
    with sessions.read() as session:
        return session.get_one(LeaseRow, RECONCILER).holder


def expire(sessions: Sessions) -> None:
    """The holder did not renew its lease in time."""
    with sessions.write() as session:
        session.get_one(LeaseRow, RECONCILER).expires_at = datetime(2000, 1, 1, tzinfo=UTC)


def write(sessions: Sessions, lease: Lease) -> None:
    """Write something under a lease; what is written is the lease's own expiry."""
    with FencedSessions(sessions, lease).write() as session:
        session.get_one(LeaseRow, RECONCILER).expires_at += timedelta(seconds=1)


def test_a_free_lease_is_taken_and_another_holder_waits(sessions: Sessions) -> None:
    lease = take(sessions, "a")
    assert lease is not None
    assert lease.token == 1
    assert take(sessions, "b") is None
    assert holder_of(sessions) == "a"


def test_renewal_keeps_the_token_and_moves_the_end(sessions: Sessions) -> None:
    first, second = take(sessions, "a"), take(sessions, "a")
    assert first is not None
    assert second is not None
    assert (second.token, second.holder) == (first.token, first.holder)
    assert second.expires_at > first.expires_at
    write(sessions, first)  # the older view of the same lease still counts


def test_a_lease_asks_for_renewal_in_the_second_half_of_its_time() -> None:
    now = utc_now()
    assert not Lease("l", "a", 1, now + TTL).needs_renewal(TTL)
    assert Lease("l", "a", 1, now + TTL / 4).needs_renewal(TTL)
    assert Lease("l", "a", 1, now - TTL).needs_renewal(TTL)


def test_an_expired_lease_is_taken_over_and_late_writes_are_refused(sessions: Sessions) -> None:
    old = take(sessions, "a")
    assert old is not None
    expire(sessions)
    write(sessions, old)  # expired, but nobody took over: still the only one
    expire(sessions)
    new = take(sessions, "b")
    assert new is not None
    assert new.token == old.token + 1
    with sessions.read() as session:
        before = session.get_one(LeaseRow, RECONCILER).expires_at
    with pytest.raises(LeaseLost, match="from a to b"):
        write(sessions, old)
    with sessions.read() as session:
        assert session.get_one(LeaseRow, RECONCILER).expires_at == before
    write(sessions, new)


def test_a_holder_that_gets_its_lease_back_has_a_new_token(sessions: Sessions) -> None:
    first = take(sessions, "a")
    expire(sessions)
    take(sessions, "b")
    expire(sessions)
    again = take(sessions, "a")
    assert first is not None
    assert again is not None
    assert again.token == first.token + 2
    with pytest.raises(LeaseLost):
        write(sessions, first)


def test_a_released_lease_is_free_at_once_and_its_old_holder_cannot_write(sessions: Sessions) -> None:
    old = take(sessions, "a")
    assert old is not None
    with sessions.write() as session:
        release(session, old)
    with pytest.raises(LeaseLost, match="nobody"):
        write(sessions, old)
    assert take(sessions, "b") is not None


def test_releasing_a_lost_lease_does_not_take_it_from_the_next_holder(sessions: Sessions) -> None:
    old = take(sessions, "a")
    assert old is not None
    expire(sessions)
    take(sessions, "b")
    with sessions.write() as session:
        release(session, old)
    assert holder_of(sessions) == "b"
    assert take(sessions, "c") is None


def test_of_many_that_ask_at_once_one_gets_it(sessions: Sessions) -> None:
    take(sessions, "first")
    expire(sessions)
    found: list[Lease | None] = []
    threads = [
        threading.Thread(target=lambda name=f"h{i}": found.append(take(sessions, name))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([lease for lease in found if lease is not None]) == 1
