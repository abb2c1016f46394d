"""Remove what ended runs and broken uploads leave in storage.

Kept of a run: the plan, events, logs, outcomes, TensorBoard files, and the folders of committed tasks.
Removed: Ray Train's checkpoints, the memory actor's versions, task folders that were never committed, and
what a killed writer did not finish. Of data sets those that are marked as nobody's: their upload was cut off,
or they were deleted. What is not marked stays, whatever the database says: it may be the wrong one.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from datetime import timedelta

from sqlalchemy import select

from service.adapters.storage import Storage, attempt_key, train_key, unowned_key
from service.datasets import remove_files
from service.db.session import Sessions
from service.db.tables import AdapterVersion, Dataset, Run, utc_now
from service.ids import created_at
from service.jobs import repository
from service.jobs.states import FINAL_RUN_STATES

RUNS_PER_TICK = 2
UPLOAD_TIME = timedelta(days=1)
"""No upload takes longer."""
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
            .order_by(Run.finished_at)
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
        for index in filter(str.isdigit, storage.names(f"{folder}/tasks")):
            if f"{folder}/tasks/{index}" not in kept:
                storage.delete(f"{folder}/tasks/{index}")
    storage.delete_unfinished(f"runs/{run_id}")


def clean_broken_uploads(sessions: Sessions, storage: Storage) -> None:
    """Remove the files of data sets whose upload or deletion was cut off. Raises StorageError."""
    started = utc_now() - UPLOAD_TIME
    old = set()
    for key in storage.find("datasets"):
        name = key.split("/")[1]
        with suppress(ValueError):  # not one of ours
            if key == unowned_key(name) and created_at(name) < started:
                old.add(name)
    if not old:
        return
    with sessions.read() as session:
        known = old & set(session.scalars(select(Dataset.id)))
    for name in sorted(known):
        storage.delete(unowned_key(name))
    for name in sorted(old - known):
        remove_files(storage, name)
        logger.info("removed the files of %s: its upload or deletion was cut off", name)
