"""Data sets: upload, list, show, delete."""

from __future__ import annotations

import logging
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from sqlalchemy import or_, select

from service.adapters.storage import StorageError, unowned_key
from service.api.deps import OwnerDep, SessionsDep, SettingsDep, StorageDep
from service.api.views import DatasetView, Page
from service.datasets import UploadLimit, drain, remove_files, store_rows, unowned
from service.db.session import Sessions
from service.db.tables import Dataset, Job, Task
from service.errors import Conflict, TooLarge, WrongType
from service.ids import new_id
from service.jobs.datasets import get_dataset
from service.jobs.quota import bytes_left
from service.settings import Settings
from service.specs import Name

logger = logging.getLogger(__name__)
MEDIA_TYPES = ("application/x-ndjson", "application/jsonl", "application/jsonlines")
router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.post("", status_code=201)
async def upload(
    request: Request,
    name: Name,
    settings: SettingsDep,
    sessions: SessionsDep,
    storage: StorageDep,
    owner: OwnerDep,
) -> DatasetView:
    """Store JSON lines: {"prompt", "completion"} or {"messages"} per line, one format per data set."""
    pieces = request.stream()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        await drain(pieces)
        raise WrongType(f"Content-Type {media_type!r} is not read; send one of {', '.join(MEDIA_TYPES)}")
    try:
        limit = await run_sync(_limit, sessions, settings, owner)
    except TooLarge:
        await drain(pieces)
        raise
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit.num_bytes:
        await drain(pieces)
        raise limit.exceeded(declared)
    dataset_id = new_id("ds")
    async with unowned(storage, dataset_id):
        stored = await store_rows(
            pieces,
            storage=storage,
            dataset_id=dataset_id,
            limit=limit,
            max_row_bytes=settings.max_row_bytes,
        )
        row = Dataset(
            id=dataset_id,
            name=name,
            format=stored.format,
            num_rows=stored.num_rows,
            bytes=stored.bytes,
            sha256=stored.sha256,
            statistics=stored.statistics,
            owner=owner,
        )
        await run_sync(_add, sessions, row)
    return DatasetView.model_validate(row)


@router.get("")
def list_datasets(
    sessions: SessionsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    name: str | None = None,
) -> Page[DatasetView]:
    """List data sets, newest first."""
    wanted = select(Dataset).order_by(Dataset.id.desc()).limit(limit + 1)
    if after is not None:
        wanted = wanted.where(Dataset.id < after)
    if name is not None:
        wanted = wanted.where(Dataset.name == name)
    with sessions.read() as session:
        rows = session.scalars(wanted).all()
    has_more = len(rows) > limit
    data = [DatasetView.model_validate(row) for row in rows[:limit]]
    return Page(data=data, has_more=has_more, next_cursor=data[-1].id if has_more else None)


@router.get("/{dataset_id}")
def show_dataset(dataset_id: str, sessions: SessionsDep) -> DatasetView:
    """Show a data set."""
    with sessions.read() as session:
        return DatasetView.model_validate(get_dataset(session, dataset_id))


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(dataset_id: str, sessions: SessionsDep, storage: StorageDep) -> None:
    """Delete a data set that no job uses."""
    with sessions.write() as session:
        row = get_dataset(session, dataset_id)
        uses = (
            select(Task.job_id).where(or_(Task.dataset_id == row.id, Task.eval_dataset_id == row.id)).limit(1)
        )
        general = select(Job.id).where(Job.spec["evaluation"]["general"].as_string() == row.id).limit(1)
        job_id = session.scalar(uses) or session.scalar(general)
        if job_id is not None:
            raise Conflict(f"data set {dataset_id} is used by job {job_id}", code="dataset_in_use")
        storage.write_bytes(unowned_key(dataset_id), b"")
        session.delete(row)
    try:
        remove_files(storage, dataset_id)
    except StorageError as error:
        logger.warning("files of %s are removed later: %s", dataset_id, error)


def _limit(sessions: Sessions, settings: Settings, owner: str) -> UploadLimit:
    """Return how large an upload may be. Raises TooLarge when the owner's quota is used up."""
    most = settings.max_upload_bytes
    limit = UploadLimit(most, f"at most {most} are taken")
    if settings.owner_quota_bytes:
        with sessions.read() as session:
            left = bytes_left(session, owner, settings.owner_quota_bytes)
        if left < most:
            limit = UploadLimit(left, f"the quota of {owner!r} leaves {left}", "quota_exceeded")
    return limit


def _add(sessions: Sessions, row: Dataset) -> None:
    with sessions.write() as session:
        session.add(row)
