"""Two replicas of the control plane, each with API and reconciler, on one PostgreSQL and one storage."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from service.adapters.storage import Storage, desired_key, plan_key
from service.db.session import open_database
from service.db.tables import LeaseRow, utc_now
from service.jobs.leases import LeaseLost
from service.jobs.runner import RayJobState
from service.reconciler import Reconciler
from service.settings import Settings
from tests.service.control import (
    ScriptedRunner,
    Service,
    run_service,
    wait_until,
    write_events,
    write_outcome,
    write_task,
)
from tests.service.postgres import PostgresServer

SSE = {"Accept": "text/event-stream"}
EVENTS_EACH = 7
"""After so many events a reader moves to the other replica."""
HELD = "held"
"""A task of this name trains until its job is cancelled."""
FINAL = ("succeeded", "failed", "cancelled")


class PaperWorkers:
    """Do on paper what Ray would: every submitted attempt trains its tasks, or stops when it is told to."""

    def __init__(self, storage: Storage, runner: ScriptedRunner) -> None:
        self._storage, self._runner = storage, runner
        self._done: set[str] = set()
        self.error: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="paper-workers", daemon=True)

    def __enter__(self) -> PaperWorkers:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._stopping.wait(0.02):
                for submission in list(self._runner.submitted):
                    if submission not in self._done and self._train(submission):
                        self._done.add(submission)
        except Exception as error:
            self.error = error

    def _train(self, submission: str) -> bool:
        """Train an attempt's tasks; False while it goes on."""
        run_id, number = submission.rsplit("-a", 1)
        attempt = int(number)
        names = [task["name"] for task in self._storage.read_json(plan_key(run_id))["tasks"]]
        if HELD in names:
            if self._storage.read_json(desired_key(run_id))["state"] == "running":
                return False
            return self._end(submission, run_id, attempt, "cancelled")
        tasks = self._storage.read_json(plan_key(run_id))["tasks"]
        seq = itertools.count(1)
        write_events(self._storage, run_id, attempt, next(seq), [("run.started", {})])
        for task in tasks:
            for kind in ("task.started", "step", "step", "task.trained", "task.evaluated"):
                write_events(self._storage, run_id, attempt, next(seq), [(kind, {"task": task["name"]})])
            write_task(self._storage, run_id, attempt, task["index"])
        return self._end(submission, run_id, attempt, "succeeded")

    def _end(self, submission: str, run_id: str, attempt: int, state: str) -> bool:
        write_outcome(self._storage, run_id, attempt, state)
        self._runner.states[submission] = RayJobState.SUCCEEDED
        return True


@pytest.fixture
def replicas(
    settings: Settings, postgres: PostgresServer, migrated_postgres: str
) -> Iterator[tuple[Service, Service]]:
    """Two served control planes whose reconcilers run, with one Ray between them."""
    postgres.wipe(migrated_postgres)
    url = postgres.url(migrated_postgres)
    settings = settings.model_copy(update={"max_concurrent_runs": 4, "database_url": url})
    runner = ScriptedRunner()
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(2):
            sessions = open_database(url)
            stack.callback(sessions.close)
            one = stack.enter_context(run_service(settings, sessions, reconcile=True, real_runner=runner))
            one.runner = runner
            found.append(one)
        yield found[0], found[1]


def together(calls: Sequence[Any]) -> list[httpx.Response]:
    """Send requests from as many threads, all at one moment."""
    start = threading.Barrier(len(calls))

    def send(call: Any) -> httpx.Response:
        start.wait()
        response: httpx.Response = call()
        return response

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(send, calls))


def body(dataset: str, name: str, *tasks: str) -> dict[str, Any]:
    """A job over one data set."""
    given = [{"name": task, "dataset": dataset, "steps": 1} for task in tasks]
    return {"name": name, "base_model": {"id": "tiny"}, "tasks": given}


def follow_by_turns(replicas: Sequence[Service], job_id: str, stop: threading.Event) -> list[dict[str, Any]]:
    """Read a job's stream to its end, moving to the other replica after every few events."""
    seen: list[dict[str, Any]] = []
    for replica in itertools.cycle(replicas):
        headers = SSE | ({"Last-Event-ID": str(seen[-1]["id"])} if seen else {})
        url = f"{replica.client.base_url}/v1/jobs/{job_id}/events"
        with httpx.stream("GET", url, headers=headers, timeout=120, trust_env=False) as answer:
            lines = (line for line in _until(stop, answer.iter_lines()) if line.startswith("data: "))
            some = [json.loads(line.removeprefix("data: ")) for line in itertools.islice(lines, EVENTS_EACH)]
        seen += some
        if len(some) < EVENTS_EACH:
            return seen
    raise AssertionError("not reached")


def _until(stop: threading.Event, lines: Iterator[str]) -> Iterator[str]:
    """Pass lines on until the test has failed; a heartbeat comes every few seconds."""
    for line in lines:
        if stop.is_set():
            raise RuntimeError("the test has ended")
        yield line


def test_of_many_submissions_of_one_name_one_is_taken(replicas: tuple[Service, Service]) -> None:
    dataset = replicas[0].upload()
    wanted = body(dataset, "demo", "one")
    answers = together([lambda r=replica: r.client.post("/v1/jobs", json=wanted) for replica in replicas * 4])
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    (taken,) = (answer.json()["id"] for answer in answers if answer.status_code == 201)
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} == {
        "adapter_name_taken"
    }
    assert [job["id"] for job in replicas[1].client.get("/v1/jobs").json()["data"]] == [taken]


