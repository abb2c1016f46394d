"""Checkpoints of a run, inside a task and at its end: written through Ray Train, read from it or storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import ray.train
from torch import nn

from clcore.engine import parallel
from clcore.engine.params import Params
from clcore.engine.state import load_state, save_state
from service.adapters.manifest import CurvePoint
from service.adapters.storage import Storage, train_key
from service.memory.client import ActorMemory
from service.scratch import scratch_folder
from service.specs import PlannedTask, RunPlan
from service.workers.progress import checkpoint_name
from service.workers.ray_storage import ray_filesystem


class Checkpoints:
    """Writes one attempt's checkpoints: training state and the memory that it needs, together."""

    def __init__(self, storage: Storage, plan: RunPlan, attempt: int, memory: ActorMemory) -> None:
        self._storage, self._plan, self._memory = storage, plan, memory
        self._folder = f"{train_key(plan.run_id)}/a{attempt}"
        own = ray.train.get_checkpoint()
        self._last_name = PurePosixPath(own.path).name if own else None

    def read(self, start_checkpoint: str | None) -> dict[str, Any] | None:
        """Read this attempt's newest checkpoint, else the one that the attempt started from."""
        own = ray.train.get_checkpoint()
        # the path is a storage key (ray_storage.py); Ray's own as_directory() leaves a lock file behind
        key = start_checkpoint if own is None else own.path.strip("/")
        if key is None:
            return None
        with scratch_folder() as folder:
            self._storage.get_folder(key, str(folder))
            return load_state(folder, "training", generation=self._plan.generation)

    def report_training(
        self, task: PlannedTask, version: int, training: dict[str, Any], curve: Sequence[CurvePoint]
    ) -> None:
        """Keep the state between two steps of a task. version: the memory that the task started from."""
        state = {
            "task_index": task.index,
            "phase": "training",
            "memory_version": version,
            "training": training,
            "curve": [point.model_dump() for point in curve],
        }
        self._report(checkpoint_name(task.index, training["step"]), version, state)

    def report_trained(
        self,
        task: PlannedTask,
        version: int,
        model: nn.Module,
        summary: dict[str, float],
        curve: Sequence[CurvePoint],
    ) -> None:
        """Keep the trained adapter: what follows is evaluation only. version: the task's own memory."""
        state = {
            "task_index": task.index,
            "phase": "trained",
            "memory_version": version,
            "summary": summary,
            "params": Params.of(model).copies(),
            "curve": [point.model_dump() for point in curve],
        }
        self._report(checkpoint_name(task.index, task.steps), version, state)

    def _report(self, name: str, version: int, state: dict[str, Any]) -> None:
        """Hand a checkpoint to Ray Train on all workers, once under one name."""
        if name == self._last_name:  # a stop right after a checkpoint
            return
        self._last_name = name
        if parallel.rank() != 0:
            ray.train.report({}, checkpoint=None, checkpoint_dir_name=name)
            return
        with scratch_folder() as folder:
            self._memory.snapshot(version, folder)
            save_state(folder, "training", state, generation=self._plan.generation)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {}, checkpoint=checkpoint, checkpoint_dir_name=name, checkpoint_upload_fn=self._upload
            )

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Store a checkpoint: Ray's own upload, by pyarrow, takes a file that cannot be stored for stored.

        Raises StorageError.
        """
        key = f"{self._folder}/{name}"
        self._storage.put_folder(checkpoint.path, key)
        return ray.train.Checkpoint(key, ray_filesystem(self._storage))
