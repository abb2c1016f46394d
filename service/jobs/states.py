"""States of jobs, runs, tasks and attempts, and which changes are legal."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """States of a run; a job shows one of its runs' states."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    SCHEDULING = "scheduling"
    RUNNING = "running"
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
AT_WORK_RUN_STATES = UNFINISHED_RUN_STATES - {RunState.QUEUED}

RUN_CHANGES: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.SUBMITTING, RunState.CANCELLED, RunState.FAILED}),
    RunState.SUBMITTING: frozenset(
        {RunState.SCHEDULING, RunState.RUNNING, RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED}
    ),
    RunState.SCHEDULING: frozenset(
        {RunState.SUBMITTING, RunState.RUNNING, RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED}
    ),
    RunState.RUNNING: frozenset(
        {RunState.SUBMITTING, RunState.CANCELLING, RunState.SUCCEEDED, RunState.FAILED}
    ),
    # A cancel can come too late: the last task may be committed, or the run may fail first.
    RunState.CANCELLING: frozenset({RunState.CANCELLED, RunState.SUCCEEDED, RunState.FAILED}),
    RunState.CANCELLED: frozenset(),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
}


def check_run_change(run_id: str, old: str, new: RunState) -> None:
    """Raise ValueError unless a run may go from one state to the other."""
    if new not in RUN_CHANGES[RunState(old)]:
        allowed = ", ".join(sorted(RUN_CHANGES[RunState(old)])) or "nothing"
        raise ValueError(f"run {run_id} cannot go from {old} to {new}; allowed: {allowed}")