def test_no_job_task_or_event_is_lost_or_doubled_whichever_replica_is_asked(
    replicas: tuple[Service, Service],
) -> None:
    first, second = replicas
    dataset = first.upload()
    names = [f"job-{number}" for number in range(6)]
    answers = together(
        [
            lambda r=replica, n=name: r.client.post(
                "/v1/jobs", json=body(dataset, n, "held" if n in names[:2] else "a")
            )
            for name, replica in zip(names, itertools.cycle(replicas), strict=False)
        ]
    )
    assert [answer.status_code for answer in answers] == [201] * 6
    jobs = [answer.json()["id"] for answer in answers]
    cancelled, grown = jobs[:2], jobs[2:]
    readers: dict[str, list[dict[str, Any]]] = {}
    stop = threading.Event()
    with (
        ThreadPoolExecutor(8) as pool,
        PaperWorkers(first.storage, first.runner) as workers,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(stop.set)
        following = {job: pool.submit(follow_by_turns, replicas, job, stop) for job in cancelled}
        appended = together(
            [
                lambda r=replica, j=job, n=number: r.client.post(
                    f"/v1/jobs/{j}/tasks", json={"name": f"more-{n}", "dataset": dataset, "steps": 1}
                )
                for job in grown[:2]
                for number, replica in enumerate(replicas * 2)
            ]
        )
        assert {answer.status_code for answer in appended} == {201}
        wait_until(lambda: _at_work(first, cancelled), "the jobs that are held to run", 120)
        stopped = together(
            [
                lambda r=replica, j=job: r.client.post(f"/v1/jobs/{j}:cancel")
                for job in cancelled
                for replica in replicas
            ]
        )
        assert {answer.status_code for answer in stopped} == {202}
        wait_until(lambda: _all_ended(second, jobs, workers), "all jobs to end", 240)
        following |= {job: pool.submit(follow_by_turns, replicas, job, stop) for job in grown}
        readers = {job: future.result() for job, future in following.items()}
    for job in jobs:
        shown = second.job(job)
        assert shown["state"] == ("cancelled" if job in cancelled else "succeeded"), shown
        _check_history(readers[job], shown)
    submitted = first.runner.submitted
    assert len(submitted) == len(set(submitted)) == 6 + 2 * 4  # one attempt a run, none twice
    for job in grown[:2]:
        tasks = first.job(job)["tasks"]
        assert [task["index"] for task in tasks] == list(range(5))
        assert [task["version"] for task in tasks] == [1, 2, 3, 4, 5]
        assert {task["name"] for task in tasks} == {"a", "more-0", "more-1", "more-2", "more-3"}


def _at_work(service: Service, jobs: Sequence[str]) -> bool:
    return all(service.job(job)["state"] in ("scheduling", "running") for job in jobs)


def _all_ended(service: Service, jobs: Sequence[str], workers: PaperWorkers) -> bool:
    if workers.error is not None:
        raise workers.error
    time.sleep(0.1)
    return all(service.job(job)["state"] in FINAL for job in jobs)


def _check_history(events: list[dict[str, Any]], job: dict[str, Any]) -> None:
    """Numbers without a gap, each thing once, and the end last."""
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    types = [event["type"] for event in events]
    assert types[0] == "job.created"
    assert types[-1] == f"job.{job['state']}"
    for run in job["runs"]:
        own = [event for event in events if event["run_id"] == run["id"]]
        seqs = [event["seq"] for event in own if event["seq"] is not None]
        assert seqs == list(range(1, len(seqs) + 1))
        for once in ("run.queued", "attempt.started", "run.submitted", f"run.{run['state']}"):
            assert [event["type"] for event in own].count(once) == 1, once
    assert types.count("task.committed") == sum(task["state"] == "committed" for task in job["tasks"])


class StuckRunner(ScriptedRunner):
    """A Jobs API that holds one caller inside submit() until the test lets it go on: a frozen process."""

    def __init__(self) -> None:
        super().__init__()
        self.is_inside = threading.Event()
        self.may_go_on = threading.Event()

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Submit; the first caller freezes when it has."""
        super().submit(submission_id, entrypoint, env)
        if not self.is_inside.is_set():
            self.is_inside.set()
            assert self.may_go_on.wait(60)


def test_one_reconciler_works_and_the_next_takes_over_when_it_is_frozen_and_its_late_write_is_refused(
    settings: Settings, postgres: PostgresServer, migrated_postgres: str
) -> None:
    postgres.wipe(migrated_postgres)
    settings = settings.model_copy(update={"lease_s": 600.0})
    runner = StuckRunner()
    with contextlib.ExitStack() as stack:
        first, second = (open_database(postgres.url(migrated_postgres)) for _ in range(2))
        stack.callback(first.close)
        stack.callback(second.close)
        service = stack.enter_context(run_service(settings, first, real_runner=runner))
        standby = Reconciler(settings, sessions=second, storage=service.storage, runner=runner)
        job = service.submit("one")
        with ThreadPoolExecutor(1) as pool:
            stack.callback(runner.may_go_on.set)
            frozen = pool.submit(service.reconciler.tick)
            assert runner.is_inside.wait(30)
            assert standby.tick() is False  # the lease is held
            assert service.job(job["id"])["state"] == "submitting"
            with second.write() as session:  # its time passes
                session.execute(update(LeaseRow).values(expires_at=utc_now() - timedelta(seconds=1)))
            assert standby.tick() is True
            assert _at_work(service, [job["id"]])
            before = service.event_types(job["id"])
            runner.may_go_on.set()
            with pytest.raises(LeaseLost):
                frozen.result(30)
        assert service.event_types(job["id"]) == before
        assert before.count("run.submitted") == before.count("attempt.started") == 1
        assert set(runner.submitted) == {f"{job['runs'][0]['id']}-a1"}
        assert standby.tick() is True
