"""Watchers of event streams (SSE) while another process writes the events."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.api_process import ApiProcess
from benchmarks.control_plane.submissions import body
from service.db.session import Sessions, open_database
from service.jobs import repository
from service.jobs.events import add_event
from service.jobs.states import Reason, RunState

RECONNECT_AFTER = 15
"""Events after which every second watcher hangs up and comes back with Last-Event-ID."""
EVENTS_PER_COMMIT = 5
TIMEOUT_S = 120.0


@dataclass
class Watcher:
    """One client of a job's stream, and when it saw which event (CLOCK_MONOTONIC)."""

    job_id: str
    reconnects: bool
    seen: list[tuple[int, float]] = field(default_factory=list)
    num_connections: int = 0

    async def follow(self, client: httpx.AsyncClient) -> None:
        """Watch until the job has ended."""
        while not await self._connect(client):
            pass

    async def _connect(self, client: httpx.AsyncClient) -> bool:
        """Read one stream; True when the server ended it."""
        headers = {"Accept": "text/event-stream"}
        if self.seen:
            headers["Last-Event-ID"] = str(self.seen[-1][0])
        self.num_connections += 1
        num_read = 0
        async with client.stream("GET", f"/v1/jobs/{self.job_id}/events", headers=headers) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    self.seen.append((int(line.removeprefix("id: ")), time.monotonic()))
                    num_read += 1
                elif not line and self.reconnects and num_read >= RECONNECT_AFTER:
                    return False
        return True


def write_events(url: str, job_ids: Sequence[str], num_events: int, rate: float) -> dict[str, list[float]]:
    """Give every job num_events step events, then end it; returns job -> when each event's commit began.

    rate: events per second over all jobs, EVENTS_PER_COMMIT of one job at a time.
    """
    sessions = open_database(url)
    committed: dict[str, list[float]] = {job_id: [] for job_id in job_ids}
    start, num_written = time.monotonic(), 0
    for first in range(0, num_events, EVENTS_PER_COMMIT):
        for job_id in job_ids:
            time.sleep(max(0.0, start + num_written / rate - time.monotonic()))
            numbers = range(first, min(first + EVENTS_PER_COMMIT, num_events))
            with sessions.write() as session:
                repository.lock_job(session, job_id)
                for number in numbers:
                    add_event(session, job_id, "step", {"task": "task-0", "step": number, "loss": 1.25})
                session.flush()
                now = time.monotonic()
            committed[job_id] += [now] * len(numbers)
            num_written += len(numbers)
    for job_id in job_ids:
        _end(sessions, job_id, committed)
    sessions.close()
    return committed


def _end(sessions: Sessions, job_id: str, committed: dict[str, list[float]]) -> None:
    with sessions.write() as session:
        job = repository.lock_job(session, job_id)
        before = job.last_event
        run = repository.runs_of(session, job_id)[0]
        repository.set_run_state(session, run, RunState.FAILED, reason=Reason.INTERNAL, message="ended here")
        committed[job_id] += [time.monotonic()] * (job.last_event - before)


async def _watch(
    api: ApiProcess, url: str, watchers: Sequence[Watcher], *, num_events: int, rate: float, idle_s: float
) -> tuple[float, float, dict[str, list[float]]]:
    """Follow with every watcher; returns the server's idle CPU share before and with them."""
    limits = httpx.Limits(max_connections=len(watchers), max_keepalive_connections=0)
    job_ids = list(dict.fromkeys(watcher.job_id for watcher in watchers))
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        await loop.run_in_executor(pool, abs, 0)  # the process starts before anything is measured
        alone = await _cpu_share(api, idle_s)
        async with (
            httpx.AsyncClient(base_url=api.url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as client,
            asyncio.timeout(TIMEOUT_S + num_events * len(job_ids) / rate),
            asyncio.TaskGroup() as group,
        ):
            for watcher in watchers:
                group.create_task(watcher.follow(client))
            while not all(watcher.seen for watcher in watchers):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            watched = await _cpu_share(api, idle_s)
            writing = loop.run_in_executor(pool, write_events, url, job_ids, num_events, rate)
            committed = await writing
    return alone, watched, committed


async def _cpu_share(api: ApiProcess, seconds: float) -> float:
    """Return the share of one core that the server uses."""
    cpu_s, start = api.cpu_s(), time.monotonic()
    await asyncio.sleep(seconds)
    return (api.cpu_s() - cpu_s) / (time.monotonic() - start)


def measure(
    api: ApiProcess,
    url: str,
    dataset: str,
    *,
    num_watchers: int,
    num_jobs: int,
    num_events: int,
    rate: float,
    idle_s: float,
) -> dict[str, Any]:
    """Submit jobs, watch them all, write their events and compare what was seen with what was written."""
    job_ids = [
        api.client.post("/v1/jobs", json=body(f"watched-{number}", dataset)).raise_for_status().json()["id"]
        for number in range(num_jobs)
    ]
    first_ids = {job: len(_event_ids(api.client, job)) + 1 for job in job_ids}
    watchers = [
        Watcher(job_ids[i % num_jobs], reconnects=i // num_jobs % 2 == 1) for i in range(num_watchers)
    ]
    alone, watched, committed = asyncio.run(
        _watch(api, url, watchers, num_events=num_events, rate=rate, idle_s=idle_s)
    )
    written = {job: _event_ids(api.client, job) for job in job_ids}
    delays_ms = [
        1000 * (at - committed[watcher.job_id][number - first_ids[watcher.job_id]])
        for watcher in watchers
        for number, at in watcher.seen
        if number >= first_ids[watcher.job_id]
    ]
    cuts = statistics.quantiles(delays_ms, n=100)
    seen = [[number for number, _ in watcher.seen] for watcher in watchers]
    return {
        "measures": "watchers",
        "num_watchers": num_watchers,
        "num_jobs": num_jobs,
        "num_events": sum(map(len, written.values())),
        "events_per_s": rate,
        "num_received": sum(map(len, seen)),
        "num_reconnects": sum(watcher.num_connections - 1 for watcher in watchers),
        "num_missed": sum(
            len(set(written[w.job_id]) - set(got)) for w, got in zip(watchers, seen, strict=True)
        ),
        "num_seen_twice": sum(count - 1 for got in seen for count in Counter(got).values()),
        "num_out_of_order": sum(b <= a for got in seen for a, b in itertools.pairwise(got)),
        "delay_p50_ms": round(cuts[49], 1),
        "delay_p99_ms": round(cuts[98], 1),
        "delay_max_ms": round(max(delays_ms), 1),
        "idle_cpu_percent_without_watchers": round(100 * alone, 2),
        "idle_cpu_percent_with_watchers": round(100 * watched, 2),
    }


def _event_ids(client: httpx.Client, job_id: str) -> list[int]:
    """Return the ids of a job's events, page by page."""
    found: list[int] = []
    while True:
        params = {"limit": 500, "after": found[-1] if found else 0}
        page = client.get(f"/v1/jobs/{job_id}/events", params=params).raise_for_status().json()
        found += [event["id"] for event in page["data"]]
        if not page["has_more"]:
            return found
