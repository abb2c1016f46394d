"""Errors as RFC 9457 problem details; on the OpenAI routes as OpenAI's error body."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.adapters.storage import StorageError
from service.db.engines import is_away
from service.errors import (
    Conflict,
    Invalid,
    NotFound,
    Problem,
    ServiceError,
    TooLarge,
    Unavailable,
    WrongType,
)

__all__ = [
    "Conflict",
    "Invalid",
    "NotFound",
    "Problem",
    "ServiceError",
    "TooLarge",
    "Unavailable",
    "WrongType",
    "add_problem_handlers",
    "problems_of",
]

logger = logging.getLogger(__name__)
OPENAI_PATHS = ("/v1/models", "/v1/completions", "/v1/chat/")
RETRY_AFTER_S = 5
_SHOWN_CHARACTERS = 200


def add_problem_handlers(app: FastAPI) -> None:
    """Answer every error of the application with a problem body and the request's id."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SQLAlchemyError, _database_error)
    app.add_exception_handler(StorageError, _storage_error)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _unexpected)


def problems_of(errors: Sequence[Any], *, prefix: Sequence[str] = ()) -> list[Problem]:
    """Turn pydantic's errors into problems that name the bad value."""
    found = []
    for error in errors:
        where = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
        pointer = "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in (*prefix, *where))
        detail = str(error["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list")
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", "malformed")
            found.append(Problem("/", f"the body is not JSON: {reason} at byte {error['loc'][-1]}"))
            continue
        if error["type"] == "extra_forbidden":
            found.append(Problem(pointer, f"unknown field {where[-1]!r}; /openapi.json has the fields"))
            continue
        shown = _short(repr(error.get("input")))
        is_named = len(shown) > 3 and shown in detail
        if isinstance(error.get("input"), str | int | float | bool) and not is_named:
            detail += f", got {shown}"
        found.append(Problem(pointer or "/", detail))
    return found


def invalid_from(error: ValidationError, *, prefix: Sequence[str] = ()) -> Invalid:
    """Turn a pydantic error into the error that the caller sees."""
    problems = problems_of(error.errors(include_url=False, include_context=False), prefix=prefix)
    return Invalid(_summary(problems), problems=problems)


def _summary(problems: Sequence[Problem]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0].pointer}: {problems[0].detail}{more}"


def printable(text: str) -> str:
    """Return text that can be sent: what a user sent may hold halves of surrogate pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _answer(
    request: Request,
    status: int,
    code: str,
    detail: str,
    problems: Sequence[Problem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    detail = printable(detail)
    request_id = str(getattr(request.state, "request_id", ""))
    sent = {"X-Request-Id": request_id, **(headers or {})}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        sent.setdefault("Retry-After", str(RETRY_AFTER_S))
    if request.url.path.startswith(OPENAI_PATHS):
        kind = "invalid_request_error" if status < 500 else "server_error"
        body: dict[str, Any] = {"error": {"message": detail, "type": kind, "param": None, "code": code}}
        return JSONResponse(body, status, sent)
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "errors": [{"pointer": printable(p.pointer), "detail": printable(p.detail)} for p in problems],
        "instance": request.url.path,
        "request_id": request_id,
    }
    return JSONResponse(body, status, sent, media_type="application/problem+json")


def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return _answer(request, error.status, error.code, error.detail, error.problems)


def _request_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = problems_of(error.errors())
    return _answer(request, 422, "invalid", _summary(problems), problems)


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return _answer(request, error.status_code, code, detail, headers=error.headers)


def _disconnected(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    logger.info("%s %s: the client went away", request.method, request.url.path)
    return _answer(request, 400, "client_disconnected", "the request broke off before its end")


def _database_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SQLAlchemyError)
    if not is_away(error):
        return _unexpected(request, error)
    logger.error("the database does not answer: %s", error)
    return _answer(request, 503, "database_unavailable", "the database does not answer; try again")


def _storage_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s: %s", request.method, request.url.path, error)
    return _answer(request, 503, "storage_unavailable", str(error))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(request, 500, "internal", f"internal error; the log has it under request {_id(request)}")


def _id(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))
