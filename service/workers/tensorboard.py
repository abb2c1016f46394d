"""A run's figures as TensorBoard event files in storage, for those who watch there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from service.adapters.storage import Storage, StorageError, tensorboard_key
from service.scratch import new_scratch_folder
from service.specs import RunPlan

logger = logging.getLogger(__name__)

UPLOAD_EVERY_S = 20.0
STEP_FIGURES = ("loss", "learning_rate", "tokens_per_s")


class Board:
    """Writes what a worker's events say; one per attempt, on rank 0.

    Tags: train/<figure> and curve/<task> over the optimizer steps of all tasks of the job, in a row; after
    each task score/<task> and general/perplexity at the step at which the task ended.
    """

    def __init__(self, storage: Storage, plan: RunPlan, attempt: int) -> None:
        self._storage, self._key = storage, tensorboard_key(plan.run_id, attempt)
        self._starts: dict[str, int] = {}
        total = 0
        for task in (*plan.earlier_tasks, *plan.tasks):
            self._starts[task.name] = total
            total += task.steps
            self._starts[f"{task.name}/end"] = total
        self._folder = new_scratch_folder()
        self._writer: SummaryWriter | None = None
        self._last_upload = time.monotonic()

    def write(self, type_: str, data: Mapping[str, Any]) -> None:
        """Write the figures of an event; events without figures are nothing to a board."""
        if type_ == "step":
            step = self._starts[data["task"]] + data["step"]
            for name in STEP_FIGURES:
                self._add(f"train/{name}", data[name], step)
        elif type_ == "task.curve":
            step = self._starts[data["task"]] + data["step"]
            for name, score in data["scores"].items():
                self._add(f"curve/{name}", score, step)
        elif type_ == "task.evaluated":
            step = self._starts[f"{data['task']}/end"]
            for name, score in data["scores"].items():
                self._add(f"score/{name}", score, step)
            if data["general"]:
                self._add("general/perplexity", 1 / data["general"]["after"], step)
            self._try_upload()
        if time.monotonic() - self._last_upload > UPLOAD_EVERY_S:
            self._try_upload()

    def close(self) -> None:
        """Upload the rest."""
        if self._writer:
            self._writer.close()
            self._upload(self._storage)
        self._folder.cleanup()

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is None:  # steps that a restarted worker repeats replace those it wrote before
            self._writer = SummaryWriter(self._folder.name, purge_step=step)
        self._writer.add_scalar(tag, value, step)

    def _try_upload(self) -> None:
        """Upload what there is; a store that is away gets it with the next upload."""
        try:
            self._upload(self._storage.without_patience())
        except StorageError as error:
            logger.warning("figures under %s wait for storage: %s", self._key, error)

    def _upload(self, storage: Storage) -> None:
        self._last_upload = time.monotonic()
        if self._writer:
            self._writer.flush()
            for name in sorted(os.listdir(self._folder.name)):
                with open(os.path.join(self._folder.name, name), "rb") as file:
                    storage.write_bytes(f"{self._key}/{name}", file.read())
