"""Jobs that arrive at a fixed rate, whether or not the service keeps up, and what became of each."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
from sqlalchemy import func, select

from benchmarks.api_process import ApiProcess
from service.db.session import Sessions
from service.db.tables import Event, Job, Run, Task

NUM_CONNECTIONS = 100
"""Of an aiohttp client: the time that httpx's pool takes for a request grows with the square of this."""
TASKS_PER_JOB = 3


@dataclass(frozen=True)
class Sent:
    """One submission: when it was due and answered, in seconds, and the answer."""

    name: str
    due_s: float
    done_s: float
    status: int
    """0: no answer came."""
    job_id: str | None


def body(name: str, dataset: str) -> dict[str, Any]:
    """Return a job of three tasks."""
    tasks = [{"name": f"task-{i}", "dataset": dataset, "steps": 20} for i in range(TASKS_PER_JOB)]
    return {"name": name, "base_model": {"id": "tiny"}, "strategy": {"type": "ewc"}, "tasks": tasks}


async def submit_all(url: str, dataset: str, *, rate: float, seconds: float, prefix: str) -> list[Sent]:
    """Submit at a fixed rate over many connections; a late answer does not delay the next submission."""
    timeout = aiohttp.ClientTimeout(60)
    connector = aiohttp.TCPConnector(limit=NUM_CONNECTIONS)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as client:
        start = time.perf_counter() + 0.1

        async def submit(number: int) -> Sent:
            due = number / rate
            name = f"{prefix}-{number}"
            content = json.dumps(body(name, dataset))
            await asyncio.sleep(start + due - time.perf_counter())
            try:
                headers = {"Content-Type": "application/json"}
                async with client.post("/v1/jobs", data=content, headers=headers) as answer:
                    data = await answer.read()
            except (aiohttp.ClientError, TimeoutError):
                return Sent(name, due, time.perf_counter() - start, 0, None)
            done = time.perf_counter() - start
            job_id = json.loads(data)["id"] if answer.status == 201 else None
            return Sent(name, due, done, answer.status, job_id)

        return list(await asyncio.gather(*(submit(number) for number in range(round(rate * seconds)))))


def measure(
    api: ApiProcess, sessions: Sessions, dataset: str, *, rate: float, seconds: float, prefix: str
) -> dict[str, Any]:
    """Submit, then look every job up: over HTTP and in the tables."""
    cpu_s = api.cpu_s()
    sent = asyncio.run(submit_all(api.url, dataset, rate=rate, seconds=seconds, prefix=prefix))
    cpu_s = api.cpu_s() - cpu_s
    cuts_ms = statistics.quantiles([1000 * (one.done_s - one.due_s) for one in sent], n=1000)
    accepted = [one for one in sent if one.job_id is not None]
    return {
        "measures": "submissions",
        "rate_per_s": rate,
        "seconds": seconds,
        "num_sent": len(sent),
        "num_accepted": len(accepted),
        "statuses": {str(status): count for status, count in Counter(one.status for one in sent).items()},
        "accepted_per_s": round(len(accepted) / max(one.done_s for one in sent), 1),
        "p50_ms": round(cuts_ms[499], 1),
        "p90_ms": round(cuts_ms[899], 1),
        "p99_ms": round(cuts_ms[989], 1),
        "max_ms": round(1000 * max(one.done_s - one.due_s for one in sent), 1),
        "cpu_ms_per_submission": round(1000 * cpu_s / len(sent), 2),
        **check(api.client, sessions, accepted, prefix),
    }


def check(client: httpx.Client, sessions: Sessions, accepted: list[Sent], prefix: str) -> dict[str, int]:
    """Count what is not as it must be: every figure is 0 when nothing was lost, doubled or half done."""
    ids = {one.job_id: one.name for one in accepted}
    listed = Counter(row["id"] for row in _listed(client) if row["name"].startswith(f"{prefix}-"))
    named = Job.name.startswith(f"{prefix}-", autoescape=True)
    with sessions.read() as session:
        stored = {
            row.id: row for row in session.execute(select(Job.id, Job.name, Job.last_event).where(named))
        }
        runs = _counts(session.execute(_per_job(Run).where(named)))
        tasks = _counts(session.execute(_per_job(Task).where(named)))
        events = {
            job_id: (count, first, last)
            for job_id, count, first, last in session.execute(
                select(Event.job_id, func.count(), func.min(Event.id), func.max(Event.id))
                .join(Job, Job.id == Event.job_id)
                .where(named)
                .group_by(Event.job_id)
            )
        }
    return {
        "num_lost": sum(stored.get(job) is None or stored[job].name != name for job, name in ids.items()),
        "num_doubled": len(accepted) - len(ids) + len(stored) - len({row.name for row in stored.values()}),
        "num_stored_but_not_accepted": len(stored.keys() - ids.keys()),
        "num_not_listed_once": sum(listed[job] != 1 for job in ids) + len(listed.keys() - ids.keys()),
        "num_without_one_run": sum(runs.get(job) != 1 for job in ids),
        "num_without_every_task": sum(tasks.get(job) != TASKS_PER_JOB for job in ids),
        "num_with_event_gaps": sum(
            events.get(job) != (row.last_event, 1, row.last_event) or row.last_event < 2
            for job, row in stored.items()
        ),
    }


FAULTS = (
    "num_lost",
    "num_doubled",
    "num_stored_but_not_accepted",
    "num_not_listed_once",
    "num_without_one_run",
    "num_without_every_task",
    "num_with_event_gaps",
)


def _listed(client: httpx.Client) -> list[dict[str, Any]]:
    """Return every job, page by page, newest first."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        params = {"limit": "100"} | ({"after": after} if after else {})
        page = client.get("/v1/jobs", params=params).raise_for_status().json()
        found += page["data"]
        after = page["next_cursor"]
        if not page["has_more"]:
            return found


def _per_job(table: type[Run] | type[Task]) -> Any:
    return select(table.job_id, func.count()).join(Job, Job.id == table.job_id).group_by(table.job_id)


def _counts(rows: Any) -> dict[str, int]:
    return dict(rows.all())
