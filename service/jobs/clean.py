"""Remove what ended runs and broken uploads leave in storage.

Kept of a run: the plan, events, logs, outcomes, TensorBoard files, and the folders of committed tasks.
Removed: Ray Train's checkpoints, the memory actor's versions, task folders that were never committed, and
what a killed writer did not finish. Of data sets those that the database does not know: their upload was
cut off.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from datetime import timedelta

from sqlalchemy import select

from service.adapters.storage import Storage, attempt_key, train_key
from service.db.session import Sessions
from service.db.tables import AdapterVersion, Dataset, Run, utc_now
from service.ids import created_at
from service.jobs import repository
from service.jobs.states import FINAL_RUN_STATES

RUNS_PER_TICK = 2
UPLOAD_TIME = timedelta(days=1)
"""No upload takes longer: rows that are older and that no data set names belong to nobody."""
_ATTEMPT = re.compile(r"^a(\d+)$")
logger = logging.getLogger(__name__)


def clean_ended_runs(sessions: Sessions, storage: Storage, *, keep_s: float) -> None:
    """Clean a few runs that ended at least keep_s seconds ago: a zombie's late files are gone by then too.

    Raises StorageError; the run stays on the list.
    """
    with sessions.read() as session:
        wanted = (
            select(Run.id)
            .where(Run.state.in_(FINAL_RUN_STATES), Run.cleaned_at.is_(None))
            .where(Run.finished_at <= utc_now() - timedelta(seconds=keep_s))
            .limit(RUNS_PER_TICK)
        )
        ended = session.scalars(wanted).all()
    for run_id in ended:
        clean_run(sessions, storage, run_id)
        with sessions.write() as session:
            repository.lock_run(session, run_id).cleaned_at = utc_now()


def clean_run(sessions: Sessions, storage: Storage, run_id: str) -> None:
    """Remove an ended run's files that no version needs."""
    with sessions.read() as session:
        wanted = select(AdapterVersion.task_dir).where(AdapterVersion.run_id == run_id)
        kept = set(session.scalars(wanted))
    storage.delete(train_key(run_id))
    for name in storage.names(f"runs/{run_id}"):
        found = _ATTEMPT.match(name)
        if found is None:
            continue
        folder = attempt_key(run_id, int(found[1]))
        storage.delete(f"{folder}/memory")
        for index in storage.names(f"{folder}/tasks"):
            if f"{folder}/tasks/{index}" not in kept:
                storage.delete(f"{folder}/tasks/{index}")
    storage.delete_unfinished(f"runs/{run_id}")


def clean_broken_uploads(sessions: Sessions, storage: Storage) -> None:
    """Remove the rows of uploads that ended before their data set was there. Raises StorageError."""
    started = utc_now() - UPLOAD_TIME
    old = set()
    for name in storage.names("datasets"):
        with suppress(ValueError):  # not one of ours
            if created_at(name) < started:
                old.add(name)
    if not old:
        return
    with sessions.read() as session:
        unknown = old - set(session.scalars(select(Dataset.id)))
    for name in sorted(unknown):
        storage.delete(f"datasets/{name}")
        logger.info("removed the rows of %s: its upload was never finished", name)
