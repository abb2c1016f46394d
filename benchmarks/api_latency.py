"""Latency of the job list over HTTP with many jobs: `python -m benchmarks.api_latency --json OUT`.

The server is `python -m service.bootstrap` in a process of its own, with SQLite, its reconciler at work and
no cluster behind it. The list is read by one client over one connection.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from sqlalchemy import update

from benchmarks.report import target, write_report
from service.db.session import Sessions, open_database
from service.db.tables import Dataset, Job, Run
from service.jobs import repository
from service.jobs.states import RunState
from service.planner import KnownDataset, plan_tasks
from service.processes import free_ports
from service.settings import Settings
from service.specs import BaseModelSpec, JobSpec, PlannedDataset, TaskSpec

LIMIT_MS = 10.0
NUM_QUEUED = 10
PATHS = ("/v1/jobs", "/v1/jobs?limit=100", "/v1/jobs?status=queued", "/v1/jobs?order=asc&limit=100")


def fill(sessions: Sessions, num_jobs: int) -> None:
    """Store jobs of three tasks; all but the first NUM_QUEUED have succeeded."""
    planned = PlannedDataset(id="ds_1", path="datasets/ds_1/rows.jsonl", sha256="0" * 64, num_rows=240)
    tasks = tuple(TaskSpec(name=name, dataset="ds_1", epochs=3) for name in ("one", "two", "three"))
    with sessions.write() as session:
        session.add(
            Dataset(
                id="ds_1",
                name="rows",
                format="completion",
                num_rows=240,
                bytes=1,
                sha256="0" * 64,
                statistics={},
            )
        )
        for number in range(num_jobs):
            spec = JobSpec(name=f"job-{number}", base_model=BaseModelSpec(id="tiny"), tasks=tasks)
            known = {"ds_1": KnownDataset(planned, "completion")}
            resolved = plan_tasks(tasks, training=spec.training, datasets=known)
            job = repository.create_job(session, spec, resolved, base_model_path="/models/tiny").job
            if number >= NUM_QUEUED:
                session.execute(update(Job).where(Job.id == job.id).values(state=RunState.SUCCEEDED))
                session.execute(update(Run).where(Run.job_id == job.id).values(state=RunState.SUCCEEDED))


@contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    """Serve in another process until the block ends."""
    given = {"CLPEFT_HOME": str(settings.home), "CLPEFT_PORT": str(settings.port)}
    process = subprocess.Popen([sys.executable, "-m", "service.bootstrap"], env={**os.environ, **given})
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{settings.port}", trust_env=False, timeout=30
        ) as client:
            for _ in range(600):
                try:
                    client.get("/healthz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            time.sleep(5)  # the server imports torch beside its first requests
            yield client
    finally:
        process.terminate()
        process.wait()


def measure(client: httpx.Client, path: str, num_requests: int) -> dict[str, float | str | int]:
    """Time requests one after the other, in milliseconds."""
    times_ms = []
    for _ in range(20 + num_requests):
        start = time.perf_counter()
        client.get(path).raise_for_status()
        times_ms.append(1000 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times_ms[20:], n=100)
    return {
        "path": path,
        "num_requests": num_requests,
        "p50_ms": round(cuts[49], 2),
        "p95_ms": round(cuts[94], 2),
        "p99_ms": round(cuts[98], 2),
    }


def main() -> None:
    """Fill a database, serve it, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--num-jobs", type=int, default=1000)
    parser.add_argument("--num-requests", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder), port=free_ports(1)[0])
        sessions = open_database(settings.database_url)
        fill(sessions, options.num_jobs)
        sessions.close()
        with served(settings) as client:
            rows = [measure(client, path, options.num_requests) for path in PATHS]
    p50_ms = float(rows[0]["p50_ms"])
    what = f"p50 of GET /v1/jobs with {options.num_jobs} jobs, in ms"
    write_report(
        options.json, "api_latency", rows, [target(what, p50_ms, f"<= {LIMIT_MS:.0f} ms", p50_ms <= LIMIT_MS)]
    )


if __name__ == "__main__":
    main()
