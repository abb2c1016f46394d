"""A control plane whose PostgreSQL is away: it says so, loses nothing, and goes on by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.db.session import open_database
from service.jobs.runner import RayJobState
from service.settings import Settings
from tests.service.control import NDJSON, Service, run_service, wait_until, write_outcome, write_task
from tests.service.postgres import PostgresServer

ROW = b'{"prompt": "q", "completion": "a"}\n'


@pytest.fixture
def service(settings: Settings, postgres: PostgresServer, migrated_postgres: str) -> Iterator[Service]:
    """A served control plane on PostgreSQL alone, whose reconciler runs."""
    postgres.wipe(migrated_postgres)
    sessions = open_database(postgres.url(migrated_postgres))
    with run_service(settings, sessions, reconcile=True) as running:
        yield running
    sessions.close()


def test_every_route_answers_503_with_retry_after_and_the_process_stays_alive(
    service: Service, postgres: PostgresServer
) -> None:
    job = service.submit("one")
    body = service.job_body("one", name="other")
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/jobs", {}),
        ("GET", f"/v1/jobs/{job['id']}", {}),
        ("GET", f"/v1/jobs/{job['id']}/events", {}),
        ("GET", f"/v1/jobs/{job['id']}/events", {"headers": {"Accept": "text/event-stream"}}),
        ("POST", "/v1/jobs", {"json": body}),
        ("POST", f"/v1/jobs/{job['id']}:cancel", {}),
        ("GET", "/v1/datasets", {}),
        ("GET", "/v1/adapters/demo", {}),
    ]
    with postgres.away():
        for method, path, arguments in calls:
            answer = service.client.request(method, path, **arguments)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] == "database_unavailable"
            assert int(answer.headers["Retry-After"]) > 0
        ready = service.client.get("/readyz")
        assert ready.status_code == 503
        assert "OperationalError" in ready.json()["checks"]["database"]
        assert ready.json()["checks"]["storage"] == "ok"
        assert service.client.get("/healthz").status_code == 200
    assert service.client.get("/readyz").json()["checks"]["database"] == "ok"
    names = [found["name"] for found in service.client.get("/v1/jobs").json()["data"]]
    assert names == ["demo"]
    assert service.client.post("/v1/jobs", json=body).status_code == 201


def test_the_openai_routes_answer_503_in_their_own_form(service: Service, postgres: PostgresServer) -> None:
    with postgres.away():
        answer = service.client.get("/v1/models")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "database_unavailable"


def test_a_stream_goes_on_when_the_database_is_back(service: Service, postgres: PostgresServer) -> None:
    job = service.submit("one")
    wait_until(lambda: service.runner.submitted, "the run to be submitted")
    run_id = service.runner.submitted[0].removesuffix("-a1")
    seen: list[dict[str, Any]] = []

    def follow() -> None:
        url = f"{service.client.base_url}/v1/jobs/{job['id']}/events"
        with httpx.stream("GET", url, headers={"Accept": "text/event-stream"}, timeout=60) as answer:
            seen.extend(
                json.loads(line.removeprefix("data: "))
                for line in answer.iter_lines()
                if line.startswith("data: ")
            )

    reader = threading.Thread(target=follow)
    reader.start()
    wait_until(lambda: seen, "the stream's first event")
    with postgres.away():
        write_task(service.storage, run_id, 1, 0)
        write_outcome(service.storage, run_id, 1, "succeeded")
    reader.join(60)
    assert not reader.is_alive()
    assert seen[-1]["type"] == "job.succeeded"
    page = service.client.get(f"/v1/jobs/{job['id']}/events").json()
    assert seen == page["data"]


def test_the_reconciler_goes_on_after_an_absence_and_doubles_nothing(
    service: Service, postgres: PostgresServer
) -> None:
    first = service.submit("one", name="first")
    wait_until(lambda: service.runner.submitted, "the run to be submitted")
    (submission,) = service.runner.submitted
    run_id = submission.removesuffix("-a1")
    for _ in range(2):
        with postgres.away():
            service.reconciler.wake()
    postgres.kill()
    postgres.start()
    assert service.runner.states[submission] == RayJobState.RUNNING
    write_task(service.storage, run_id, 1, 0)
    write_outcome(service.storage, run_id, 1, "succeeded")
    wait_until(lambda: service.job(first["id"])["state"] == "succeeded", "the job to succeed", 60)
    assert set(service.runner.submitted) == {submission}  # a repeat is allowed: the id makes it one
    assert [
        version["version"] for version in service.client.get("/v1/adapters/first").json()["versions"]
    ] == [1]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_sqlite_file_that_was_deleted_or_replaced_is_noticed_and_nothing_is_accepted(
    replaced: bool, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "clpeft.db"
    with run_service(settings, open_database(f"sqlite:///{path}")) as service:
        service.upload()
        path.unlink()
        if replaced:
            open_database(f"sqlite:///{path}").close()
        for answer in (
            service.client.get("/v1/jobs"),
            service.client.post("/v1/datasets", params={"name": "n"}, content=ROW, headers=NDJSON),
            service.client.get("/readyz"),
        ):
            assert answer.status_code == 503, answer.text
            assert "was deleted or replaced" in answer.text or "database_unavailable" in answer.text
        assert "was deleted or replaced" in service.client.get("/readyz").json()["checks"]["database"]
