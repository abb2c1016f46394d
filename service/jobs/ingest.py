"""Bring into the database what workers left in storage: their events, and each finished task as a version.

Both may be repeated at any moment: events are unique by (run, attempt, seq), and a task is committed once.
Neither writes when there is nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters import registry
from service.adapters.registry import ManifestError
from service.adapters.storage import Storage, attempt_key, task_key
from service.db.session import Sessions
from service.db.tables import Attempt, Metric, Run, Task
from service.jobs import repository
from service.jobs.events import WorkerEvent, add_event, read_worker_events
from service.jobs.states import AT_WORK_RUN_STATES, FINAL_RUN_STATES, RunState, TaskState, change_state

_TASK_STATES = {
    "task.started": TaskState.TRAINING,
    "task.trained": TaskState.EVALUATING,
    "task.evaluating": TaskState.EVALUATING,
    "task.evaluated": TaskState.EVALUATING,
}
METRICS = ("loss", "learning_rate", "tokens_per_s")
"""What of a step event is kept as a metric."""


def ingest_events(sessions: Sessions, storage: Storage, attempt: Attempt) -> None:
    """Take an attempt's new events, in order, and show in the job what they say; attempt: as it was read.

    Before its first ones come those that earlier attempts wrote after they were given up: their checkpoints
    cover these steps, and nobody trains them again.
    """
    events = read_worker_events(storage, attempt.run_id, attempt.number, attempt.last_seq)
    if events and attempt.last_seq == 0:
        with sessions.read() as session:
            attempts = repository.attempts_of(session, attempt.run_id)
        for earlier in attempts[: attempt.number - 1]:
            late = read_worker_events(storage, earlier.run_id, earlier.number, earlier.last_seq)
            _take_events(sessions, earlier, late)
    _take_events(sessions, attempt, events)


def _take_events(sessions: Sessions, attempt: Attempt, events: Sequence[WorkerEvent]) -> None:
    if not events:
        return
    with sessions.write() as session:
        run = repository.lock_run(session, attempt.run_id)
        row = session.get_one(Attempt, (attempt.run_id, attempt.number))
        for event in events:
            if event.seq <= row.last_seq:  # another look was faster
                continue
            add_event(
                session,
                run.job_id,
                event.type,
                event.data,
                run_id=run.id,
                attempt=row.number,
                seq=event.seq,
                time=event.time,
            )
            _apply(session, run, row.number, event)
            row.last_seq = event.seq


def ingest_manifests(sessions: Sessions, storage: Storage, run_id: str, attempt: int) -> None:
    """Commit an attempt's finished tasks, in order. Raises ManifestError for one that cannot be taken.

    What the worker said before it finished a task is taken first: the last commit ends the job, and nobody
    reads events of a job that has ended.
    """
    finished = set(storage.names(f"{attempt_key(run_id, attempt)}/tasks"))
    if not finished:
        return
    with sessions.read() as session:
        indexes = [task.index for task in open_tasks(session, run_id) if str(task.index) in finished]
        row = session.get_one(Attempt, (run_id, attempt))
    if indexes:
        ingest_events(sessions, storage, row)
    for index in indexes:
        if not _commit_chain(sessions, storage, run_id, task_key(run_id, attempt, index)):
            return


def open_tasks(session: Session, run_id: str) -> Sequence[Task]:
    """Return the run's tasks that are not committed, in order."""
    wanted = select(Task).where(Task.run_id == run_id, Task.state != TaskState.COMMITTED).order_by(Task.index)
    return session.scalars(wanted).all()


def _commit_chain(sessions: Sessions, storage: Storage, run_id: str, task_dir: str) -> bool:
    """Commit a task folder, and before it the folders of earlier attempts that it was trained from.

    False when there is no manifest yet. An attempt that was given up may have finished a task after our last
    look at it; the next attempt that continued from it says so by its parent.
    """
    stored = registry.read_manifest(storage, task_dir)
    if stored is None:
        return False
    with sessions.read() as session:
        first_open = next(iter(open_tasks(session, run_id)), None)
    parent = stored.manifest.parent_dir
    if first_open is not None and parent is not None and stored.manifest.task_index > first_open.index:
        _commit_chain(sessions, storage, run_id, parent)
    with sessions.write() as session:
        run = repository.lock_run(session, run_id)
        task = next(iter(open_tasks(session, run_id)), None)
        if task is None or task.index != stored.manifest.task_index or run.state in FINAL_RUN_STATES:
            return False
        job = repository.get_job(session, run.job_id)
        newest = registry.latest_version(session, job.id)
        if parent != (None if newest is None else newest.task_dir):
            raise ManifestError(f"{task_dir} was trained from {parent}, not from the newest version")
        registry.commit(session, job, task, stored, alias=job.spec["promotion"]["alias"])
        run.attempts_without_commit = 0
    return True


def _apply(session: Session, run: Run, attempt: int, event: WorkerEvent) -> None:
    """Show in the run, its tasks and its job what a worker's event says."""
    if event.type == "run.started":
        if run.state in (RunState.SUBMITTING, RunState.SCHEDULING):
            repository.set_run_state(session, run, RunState.RUNNING)
    elif event.type == "step":
        repository.get_job(session, run.job_id).progress = event.data
        _keep_metrics(session, run, attempt, event)
    elif event.type in _TASK_STATES and run.state in AT_WORK_RUN_STATES:
        for task in open_tasks(session, run.id):
            if task.name == event.data.get("task"):
                change_state(task, f"task {task.name!r}", _TASK_STATES[event.type])


def _keep_metrics(session: Session, run: Run, attempt: int, event: WorkerEvent) -> None:
    """Keep what a step measured; the same step of a later attempt replaces it."""
    position = (event.data.get("task_index"), event.data.get("step"))
    if not all(isinstance(number, int) for number in position):  # a worker of another version
        return
    measured = {name: event.data[name] for name in METRICS if name in event.data}
    session.merge(
        Metric(
            job_id=run.job_id,
            task_index=position[0],
            step=position[1],
            attempt=attempt,
            time=event.time,
            data=measured,
        )
    )
