"""Fill an empty database with many jobs and events, straight through the tables.

Jobs have one to five tasks, one or two runs, one to three attempts; states, owners and lengths are mixed,
from a fixed seed. One job has a tenth of all events, another 100 tasks. Every step is an event and a metric.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import func, insert, select

from benchmarks.control_plane.job_rows import TABLES, JobRows, Row
from service.db.session import Sessions
from service.db.tables import Adapter, Event, Job, Metric, Table

CHUNK = 5_000
LEAST_EVENTS = 10
"""Of every job."""


@dataclass(frozen=True)
class Filled:
    """What the measurements need to know of the rows."""

    job_ids: tuple[str, ...]
    """Oldest first; the first has most events, the second most tasks."""
    adapters: tuple[str, ...]
    """In order of their names."""
    num_events: int
    num_metrics: int
    last_metrics: str
    """Cursor before the first job's last 500 metrics."""


def fill(sessions: Sessions, num_jobs: int, num_events: int, *, seed: int = 0) -> None:
    """Store num_jobs jobs with num_events events in all, at least 20 a job on average."""
    rng = random.Random(seed)
    waiting: dict[type[Table], list[Row]] = defaultdict(list)
    with sessions.write() as session:
        for number, count in enumerate(_event_counts(rng, num_jobs, num_events)):
            for table, rows in JobRows(rng, number, count).rows():
                waiting[table] += rows
            if sum(map(len, waiting.values())) < CHUNK and number < num_jobs - 1:
                continue
            for table in TABLES:
                if rows := waiting.pop(table, []):
                    session.execute(insert(table.__table__), rows)  # the table, not the class: half the time


def look(sessions: Sessions) -> Filled:
    """Say what a filled database holds."""
    with sessions.read() as session:
        job_ids = tuple(session.scalars(select(Job.id).order_by(Job.id)))
        place = (Metric.task_index, Metric.step)
        newest_first = [column.desc() for column in place]
        wanted = select(*place).where(Metric.job_id.in_(job_ids[:1])).order_by(*newest_first).offset(500)
        before = session.execute(wanted.limit(1)).first()
        return Filled(
            job_ids=job_ids,
            adapters=tuple(session.scalars(select(Adapter.name).order_by(Adapter.name))),
            num_events=session.scalar(select(func.count()).select_from(Event)) or 0,
            num_metrics=session.scalar(select(func.count()).select_from(Metric)) or 0,
            last_metrics="0.0" if before is None else f"{before.task_index}.{before.step}",
        )


def _event_counts(rng: random.Random, num_jobs: int, num_events: int) -> list[int]:
    """Share events out: a tenth to the first job, the rest unevenly."""
    first = num_events // 10
    weights = [rng.paretovariate(1.5) for _ in range(num_jobs - 1)]
    total = sum(weights)
    left = num_events - first - LEAST_EVENTS * (num_jobs - 1)
    if left < 0:
        raise ValueError(f"{num_events} events are too few for {num_jobs} jobs; give at least 20 a job")
    counts = [LEAST_EVENTS + int(left * weight / total) for weight in weights]
    counts[0] += num_events - first - sum(counts)
    return [first, *counts]
