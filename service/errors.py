"""Errors that a caller of the service can cause, as one tree; each has an HTTP status and a fixed code.

ServiceError
├── NotFound        404  no object of this name or id
├── Conflict        409  the object's state does not allow this
├── TooLarge        413  more bytes than the service takes
├── WrongType       415  a media type that the route does not read
├── Invalid         422  a value that cannot be used; `problems` points at each one
└── Unavailable     503  something behind the service does not answer; try again later
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One bad value: where it is (JSON pointer, or /lines/<n> of an upload) and what is wrong with it."""

    pointer: str
    detail: str


class ServiceError(Exception):
    """Base of the errors above. The detail is shown to the caller as it is."""

    status = 500
    code = "internal"

    def __init__(self, detail: str, *, code: str | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.problems = tuple(problems)


class NotFound(ServiceError):
    """No object of this name or id."""

    status = 404
    code = "not_found"


class Conflict(ServiceError):
    """The object's state does not allow this."""

    status = 409
    code = "conflict"


class TooLarge(ServiceError):
    """More bytes than the service takes."""

    status = 413
    code = "too_large"


class WrongType(ServiceError):
    """A media type that the route does not read."""

    status = 415
    code = "unsupported_media_type"


class Invalid(ServiceError):
    """A value that cannot be used."""

    status = 422
    code = "invalid"


class Unavailable(ServiceError):
    """Something behind the service does not answer; try again later."""

    status = 503
    code = "unavailable"
