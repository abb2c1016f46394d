"""Every list route over HTTP, one request after the other, on a database that is full."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from benchmarks.control_plane.job_rows import made_id
from benchmarks.control_plane.rows import Filled
from service.jobs.states import RunState

LIMIT_MS = 50.0
NUM_WARM_UP = 5
PATHS_PER_ROUTE = 40
"""Different jobs, adapters and pages that one row of the report asks for."""


def routes(filled: Filled, *, seed: int = 0) -> dict[str, list[str]]:
    """Return what is measured: the route as the report names it -> the paths that are asked in turn."""
    rng = random.Random(seed)
    longest, widest = filled.job_ids[0], filled.job_ids[1]
    some = rng.choices(filled.job_ids, k=PATHS_PER_ROUTE)
    names = rng.choices(filled.adapters, k=PATHS_PER_ROUTE)
    numbers = [rng.randrange(len(filled.job_ids)) for _ in range(PATHS_PER_ROUTE)]
    last_event = filled.num_events // 10
    return {
        "/v1/jobs": ["/v1/jobs"],
        "/v1/jobs?limit=100": ["/v1/jobs?limit=100"],
        "/v1/jobs?order=asc&limit=100": ["/v1/jobs?order=asc&limit=100"],
        "/v1/jobs?limit=100&after=": [f"/v1/jobs?limit=100&after={job}" for job in some],
        **{
            f"/v1/jobs?status={state}&limit=100": [f"/v1/jobs?status={state}&limit=100"] for state in RunState
        },
        "/v1/jobs?status=succeeded&limit=100&after=": [
            f"/v1/jobs?status=succeeded&limit=100&after={job}" for job in some
        ],
        "/v1/jobs/{id}": [f"/v1/jobs/{job}" for job in some],
        "/v1/jobs/{id}, 100 tasks": [f"/v1/jobs/{widest}"],
        "/v1/jobs/{id}/events": [f"/v1/jobs/{job}/events" for job in some],
        "/v1/jobs/{id}/events?limit=500&after=, deep": [
            f"/v1/jobs/{longest}/events?limit=500&after={rng.randrange(last_event)}" for _ in some
        ],
        "/v1/jobs/{id}/metrics": [f"/v1/jobs/{job}/metrics" for job in some],
        "/v1/jobs/{id}/metrics?limit=500, the first page": [f"/v1/jobs/{longest}/metrics?limit=500"],
        "/v1/jobs/{id}/metrics?after=, the last page": [
            f"/v1/jobs/{longest}/metrics?limit=500&after={filled.last_metrics}"
        ],
        "/v1/jobs/{id}/metrics?task=": [f"/v1/jobs/{job}/metrics?task=topic-0" for job in some],
        "/v1/jobs/{id}/runs": [f"/v1/jobs/{job}/runs" for job in some],
        "/v1/runs/{id}/attempts": [f"/v1/runs/{made_id('run', 10 * i + 1)}/attempts" for i in numbers],
        "/v1/adapters?limit=100": ["/v1/adapters?limit=100"],
        "/v1/adapters?limit=100&after=": [f"/v1/adapters?limit=100&after={name}" for name in names],
        "/v1/adapters/{name}": [f"/v1/adapters/{name}" for name in names],
        "/v1/adapters/{name}, 100 versions": [f"/v1/adapters/{filled.adapters[1]}"],
        "/v1/datasets?limit=100": ["/v1/datasets?limit=100"],
        "/v1/datasets?limit=100&after=": [
            f"/v1/datasets?limit=100&after={made_id('ds', i)}" for i in numbers
        ],
        "/v1/datasets?name=&limit=100": [f"/v1/datasets?limit=100&name=tickets-{i % 50}" for i in numbers],
        "/v1/models": ["/v1/models"],
        "/v1/models/{name}": [f"/v1/models/{name}" for name in names],
        "/v1/strategies": ["/v1/strategies"],
        "/v1/peft-methods": ["/v1/peft-methods"],
        "/v1/base-models": ["/v1/base-models"],
    }


def measure(client: httpx.Client, route: str, paths: Sequence[str], num_requests: int) -> Mapping[str, Any]:
    """Time requests one after the other, in milliseconds. Raises httpx.HTTPStatusError for a refusal."""
    times_ms, num_bytes = [], 0
    for number in range(NUM_WARM_UP + num_requests):
        start = time.perf_counter()
        answer = client.get(paths[number % len(paths)])
        times_ms.append(1000 * (time.perf_counter() - start))
        answer.raise_for_status()
        num_bytes = max(num_bytes, len(answer.content))
    cuts = statistics.quantiles(times_ms[NUM_WARM_UP:], n=100)
    return {
        "measures": "list",
        "route": route,
        "num_requests": num_requests,
        "largest_answer_bytes": num_bytes,
        "p50_ms": round(cuts[49], 2),
        "p99_ms": round(cuts[98], 2),
    }
