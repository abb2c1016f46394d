"""One worker without Ray, for tests that need a run to stop or die at an exact moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from clcore.engine.memory import Row, State
from clcore.engine.state import as_arrays
from service.adapters.storage import Storage, worker_outcome_key
from service.memory.actor import MemoryActor
from service.specs import RunPlan
from service.workers import stops, train_loop
from service.workers.progress import find_progress, newest_checkpoint
from service.workers.stops import Stop


class Killed(BaseException):
    """What SIGKILL is to a process."""


class LocalMemory:
    """A MemoryStore over a memory actor in this process."""

    def __init__(self, actor: MemoryActor) -> None:
        self.actor = actor
        self.read, self.rows = actor.read, actor.rows

    def write(
        self,
        op_id: str,
        base_version: int,
        states: Mapping[str, State],
        rows: Mapping[str, Mapping[str, Row]],
    ) -> int:
        arrays = {key: as_arrays(state) for key, state in states.items()}
        return self.actor.write(
            op_id, base_version, arrays, {key: list(of_key) for key, of_key in rows.items()}
        )

    def snapshot(self, version: int, folder: Path) -> str:
        digest, files = self.actor.snapshot(version)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return digest


class Workplace:
    """One worker without Ray: what Ray Train, the driver and the memory actor do, as plain calls."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storage, self.looks, self.newest = storage, 0, None
        self.answer: Callable[[int], Stop | None] = lambda look: None  # noqa: ARG005
        self._folder = ""
        monkeypatch.setattr(stops, "READ_DESIRED_EVERY_S", 0.0)
        monkeypatch.setattr(stops, "read_stop", self._read_stop)
        monkeypatch.setattr(train_loop, "ActorMemory", LocalMemory)
        monkeypatch.setattr("ray.train.report", self._report)
        monkeypatch.setattr("ray.train.get_checkpoint", lambda: self.newest)
        monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")

    def start(self, plan: RunPlan, attempt: int) -> Callable[[], dict[str, Any]]:
        """Do what the driver does; returns what the workers do, once and again after a crash."""
        progress = find_progress(self.storage, plan, attempt)
        checkpoint = newest_checkpoint(self.storage, plan, attempt, progress)
        key = checkpoint or progress.memory_key
        actor = MemoryActor(self.storage.url, plan.run_id, attempt, plan.generation, key)
        config = {
            "storage_url": self.storage.url,
            "run_id": plan.run_id,
            "attempt": attempt,
            "memory": actor,
            "progress": progress,
            "checkpoint": checkpoint,
        }
        self.newest, self._folder = None, f"runs/{plan.run_id}/train/a{attempt}"

        def work() -> dict[str, Any]:
            self.looks = 0
            train_loop.train_tasks(config)
            outcome: dict[str, Any] = self.storage.read_json(worker_outcome_key(plan.run_id, attempt))
            return outcome

        return work

    def stop_at(self, number: int, stop: Stop) -> None:
        """Let the look of this number, from 1, see a stop."""
        self.answer = lambda look: stop if look == number else None

    def kill_at(self, number: int) -> None:
        """Let the worker die at the look of this number."""

        def die(look: int) -> None:
            if look == number:
                raise Killed

        self.answer = die

    def work_on(self) -> None:
        """Let no look see a stop."""
        self.answer = lambda look: None  # noqa: ARG005

    def _read_stop(self, *_: object) -> Stop | None:
        self.looks += 1
        return self.answer(self.looks)

    def _report(
        self,
        metrics: dict[str, Any],
        *,
        checkpoint: Any,
        checkpoint_dir_name: str,
        checkpoint_upload_fn: Callable[[Any, str], Any],
    ) -> None:
        assert metrics == {}
        target = f"{self._folder}/{checkpoint_dir_name}"
        assert not self.storage.find(target), "a checkpoint is reported once"
        self.newest = checkpoint_upload_fn(checkpoint, checkpoint_dir_name)
        assert self.storage.find(target), "it lies where Ray Train looks for it"
