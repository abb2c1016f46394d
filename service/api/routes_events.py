"""A job's events: a page as JSON, or a stream (SSE) that ends after the job's terminal event."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import SQLAlchemyError

from service.api.deps import SessionsDep, WatchDep
from service.api.views import EventView, Page
from service.api.watch import Watch
from service.db.engines import is_away
from service.db.session import Sessions
from service.errors import Invalid
from service.jobs.events import events_after
from service.jobs.repository import get_job
from service.jobs.states import FINAL_RUN_STATES

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
BATCH_SIZE = 500
MAX_PAGE = 500
"""Events of one page: more would keep other requests waiting."""
HEARTBEAT_S = 10.0


@router.get("/{job_id}/events", response_model=Page[EventView])
async def events(
    request: Request,
    job_id: str,
    sessions: SessionsDep,
    watch: WatchDep,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """List events after an id, oldest first; with Accept: text/event-stream follow them as they happen."""
    if "text/event-stream" in accept:
        if last_event_id:
            after = _read_id(last_event_id)
        await run_sync(_look, sessions, job_id, after, 1)  # an unknown job is a 404, not an empty stream
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = _follow(request, sessions, watch, job_id, after)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    return Response(await run_sync(_page, sessions, job_id, after, limit), media_type="application/json")


async def _follow(
    request: Request, sessions: Sessions, watch: Watch, job_id: str, after: int
) -> AsyncIterator[bytes]:
    while not request.app.state.stopping.is_set():
        try:
            found, is_final = await run_sync(_look, sessions, job_id, after, BATCH_SIZE)
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            found, is_final = [], False  # the stream goes on when the database is back
        for event in found:
            yield format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.id))
            after = event.id
        if is_final and not found:
            return
        if len(found) < BATCH_SIZE and not is_final:
            start = time.monotonic()
            await watch.wait(job_id, after, HEARTBEAT_S)
            if time.monotonic() - start >= HEARTBEAT_S:
                yield KEEPALIVE_COMMENT


def _page(sessions: Sessions, job_id: str, after: int, limit: int) -> str:
    """Return a page as JSON, written here and not on the event loop."""
    found, _ = _look(sessions, job_id, after, limit + 1)
    page = Page[EventView](data=found[:limit], has_more=len(found) > limit)
    if page.has_more:
        page.next_cursor = str(page.data[-1].id)
    return page.model_dump_json()


def _look(sessions: Sessions, job_id: str, after: int, limit: int) -> tuple[list[EventView], bool]:
    """Return the next events, and whether the job had ended when they were read."""
    with sessions.read() as session:
        is_final = get_job(session, job_id).state in FINAL_RUN_STATES
        return [
            EventView.model_validate(row) for row in events_after(session, job_id, after, limit)
        ], is_final


def _read_id(value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 18:
        raise Invalid(f"Last-Event-ID must be the number of an event, got {value[:50]!r}")
    return int(value)
