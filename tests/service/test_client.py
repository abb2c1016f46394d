"""The client against a server: broken streams, refusals, nobody there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Header
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.client import ApiError, Client
from tests.service.control import Service, serve


def sse(number: int, kind: str) -> bytes:
    body = json.dumps({"id": number, "type": kind, "time": "2026-01-01T00:00:00Z", "data": {"n": number}})
    return f"id: {number}\nevent: {kind}\ndata: {body}\n\n".encode()


def test_a_broken_event_stream_is_taken_up_after_the_last_event() -> None:
    app, seen = FastAPI(), []

    @app.get("/v1/jobs/job_1/events")
    async def events(last_event_id: str = Header()) -> StreamingResponse:
        seen.append(last_event_id)

        async def first() -> AsyncIterator[bytes]:
            yield b": ping\n\n" + sse(1, "job.created") + sse(2, "step")[:-10]
            raise ConnectionAbortedError

        async def second() -> AsyncIterator[bytes]:
            yield sse(2, "step") + sse(3, "job.succeeded")

        return StreamingResponse(first() if len(seen) == 1 else second(), media_type="text/event-stream")

    with serve(app) as url, Client(url) as client:
        found = list(client.events("job_1"))
    assert [(event.id, event.type) for event in found] == [
        (1, "job.created"),
        (2, "step"),
        (3, "job.succeeded"),
    ]
    assert found[1].data == {"n": 2}
    assert seen == ["0", "1"]


def test_events_are_followed_through_a_time_without_a_database() -> None:
    app, seen = FastAPI(), []

    @app.get("/v1/jobs/job_1/events")
    async def events(last_event_id: str = Header()) -> Response:
        seen.append(last_event_id)
        if len(seen) == 2:
            return JSONResponse({"detail": "the database does not answer"}, 503, {"Retry-After": "1"})
        body = sse(1, "job.created") if len(seen) == 1 else sse(2, "job.succeeded")
        return Response(body, media_type="text/event-stream")

    @app.get("/v1/jobs/job_1")
    async def job() -> JSONResponse:
        return JSONResponse({"detail": "the database does not answer"}, 503)

    with serve(app) as url, Client(url) as client:
        assert [event.id for event in client.events("job_1")] == [1, 2]
    assert seen == ["0", "1", "1"]


def test_following_a_finished_job_from_its_end_returns_at_once(service: Service) -> None:
    job = service.submit("one")
    with Client(str(service.client.base_url)) as client:
        client.cancel(job["id"])
        everything = list(client.events(job["id"]))
        assert everything[-1].type == "job.cancelled"
        assert list(client.events(job["id"], after=everything[-1].id)) == []


def test_a_refusal_says_what_the_service_says(service: Service, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with Client(str(service.client.base_url)) as client:
        with pytest.raises(ApiError, match="no job 'job_none'") as caught:
            client.job("job_none")
        assert (caught.value.status, caught.value.code) == (404, "job_not_found")
        with pytest.raises(ApiError, match="line 2"):
            client.upload_dataset("bad", bad)
        with pytest.raises(ApiError, match="/base_model") as caught:
            client.submit({"name": "x", "tasks": []})
        assert "/tasks" in str(caught.value), "every bad field is named"


def test_nobody_there_is_one_clear_error() -> None:
    with (
        Client("http://127.0.0.1:9") as client,
        pytest.raises(ApiError, match="no service answers at http") as caught,
    ):
        client.jobs()
    assert caught.value.status == 0
