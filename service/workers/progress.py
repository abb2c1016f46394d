"""Where a run stands, read from storage alone: which tasks are complete and where to go on."""

from __future__ import annotations

import dataclasses
import re
from contextlib import suppress

from clcore.engine.errors import StateError
from clcore.engine.state import load_state
from service.adapters.manifest import STATE
from service.adapters.storage import Storage, desired_key, task_key, train_key
from service.adapters.version_files import read_manifest
from service.scratch import scratch_folder
from service.specs import RunPlan

_CHECKPOINT_NAME = re.compile(r"^task(\d{5})-step(\d{9})$")


def checkpoint_name(task_index: int, step: int) -> str:
    """Name a checkpoint folder so that names sort by progress."""
    return f"task{task_index:05d}-step{step:09d}"


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
        return f"{self.task_dir}/{STATE}" if self.task_dir else None


def find_progress(storage: Storage, plan: RunPlan, attempt: int, since: Progress | None = None) -> Progress:
    """Follow the complete manifests of the plan's tasks, each trained from the one before it.

    It begins at the version that was committed when the attempt began (desired.json). From there on the
    newest attempt wins that completed the next task from the same parent: what an older one completed from
    another parent while it should not have lived any more leads nowhere.
    since: what the attempt began with. Beyond it only its own manifests count: an earlier attempt that still
    lives may complete a task, whose memory this attempt does not have.
    """
    task_dir, num_done = _committed(storage, plan)
    oldest = 1
    if since is not None:
        task_dir, num_done, oldest = since.task_dir, since.num_done, attempt
    for task in plan.tasks[num_done:]:
        found = _newest_complete(storage, plan.run_id, range(attempt, oldest - 1, -1), task.index, task_dir)
        if found is None:
            break
        task_dir, num_done = found, num_done + 1
    version = read_manifest(storage, task_dir).memory_version if task_dir else 0
    return Progress(num_done, task_dir, version)


def _committed(storage: Storage, plan: RunPlan) -> tuple[str | None, int]:
    """Return the committed version to go on from, and how many of the plan's tasks it holds."""
    task_dir = plan.parent.task_dir if plan.parent else None
    try:
        desired = storage.read_json(desired_key(plan.run_id))
    except FileNotFoundError:
        return task_dir, 0
    committed: str | None = desired.get("parent", task_dir)
    if committed == task_dir or committed is None:
        return task_dir, 0
    newest = read_manifest(storage, committed).task_index
    return committed, [task.index for task in plan.tasks].index(newest) + 1


def _newest_complete(
    storage: Storage, run_id: str, attempts: range, task_index: int, parent_dir: str | None
) -> str | None:
    for number in attempts:
        key = task_key(run_id, number, task_index)
        with suppress(FileNotFoundError):
            if read_manifest(storage, key).parent_dir == parent_dir:
                return key
    return None


def newest_checkpoint(storage: Storage, plan: RunPlan, attempt: int, progress: Progress) -> str | None:
    """Find an earlier attempt's newest whole checkpoint of the task that is next; None if there is none.

    A checkpoint can be damaged when its writer died: only one whose files match their checksums counts.
    """
    wanted = plan.tasks[progress.num_done].index
    for number in range(attempt - 1, 0, -1):
        folder = f"{train_key(plan.run_id)}/a{number}"
        for name in reversed(storage.names(folder)):
            match = _CHECKPOINT_NAME.match(name)
            if match and int(match[1]) == wanted and _is_whole(storage, f"{folder}/{name}", plan.generation):
                return f"{folder}/{name}"
    return None


def _is_whole(storage: Storage, key: str, generation: str) -> bool:
    with scratch_folder() as folder:
        try:
            storage.get_folder(key, str(folder))
            load_state(folder, "training", generation=generation)
            load_state(folder, "memory", generation=generation)
        except (StateError, FileNotFoundError):  # files that were about to be deleted are gone
            return False
    return True
