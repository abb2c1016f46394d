"""States of jobs, runs, attempts and tasks, and every legal change, in one place.

A job has no state of its own: it shows that of its oldest unfinished run, else of its latest run.

    run      queued -> submitting -> scheduling -> running -> succeeded
             any of them after a lost attempt -> queued (back-off) -> submitting
             at work -> pausing -> paused -> queued;   unfinished -> cancelling -> cancelled
    attempt  submitting -> pending -> running -> succeeded | failed | paused | cancelled | lost
    task     pending -> training -> evaluating -> committed;   failed, skipped -> pending in a new run
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol, TypeVar


class RunState(StrEnum):
    """States of a run; a job shows one of its runs' states."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    SCHEDULING = "scheduling"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class TaskState(StrEnum):
    """States of a task."""

    PENDING = "pending"
    TRAINING = "training"
    EVALUATING = "evaluating"
    COMMITTED = "committed"
    FAILED = "failed"
    SKIPPED = "skipped"


class AttemptState(StrEnum):
    """States of an attempt: one Ray job."""

    SUBMITTING = "submitting"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    LOST = "lost"
    """The driver ended without saying how."""


class Reason(StrEnum):
    """Why a run failed or was cancelled."""

    NO_CAPACITY = "no_capacity"
    USER_ERROR = "user_error"
    DATA_ERROR = "data_error"
    OOM = "oom"
    WORKER_LOST = "worker_lost"
    CLUSTER_LOST = "cluster_lost"
    STORAGE_ERROR = "storage_error"
    DEADLINE = "deadline"
    INTERNAL = "internal"
    PARENT_FAILED = "parent_failed"
    """An earlier run of the job failed or was cancelled."""


FINAL_RUN_STATES = frozenset({RunState.CANCELLED, RunState.SUCCEEDED, RunState.FAILED})
UNFINISHED_RUN_STATES = frozenset(RunState) - FINAL_RUN_STATES
WAITING_RUN_STATES = frozenset({RunState.QUEUED, RunState.PAUSED})
AT_WORK_RUN_STATES = UNFINISHED_RUN_STATES - WAITING_RUN_STATES
"""Runs with a Ray job, which take a place."""
STOPPING_RUN_STATES = frozenset({RunState.PAUSING, RunState.CANCELLING})

_STARTED_ENDS = {RunState.SUCCEEDED, RunState.FAILED}
_STARTED_STOPS = {RunState.PAUSING, RunState.CANCELLING}
RUN_CHANGES: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.SUBMITTING, RunState.PAUSED, RunState.CANCELLED, RunState.FAILED}),
    RunState.SUBMITTING: frozenset(
        {RunState.SCHEDULING, RunState.RUNNING, RunState.QUEUED, *_STARTED_STOPS, *_STARTED_ENDS}
    ),
    RunState.SCHEDULING: frozenset({RunState.RUNNING, RunState.QUEUED, *_STARTED_STOPS, *_STARTED_ENDS}),
    RunState.RUNNING: frozenset({RunState.QUEUED, *_STARTED_STOPS, *_STARTED_ENDS}),
    # A stop can come too late: the last task may be committed, or the run may fail first.
    RunState.PAUSING: frozenset({RunState.PAUSED, RunState.CANCELLING, *_STARTED_ENDS}),
    RunState.PAUSED: frozenset({RunState.QUEUED, RunState.CANCELLED}),
    RunState.CANCELLING: frozenset({RunState.CANCELLED, *_STARTED_ENDS}),
    RunState.CANCELLED: frozenset(),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
}

_ATTEMPT_ENDS = {
    AttemptState.SUCCEEDED,
    AttemptState.FAILED,
    AttemptState.PAUSED,
    AttemptState.CANCELLED,
    AttemptState.LOST,
}
FINAL_ATTEMPT_STATES = frozenset(_ATTEMPT_ENDS)
ATTEMPT_CHANGES: Mapping[AttemptState, frozenset[AttemptState]] = {
    AttemptState.SUBMITTING: frozenset({AttemptState.PENDING, AttemptState.RUNNING, *_ATTEMPT_ENDS}),
    AttemptState.PENDING: frozenset({AttemptState.RUNNING, *_ATTEMPT_ENDS}),
    AttemptState.RUNNING: frozenset({AttemptState.PENDING, *_ATTEMPT_ENDS}),  # Ray may look back
    **{state: frozenset() for state in FINAL_ATTEMPT_STATES},
}

_OPEN_TASK_STATES = {
    TaskState.PENDING,
    TaskState.TRAINING,
    TaskState.EVALUATING,
    TaskState.FAILED,
    TaskState.SKIPPED,
}
TASK_CHANGES: Mapping[TaskState, frozenset[TaskState]] = {
    **{state: frozenset({*_OPEN_TASK_STATES, TaskState.COMMITTED} - {state}) for state in _OPEN_TASK_STATES},
    # a new run takes these back first
    TaskState.FAILED: frozenset({TaskState.PENDING}),
    TaskState.SKIPPED: frozenset({TaskState.PENDING}),
    TaskState.COMMITTED: frozenset(),
}


class HasState(Protocol):
    """A row with a state."""

    state: str


StateT = TypeVar("StateT", RunState, AttemptState, TaskState)


def change_state(row: HasState, name: str, new: StateT) -> None:
    """Move a run, attempt or task to another state; staying is allowed unless the state is final.

    name: how errors call the row. Raises ValueError for a change that is not in this file's tables.
    """
    changes: Mapping[StateT, frozenset[StateT]] = _CHANGES[type(new)]
    old = type(new)(row.state)
    if old == new and changes[old]:
        return
    if new not in changes[old]:
        allowed = ", ".join(sorted(changes[old])) or "nothing"
        raise ValueError(f"{name} cannot go from {old} to {new}; allowed: {allowed}")
    row.state = new


_CHANGES: Mapping[type, Mapping] = {  # type: ignore[type-arg]
    RunState: RUN_CHANGES,
    AttemptState: ATTEMPT_CHANGES,
    TaskState: TASK_CHANGES,
}
