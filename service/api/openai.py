"""OpenAI-compatible routes: GET /v1/models, POST /v1/completions, POST /v1/chat/completions.

The model's name is resolved once per request; the answer's `model` and the header X-Adapter-Version say what
answered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from service.api.deps import SessionsDep, SettingsDep
from service.errors import NotFound, ServiceError, Unavailable
from service.serving.directory import ModelDirectory, ServedModel
from service.serving.engine import Delta, Event, Finished, RequestError, Started
from service.serving.gateway import generation, open_client
from service.serving.openai_wire import Answer, ChatRequest, CompletionRequest, usage

RETRY_AFTER_S = 5
MODELS_PER_PAGE = 500
CLIENT_CLOSED_REQUEST = 499


class OpenAIRoute(APIRoute):
    """Answers every error in OpenAI's body; a bad request body is 400 here, not 422."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return _bad_body(error)
            except RequestError as error:
                return error_response(400, error.message, error.param, error.code or "invalid_value")
            except NotFound as error:
                return error_response(404, error.detail, "model", error.code)
            except ServiceError as error:
                return error_response(error.status, error.detail, None, error.code)

        return answer


def error_response(status: int, message: str, param: str | None, code: str) -> JSONResponse:
    """Return an error as OpenAI writes it; 503 says when to try again."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == httpx.codes.SERVICE_UNAVAILABLE else None
    return JSONResponse(_error_body(status, message, param, code), status, headers)


def _error_body(status: int, message: str, param: str | None, code: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _bad_body(error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = repr(first.get("input"))
    if first["type"] not in ("missing", "json_invalid") and len(shown) <= 100:
        message += f", got {shown}"
    return error_response(400, f"{param}: {message}" if param else message, param, "invalid_value")


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    async with open_client() as client:
        yield {"serve_client": client}


router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAIRoute, lifespan=_lifespan)


async def get_directory(sessions: SessionsDep, settings: SettingsDep) -> ModelDirectory:
    """The models that can be asked."""
    return ModelDirectory(sessions, settings.models_dir)


async def get_serve_client(request: Request) -> httpx.AsyncClient:
    """The shared client to the Serve proxy."""
    client: httpx.AsyncClient = request.state.serve_client
    return client


Directory = Annotated[ModelDirectory, Depends(get_directory)]
ServeClient = Annotated[httpx.AsyncClient, Depends(get_serve_client)]


@router.get("/models", response_model=dict[str, Any])
def list_models(
    directory: Directory,
    limit: Annotated[int, Query(ge=1, le=MODELS_PER_PAGE)] = MODELS_PER_PAGE,
    after: str = "",
) -> Response:
    """List adapters, their versions and base models; where has_more, next_cursor goes into `after`."""
    data, cursor = directory.cards(limit=limit, after=after)
    has_more = cursor is not None
    return JSONResponse({"object": "list", "data": data, "has_more": has_more, "next_cursor": cursor})


@router.get("/models/{model:path}")
def get_model(model: str, directory: Directory) -> dict[str, Any]:
    """Describe one model by its listed id, or what an alias means now."""
    return directory.card(model)


@router.post("/completions", response_model=None)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    directory: Directory,
    client: ServeClient,
    settings: SettingsDep,
) -> Response:
    """Continue a raw prompt."""
    model = await run_in_threadpool(directory.find, body.model)
    return await _respond(body, model, Answer(model.id, is_chat=False), request, client, settings.serve_url)


@router.post("/chat/completions", response_model=None)
async def create_chat_completion(
    body: ChatRequest, request: Request, directory: Directory, client: ServeClient, settings: SettingsDep
) -> Response:
    """Answer a conversation through the base model's chat template."""
    model = await run_in_threadpool(directory.find, body.model)
    return await _respond(body, model, Answer(model.id, is_chat=True), request, client, settings.serve_url)


async def _respond(
    body: CompletionRequest | ChatRequest,
    model: ServedModel,
    answer: Answer,
    request: Request,
    client: httpx.AsyncClient,
    serve_url: str,
) -> Response:
    headers = {} if model.version is None else {"X-Adapter-Version": f"v{model.version}"}
    async with AsyncExitStack() as stack:
        events = await stack.enter_async_context(generation(client, serve_url, body.to_engine(model)))
        started = await anext(events)
        assert isinstance(started, Started)
        if body.stream:
            chunks = _chunks(events, started.prompt_tokens, answer, body.wants_usage_chunk)
            return _SseResponse(chunks, stack.pop_all(), headers)
        whole = await _unless_disconnected(request, _collect(events, started.prompt_tokens, answer))
        if whole is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(whole, headers=headers)


async def _collect(events: AsyncGenerator[Event, None], prompt_tokens: int, answer: Answer) -> dict[str, Any]:
    parts = []
    async for event in events:
        if isinstance(event, Delta):
            parts.append(event.text)
        elif isinstance(event, Finished):
            counts = usage(prompt_tokens, len(event.token_ids))
            return answer.whole("".join(parts), event.finish_reason, counts)
    raise AssertionError("the gateway ends with Finished or raises")


async def _unless_disconnected(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the work's result; cancel it and return None when the client leaves first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(
    events: AsyncGenerator[Event, None], prompt_tokens: int, answer: Answer, wants_usage: bool
) -> AsyncGenerator[str, None]:
    if first := answer.first_chunk():
        yield _sse(first)
    try:
        async for event in events:
            if isinstance(event, Delta):
                yield _sse(answer.text_chunk(event.text))
            elif isinstance(event, Finished):
                yield _sse(answer.last_chunk(event.finish_reason))
                if wants_usage:
                    yield _sse(answer.usage_chunk(usage(prompt_tokens, len(event.token_ids))))
    except (
        Unavailable,
        httpx.HTTPError,
    ) as error:  # the status is sent already: OpenAI's clients raise on this
        yield _sse(_error_body(503, f"the answer broke off: {error}", None, "engine_failed"))
        return
    yield "data: [DONE]\n\n"


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


class _SseResponse(StreamingResponse):
    """Send chunks; the generation ends with the response, whichever way that ends."""

    def __init__(self, chunks: AsyncIterator[str], stack: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(
            chunks, headers={"Cache-Control": "no-cache", **headers}, media_type="text/event-stream"
        )
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)
