"""What routes need, taken from the application's state; create_app puts it there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from service.adapters.storage import Storage
from service.db.session import Sessions
from service.jobs.runner import JobRunner
from service.reconciler import Reconciler
from service.settings import Settings


def get_settings(request: Request) -> Settings:
    """The settings that the application was made with."""
    settings: Settings = request.app.state.settings
    return settings


def get_sessions(request: Request) -> Sessions:
    """The database."""
    sessions: Sessions = request.app.state.sessions
    return sessions


def get_storage(request: Request) -> Storage:
    """The storage root."""
    storage: Storage = request.app.state.storage
    return storage


def get_runner(request: Request) -> JobRunner:
    """The Ray Jobs API."""
    runner: JobRunner = request.app.state.runner
    return runner


def get_reconciler(request: Request) -> Reconciler:
    """The reconciler, to be woken after a change."""
    reconciler: Reconciler = request.app.state.reconciler
    return reconciler


def read_session(request: Request) -> Iterator[Session]:
    """A transaction that reads, closed after the answer."""
    with get_sessions(request).read() as session:
        yield session


SettingsDep = Annotated[Settings, Depends(get_settings)]
SessionsDep = Annotated[Sessions, Depends(get_sessions)]
StorageDep = Annotated[Storage, Depends(get_storage)]
RunnerDep = Annotated[JobRunner, Depends(get_runner)]
ReconcilerDep = Annotated[Reconciler, Depends(get_reconciler)]
ReadSession = Annotated[Session, Depends(read_session)]
