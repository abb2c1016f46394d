"""The Ray Serve application: HTTP in front of one engine per replica.

POST /generate takes a GenerateRequest and answers with events as JSON lines; GET /status tells what is
loaded. The proxy listens on loopback only: clients talk to the control plane's OpenAI routes.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.serving.engine import Engine, Event, Failed, GenerateRequest, RequestError, ServingError, Started

_logger = logging.getLogger("ray.serve")


class ServeArgs(BaseModel):
    """Arguments of the application, sent with the deployment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    storage_url: str
    num_threads: int = Field(1, ge=1)
    num_replicas: int = Field(1, ge=1)
    max_adapters: int = Field(16, ge=1)


class Replica:
    """One engine and its HTTP face."""

    def __init__(self, args: ServeArgs) -> None:
        # heavy: only replicas pay for torch
        from service.serving.transformers_engine import TransformersEngine

        self._engine: Engine = TransformersEngine(
            storage_url=args.storage_url, max_adapters=args.max_adapters, num_threads=args.num_threads
        )

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/status" and request.method == "GET":
            return Response(self._engine.status().model_dump_json(), media_type="application/json")
        if request.url.path == "/generate" and request.method == "POST":
            return await self._generate(await request.body())
        return _error(404, "not_found", f"no route {request.method} {request.url.path}")

    async def _generate(self, body: bytes) -> Response:
        try:
            wanted = GenerateRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = ".".join(map(str, first["loc"])) or None
            return _error(400, "invalid_value", f"{param or 'request'}: {first['msg']}", param)
        events = self._engine.generate(wanted)
        try:
            first_event = await anext(events)
        except RequestError as error:
            return _error(400, error.code or "invalid_value", error.message, error.param)
        except ServingError as error:
            return _error(503, "engine_unavailable", str(error))
        assert isinstance(first_event, Started)
        return _EventResponse(first_event, events)


class _EventResponse(StreamingResponse):
    """Send events as lines; the generation ends with the response, whichever way that ends."""

    def __init__(self, first: Event, events: AsyncGenerator[Event, None]) -> None:
        super().__init__(_lines(first, events), media_type="application/x-ndjson")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _lines(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    yield first.model_dump_json() + "\n"
    try:
        async for event in events:
            yield event.model_dump_json() + "\n"
    except Exception as error:
        _logger.exception("generation failed")
        yield Failed(message=f"{type(error).__name__}: {error}").model_dump_json() + "\n"


def _error(status: int, code: str, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse({"code": code, "message": message, "param": param}, status_code=status)


def build(arguments: dict[str, Any]) -> Application:
    """Return the application; Serve imports this by name and passes the deployment's ServeArgs as JSON."""
    args = ServeArgs.model_validate(arguments)
    deployment: serve.Deployment = serve.deployment(
        name="engine",
        num_replicas=args.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=20.0,
        health_check_period_s=10.0,
        health_check_timeout_s=60.0,
    )(Replica)
    return deployment.bind(args)
