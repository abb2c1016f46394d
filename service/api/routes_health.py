"""Is the process alive, and can it do its work?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy import text

from service.api.deps import RunnerDep, SessionsDep, StorageDep
from service.db.session import Sessions

logger = logging.getLogger(__name__)
router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Every part that jobs need: "ok", or why it is not."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str]


@router.get("/healthz")
async def healthz() -> Health:
    """Answer as long as the process lives, also while every thread waits for a part that does not answer."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(response: Response, sessions: SessionsDep, storage: StorageDep, runner: RunnerDep) -> Readiness:
    """Check database, storage and Ray; 503 when one does not answer."""
    checks = {
        "database": _check(lambda: _check_database(sessions)),
        "storage": _check(storage.check),
        "ray": _check(runner.check),
    }
    is_ready = all(result == "ok" for result in checks.values())
    response.status_code = 200 if is_ready else 503
    return Readiness(status="ready" if is_ready else "not_ready", checks=checks)


def _check(probe: Callable[[], None]) -> str:
    try:
        probe()
    except Exception as error:
        logger.warning("not ready: %s", error)
        return f"{type(error).__name__}: {error}"[:300]
    return "ok"


def _check_database(sessions: Sessions) -> None:
    with sessions.read() as session:
        session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
