"""Put the HTTP application together from parts that are given; no part is made here but the reconciler."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.adapters.storage import Storage
from service.api import (
    openai,
    routes_adapters,
    routes_catalogue,
    routes_datasets,
    routes_events,
    routes_health,
    routes_jobs,
    routes_results,
)
from service.api.problems import add_problem_handlers
from service.api.watch import Watch
from service.db.session import Sessions
from service.ids import new_id
from service.jobs.runner import JobRunner
from service.reconciler import Reconciler
from service.settings import Settings

MAX_BODY_BYTES = 4 * 2**20
"""Limit of every body but uploads, which have their own."""
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")


def create_app(
    settings: Settings, *, sessions: Sessions, storage: Storage, runner: JobRunner, reconcile: bool = True
) -> FastAPI:
    """Build the application. While it serves, a thread reconciles, unless another process does that."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if reconcile:
            app.state.reconciler.start()
        yield
        app.state.stopping.set()
        app.state.reconciler.stop()

    app = FastAPI(
        title="CL-PEFT",
        summary="Continual training of language-model adapters: a sequence of tasks is one job.",
        version="0.1.0",
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.sessions = sessions
    app.state.storage = storage
    app.state.runner = runner
    app.state.stopping = threading.Event()
    app.state.watch = Watch(sessions, app.state.stopping)
    app.state.reconciler = Reconciler(settings, sessions=sessions, storage=storage, runner=runner)
    add_problem_handlers(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestId)
    for module in (
        routes_health,
        routes_datasets,
        routes_jobs,
        routes_results,
        routes_events,
        routes_adapters,
        routes_catalogue,
        openai,
    ):
        app.include_router(module.router)
    return app


class RequestId:
    """Give every request an id, the caller's own if it has a plain form, and send it back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else new_id("req")
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Refuse a body over MAX_BODY_BYTES while it is read; uploads count for themselves."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] == routes_datasets.router.prefix:
            await self.app(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes")
            return message

        await self.app(scope, receive_limited, send)
