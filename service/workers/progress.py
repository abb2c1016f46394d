"""Where a run stands, read from storage alone: which tasks are complete and where to go on."""

from __future__ import annotations

import dataclasses

from service.adapters.manifest import MANIFEST_NAME, Manifest
from service.adapters.storage import Storage, task_key
from service.specs import RunPlan


@dataclasses.dataclass(frozen=True)
class Progress:
    """The tasks of a plan that are complete, in order, and the version to go on from."""

    num_done: int
    task_dir: str | None
    """Storage folder of the newest complete version; None when training starts from a fresh adapter."""
    memory_version: int

    @property
    def memory_key(self) -> str | None:
        """Storage folder of the memory snapshot to go on from."""
        return f"{self.task_dir}/state" if self.task_dir else None


def find_progress(storage: Storage, plan: RunPlan, attempt: int) -> Progress:
    """Look for complete manifests of the plan's tasks in this attempt and earlier ones.

    The newest attempt that completed a task wins; tasks count as done only without a gap before them.
    """
    task_dir = plan.parent.task_dir if plan.parent else None
    num_done = 0
    for task in plan.tasks:
        found = _newest_complete(storage, plan.run_id, attempt, task.index)
        if found is None:
            break
        task_dir, num_done = found, num_done + 1
    version = read_manifest(storage, task_dir).memory_version if task_dir else 0
    return Progress(num_done, task_dir, version)


def read_manifest(storage: Storage, task_dir: str) -> Manifest:
    """Read the manifest of a task directory. Raises FileNotFoundError."""
    return Manifest.model_validate_json(storage.read_bytes(f"{task_dir}/{MANIFEST_NAME}"))


def _newest_complete(storage: Storage, run_id: str, attempt: int, task_index: int) -> str | None:
    for number in range(attempt, 0, -1):
        key = task_key(run_id, number, task_index)
        if storage.exists(f"{key}/{MANIFEST_NAME}"):
            return key
    return None
