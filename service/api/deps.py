"""What routes need, taken from the application's state; create_app puts it there.

Nothing here may block: FastAPI gives a dependency that is not async a thread for a moment. So no transaction
is a dependency either: its connection would be held while its request waits for a thread, and all threads may
be waiting for a connection.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Request

from service.adapters.storage import Storage
from service.api.watch import Watch
from service.db.session import Sessions
from service.db.tables import DEFAULT_OWNER
from service.errors import Invalid
from service.jobs.runner import JobRunner
from service.reconciler import Reconciler
from service.settings import Settings

OWNER_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+:-]{0,199}")


async def get_settings(request: Request) -> Settings:
    """The settings that the application was made with."""
    settings: Settings = request.app.state.settings
    return settings


async def get_sessions(request: Request) -> Sessions:
    """The database."""
    sessions: Sessions = request.app.state.sessions
    return sessions


async def get_storage(request: Request) -> Storage:
    """The storage root."""
    storage: Storage = request.app.state.storage
    return storage


async def get_runner(request: Request) -> JobRunner:
    """The Ray Jobs API."""
    runner: JobRunner = request.app.state.runner
    return runner


async def get_watch(request: Request) -> Watch:
    """What wakes those who follow a job."""
    watch: Watch = request.app.state.watch
    return watch


async def get_reconciler(request: Request) -> Reconciler:
    """The reconciler, to be woken after a change."""
    reconciler: Reconciler = request.app.state.reconciler
    return reconciler


async def get_owner(request: Request) -> str:
    """Who calls: what a trusted proxy says, where the settings name its header. Raises Invalid."""
    settings: Settings = request.app.state.settings
    header = settings.owner_header
    if not header:
        return DEFAULT_OWNER
    owner = request.headers.get(header, "")
    if not OWNER_PATTERN.fullmatch(owner):
        raise Invalid(
            f"the header {header} must name the owner in 1 to 200 plain characters, got {owner[:50]!r}"
        )
    return owner


SettingsDep = Annotated[Settings, Depends(get_settings)]
SessionsDep = Annotated[Sessions, Depends(get_sessions)]
StorageDep = Annotated[Storage, Depends(get_storage)]
RunnerDep = Annotated[JobRunner, Depends(get_runner)]
ReconcilerDep = Annotated[Reconciler, Depends(get_reconciler)]
WatchDep = Annotated[Watch, Depends(get_watch)]
OwnerDep = Annotated[str, Depends(get_owner)]
