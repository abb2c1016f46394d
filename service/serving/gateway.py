"""The control plane's way to the Serve application: one HTTP request per generation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import httpx

from service.errors import Unavailable
from service.serving.engine import Event, Failed, Finished, GenerateRequest, RequestError, parse_event

CONNECT_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1000


def open_client() -> httpx.AsyncClient:
    """Make the client that all requests share. Answers may take as long as the queue is."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        trust_env=False,
    )


@asynccontextmanager
async def generation(
    client: httpx.AsyncClient, serve_url: str, request: GenerateRequest
) -> AsyncIterator[AsyncGenerator[Event, None]]:
    """Start a generation and give its events, Started first; leaving the block early stops it.

    Raises RequestError for what the engine refuses, Unavailable when it is away or breaks off.
    """
    if not serve_url:
        raise Unavailable("serving is not set up: CLPEFT_SERVE_URL is empty", code="engine_unavailable")
    url = f"{serve_url.rstrip('/')}/generate"
    try:
        async with client.stream("POST", url, content=request.model_dump_json()) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise _refusal(response)
            async with aclosing(_events(response)) as events:
                yield events
    except httpx.HTTPError as error:
        raise Unavailable(
            f"the serving engine does not answer ({type(error).__name__})", code="engine_unavailable"
        ) from error


async def _events(response: httpx.Response) -> AsyncGenerator[Event, None]:
    async for line in response.aiter_lines():
        event = parse_event(line)
        if isinstance(event, Failed):
            raise Unavailable(f"the generation failed: {event.message}", code="engine_failed")
        yield event
        if isinstance(event, Finished):
            return
    raise Unavailable("the serving engine broke off its answer", code="engine_failed")


def _refusal(response: httpx.Response) -> Exception:
    is_ours = response.headers.get("content-type", "").startswith("application/json")
    if is_ours and response.status_code == httpx.codes.BAD_REQUEST:
        body = response.json()
        return RequestError(body["message"], body["param"], body["code"])
    if is_ours and response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return Unavailable(response.json()["message"], code="engine_unavailable")
    return Unavailable(
        f"the serving engine is not ready (it answered {response.status_code})", code="engine_unavailable"
    )
