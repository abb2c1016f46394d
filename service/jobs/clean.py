"""Remove what ended runs leave in storage and no version needs.

Kept: the plan, events, logs, outcomes, TensorBoard files, and the folders of committed tasks. Removed: Ray
Train's checkpoints, the memory actor's versions, and task folders that were never committed.
"""

from __future__ import annotations

import logging
import re
from datetime import timedelta

from sqlalchemy import select

from service.adapters.storage import Storage, attempt_key, train_key
from service.db.session import Sessions
from service.db.tables import AdapterVersion, Run, utc_now
from service.jobs import repository
from service.jobs.states import FINAL_RUN_STATES

RUNS_PER_TICK = 2
_ATTEMPT = re.compile(r"^a(\d+)$")
logger = logging.getLogger(__name__)


def clean_ended_runs(sessions: Sessions, storage: Storage, *, keep_s: float) -> None:
    """Clean a few runs that ended at least keep_s seconds ago: a zombie's late files are gone by then too."""
    with sessions.read() as session:
        wanted = (
            select(Run.id)
            .where(Run.state.in_(FINAL_RUN_STATES), Run.cleaned_at.is_(None))
            .where(Run.finished_at <= utc_now() - timedelta(seconds=keep_s))
            .limit(RUNS_PER_TICK)
        )
        ended = session.scalars(wanted).all()
    for run_id in ended:
        try:
            clean_run(sessions, storage, run_id)
        except OSError as error:  # the store is away; the run stays on the list
            logger.warning("files of run %s could not be removed: %s", run_id, error)
            return
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
