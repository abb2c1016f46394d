"""The control plane under load: `python -m benchmarks.control_plane --json OUT [--database-url URL]`.

The server is `python -m service.bootstrap` in a process of its own; what is measured goes over HTTP. The
database is filled first: a SQLite file, or an empty PostgreSQL database that is named. The lists are read
beside a reconciler that works and has no cluster; the submissions come once without a reconciler, and once
with one in the server's process whose Jobs API takes seconds to answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.api_process import api_process
from benchmarks.control_plane import lists, submissions, watchers
from benchmarks.control_plane.cluster import slow_jobs_api
from benchmarks.control_plane.job_rows import made_id
from benchmarks.control_plane.rows import fill, look
from benchmarks.report import target, write_report
from service.db.session import open_database

LOG = logging.getLogger("benchmarks.control_plane")
PARTS = ("lists", "submissions", "watchers")
DATASET = made_id("ds", 0)
SLOW_ANSWER_S = 2.0
NOBODY = "http://127.0.0.1:9"
"""Where the cluster is not: connections are refused."""
MOST_AT_WORK = "8"
"""Runs that the reconciler may have at work: so many are when the database is new."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; the defaults are what the figures are promised for."""

    num_jobs: int = 10_000
    num_events: int = 1_000_000
    num_requests: int = 200
    rate: float = 200.0
    seconds: float = 30.0
    num_watchers: int = 50
    num_watched_jobs: int = 10
    events_per_job: int = 200
    events_per_s: float = 100.0
    idle_s: float = 10.0


TINY = Sizes(
    num_jobs=24,
    num_events=600,
    num_requests=3,
    rate=10,
    seconds=1,
    num_watchers=4,
    num_watched_jobs=2,
    events_per_job=20,
    events_per_s=200,
    idle_s=0.2,
)


def run(home: Path, database_url: str, sizes: Sizes, parts: Sequence[str] = PARTS) -> list[dict[str, Any]]:
    """Fill the database unless it is full already, measure, return the report's rows."""
    _prepare_model(home)
    sessions = open_database(database_url)
    if not look(sessions).job_ids:
        start = time.monotonic()
        fill(sessions, sizes.num_jobs, sizes.num_events)
        LOG.info("filled in %.0f s", time.monotonic() - start)
    filled = look(sessions)
    content = {"measures": "content", "num_jobs": len(filled.job_ids), "num_events": filled.num_events}
    rows: list[dict[str, Any]] = [{**content, "num_metrics": filled.num_metrics}]
    common = {"CLPEFT_HOME": str(home), "CLPEFT_DATABASE_URL": database_url}
    common |= {"CLPEFT_MAX_CONCURRENT_RUNS": MOST_AT_WORK, "CLPEFT_SERVE_URL": NOBODY}
    common["CLPEFT_RAY_DASHBOARD_URL"] = NOBODY
    if "lists" in parts:
        with api_process(**common) as api:
            for route, paths in lists.routes(filled).items():
                rows.append(lists.measure(api.client, route, paths, sizes.num_requests))
                LOG.info("%s", rows[-1])
    for reconcile in (False, True) if "submissions" in parts else ():
        with slow_jobs_api(SLOW_ANSWER_S) as cluster:
            variables = {"CLPEFT_RECONCILE": str(reconcile), "CLPEFT_RAY_DASHBOARD_URL": cluster}
            with api_process(**common | variables) as api:
                measured = submissions.measure(
                    api,
                    sessions,
                    DATASET,
                    rate=sizes.rate,
                    seconds=sizes.seconds,
                    prefix=f"load-{int(reconcile)}",
                )
        rows.append({**measured, "reconciles": reconcile})
        LOG.info("%s", rows[-1])
    if "watchers" in parts:
        with api_process(**common, CLPEFT_RECONCILE="false") as api:
            rows.append(
                watchers.measure(
                    api,
                    database_url,
                    DATASET,
                    num_watchers=sizes.num_watchers,
                    num_jobs=sizes.num_watched_jobs,
                    num_events=sizes.events_per_job,
                    rate=sizes.events_per_s,
                    idle_s=sizes.idle_s,
                )
            )
        LOG.info("%s", rows[-1])
    sessions.close()
    return rows


def targets_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare with what was promised."""
    found = []
    times = {row["route"]: row["p99_ms"] for row in rows if row["measures"] == "list"}
    if times:
        slowest = max(times, key=lambda route: times[route])
        what, limit = f"p99 of the slowest list, GET {slowest}, in ms", f"<= {lists.LIMIT_MS:.0f} ms"
        found.append(target(what, times[slowest], limit, times[slowest] <= lists.LIMIT_MS))
    for row in rows:
        if row["measures"] == "submissions":
            beside = "beside a reconciler and a slow cluster" if row["reconciles"] else "alone"
            share = row["num_accepted"] / row["num_sent"]
            rate = row["accepted_per_s"] / row["rate_per_s"]
            faults = sum(row[name] for name in submissions.FAULTS)
            what = f"submissions at {row['rate_per_s']:g} a second, {beside}"
            found += [
                target(f"{what}: share accepted", share, "= 1", share == 1),
                target(f"{what}: rate of acceptance, share of the rate", rate, ">= 0.95", rate >= 0.95),
                target(f"{what}: jobs lost, doubled or not whole", faults, "= 0", faults == 0),
            ]
        elif row["measures"] == "watchers":
            faults = row["num_missed"] + row["num_seen_twice"] + row["num_out_of_order"]
            what = f"{row['num_watchers']} watchers: events missed, seen twice or out of order"
            found.append(target(what, faults, "= 0", faults == 0))
    return found


def _prepare_model(home: Path) -> None:
    """Put a base model there that jobs may name; nothing loads it."""
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--database-url", help="an empty database; default: a new SQLite file")
    parser.add_argument("--home", type=Path, help="folder of the service, kept; default: a temporary one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; the figures mean nothing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        url = options.database_url or f"sqlite:///{home / 'clpeft.db'}"
        rows = run(home, url, TINY if options.quick else Sizes(), options.parts)
    write_report(options.json, "control_plane", rows, targets_of(rows))


if __name__ == "__main__":
    main()
