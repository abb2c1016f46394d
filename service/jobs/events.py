"""Events of jobs: the control plane's own, and those that workers leave in storage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters.storage import Storage, events_key
from service.db.tables import Event, Job, utc_now

MAX_TYPE_CHARACTERS = 255
"""Width of the column."""
FINAL_JOB_EVENTS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


@dataclass(frozen=True)
class WorkerEvent:
    """One line of an event segment."""

    seq: int
    time: datetime
    type: str
    data: dict[str, Any]


def add_event(
    session: Session,
    job_id: str,
    kind: str,
    data: Mapping[str, Any],
    *,
    run_id: str | None = None,
    attempt: int | None = None,
    seq: int | None = None,
    time: datetime | None = None,
) -> None:
    """Append an event under the job's next number. The caller has locked the job (repository.lock_job)."""
    job = session.get_one(Job, job_id)
    session.add(next_event(job, kind, data, run_id=run_id, attempt=attempt, seq=seq, time=time))


def next_event(
    job: Job,
    kind: str,
    data: Mapping[str, Any],
    *,
    run_id: str | None = None,
    attempt: int | None = None,
    seq: int | None = None,
    time: datetime | None = None,
) -> Event:
    """Make the job's next event; the caller stores it. For a job that is new itself: else add_event."""
    job.last_event += 1
    return Event(
        job_id=job.id,
        id=job.last_event,
        run_id=run_id,
        attempt=attempt,
        seq=seq,
        time=time or utc_now(),
        type=kind,
        data=dict(data),
    )


def events_after(session: Session, job_id: str, after: int, limit: int) -> Sequence[Event]:
    """Return the job's next events by id."""
    wanted = select(Event).where(Event.job_id == job_id, Event.id > after).order_by(Event.id).limit(limit)
    return session.scalars(wanted).all()


def read_worker_events(storage: Storage, run_id: str, attempt: int, last_seq: int) -> list[WorkerEvent]:
    """Read the events after last_seq in order, up to the first gap.

    A line that cannot be read becomes an event of type event.unreadable under the same number, so that one
    bad line neither hides nor stops what follows.
    """
    found: list[WorkerEvent] = []
    for name in storage.names(events_key(run_id, attempt)):
        stem = name.removesuffix(".jsonl")
        if not stem.isdigit() or int(stem) <= last_seq:
            continue
        if int(stem) > last_seq + 1:
            break
        lines = storage.read_bytes(f"{events_key(run_id, attempt)}/{name}").splitlines()
        for line in lines:
            last_seq += 1
            found.append(_read_line(line, last_seq))
    return found


def _read_line(line: bytes, seq: int) -> WorkerEvent:
    try:
        value = json.loads(line, parse_constant=lambda _: None)  # JSON has no NaN: a lost loss is null
        if value["seq"] != seq:
            raise ValueError(f"seq is {value['seq']}, expected {seq}")
        if len(str(value["type"])) > MAX_TYPE_CHARACTERS:
            raise ValueError(f"type has more than {MAX_TYPE_CHARACTERS} characters")
        time = datetime.fromisoformat(value["time"]).astimezone(UTC)
        return WorkerEvent(seq, time, str(value["type"]), dict(value["data"]))
    except (ValueError, KeyError, TypeError) as error:
        shown = line[:200].decode(errors="replace")
        return WorkerEvent(seq, utc_now(), "event.unreadable", {"error": repr(error), "line": shown})
