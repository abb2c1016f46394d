"""Events over HTTP: pages, streams, and where a stream ends and goes on."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from service.api import routes_events
from tests.service.control import Service, wait_until, write_events, write_outcome

SSE = {"Accept": "text/event-stream"}


def stream(service: Service, job_id: str, **headers: str) -> list[tuple[int, str]]:
    """Read a stream to its end; returns ids and types."""
    found = []
    with httpx.stream(
        "GET", f"{service.client.base_url}/v1/jobs/{job_id}/events", headers=SSE | headers, timeout=20
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                found.append((event["id"], event["type"]))
    return found


def test_pages_of_events_follow_their_ids(service: Service) -> None:
    job = service.submit("one")
    path = f"/v1/jobs/{job['id']}/events"
    service.reconciler.tick()
    every = service.client.get(path).json()["data"]
    first = service.client.get(path, params={"limit": 2}).json()
    rest = service.client.get(path, params={"after": first["next_cursor"]}).json()
    assert first["data"] + rest["data"] == every
    assert [event["id"] for event in every] == sorted({event["id"] for event in every})
    assert [event["type"] for event in every] == [
        "job.created",
        "run.queued",
        "attempt.started",
        "run.submitted",
    ]


def test_a_stream_shows_events_as_they_happen_and_ends_after_the_terminal_one(service: Service) -> None:
    job = service.submit("one")
    run = job["runs"][0]["id"]
    found: list[tuple[int, str]] = []
    reader = threading.Thread(target=lambda: found.extend(stream(service, job["id"])))
    reader.start()
    service.reconciler.tick()
    write_events(service.storage, run, 1, 1, [("run.started", {}), ("step", {"step": 1})])
    service.reconciler.tick()
    write_outcome(service.storage, run, 1, "failed", "user_error")
    service.reconciler.tick()
    reader.join(timeout=10)
    assert not reader.is_alive()
    types = [kind for _, kind in found]
    assert types == service.event_types(job["id"])
    assert types[-3:] == ["attempt.failed", "run.failed", "job.failed"]
    assert {"run.started", "step"} <= set(types)


def test_last_event_id_continues_without_repeating(service: Service) -> None:
    job = service.submit("one")
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    every = stream(service, job["id"])
    assert stream(service, job["id"], **{"Last-Event-ID": str(every[1][0])}) == every[2:]
    assert stream(service, job["id"], **{"Last-Event-ID": str(every[-1][0])}) == []
    bad = service.client.get(f"/v1/jobs/{job['id']}/events", headers=SSE | {"Last-Event-ID": "x"})
    assert bad.status_code == 422


def test_a_stream_goes_on_past_an_earlier_end_of_the_job(service: Service) -> None:
    job = service.submit("one")
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    service.client.post(f"/v1/jobs/{job['id']}:retry")
    found: list[tuple[int, str]] = []
    reader = threading.Thread(target=lambda: found.extend(stream(service, job["id"])))
    reader.start()
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    reader.join(timeout=10)
    assert [kind for _, kind in found].count("job.cancelled") == 2


def test_a_quiet_stream_sends_heartbeats(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_events, "HEARTBEAT_S", 0.1)
    job = service.submit("one")
    path = f"{service.client.base_url}/v1/jobs/{job['id']}/events"
    lines: list[str] = []
    with httpx.stream("GET", path, headers=SSE, timeout=20) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith(":"):
                break
    assert lines[-1] == ": ping"


def test_a_stream_of_an_unknown_job_is_404(service: Service) -> None:
    assert service.client.get("/v1/jobs/job_x/events", headers=SSE).status_code == 404


def test_streams_end_when_the_server_stops(service: Service) -> None:
    job = service.submit("one")
    reader = threading.Thread(target=stream, args=(service, job["id"]))
    reader.start()
    wait_until(reader.is_alive, "the stream")
    service.app.state.stopping.set()
    reader.join(timeout=5)
    assert not reader.is_alive()


def test_an_event_id_that_no_database_holds_is_refused(service: Service) -> None:
    job = service.submit("one")
    answer = service.client.get(f"/v1/jobs/{job['id']}/events", params={"after": 10**30})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
