"""The function that Ray Train runs on every worker: the only bridge from Ray to clcore.

All workers walk the pending tasks together. Each task is trained, reported as a checkpoint, evaluated, and
written to storage by rank 0 with its manifest last. User and data errors end the run through the worker
outcome: raised, they would make Ray retry what cannot succeed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.adapters import assign_trained
from clcore.engine.errors import ClError, DataError, StateError
from clcore.engine.loop import FitResult, StepReport, TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.params import Params
from clcore.engine.registry import build_strategy
from clcore.engine.state import load_state, save_state
from clcore.engine.strategy import Strategy, compose
from service.adapters.manifest import CurvePoint
from service.adapters.storage import Storage, desired_key, plan_key, worker_outcome_key
from service.adapters.store_calls import PATIENCE_S
from service.memory.client import ActorMemory
from service.specs import PlannedTask, RunPlan
from service.workers.events import EventWriter
from service.workers.model import LoadedModel, load_model
from service.workers.progress import Progress, checkpoint_name, find_progress
from service.workers.rows import encode_rows, read_rows
from service.workers.scoring import curve_point, curve_steps
from service.workers.task_end import finish_task, measure_before
from service.workers.tensorboard import Board

READ_DESIRED_EVERY_S = 2.0


class CancelledRun(Exception):
    """The control plane asked this run to stop, and all workers agreed to."""


def train_tasks(config: dict[str, Any]) -> None:
    """Train, evaluate and store every pending task of a run. Runs on each worker of the group."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parallel.world_size()))
    storage = Storage(config["storage_url"], patience_s=PATIENCE_S)
    run_id, attempt = config["run_id"], config["attempt"]
    plan = RunPlan.model_validate_json(storage.read_bytes(plan_key(run_id)))
    events = EventWriter(storage, run_id, attempt) if parallel.rank() == 0 else None
    board = Board(storage, plan, attempt) if events and plan.logging.tensorboard else None
    try:
        memory = ActorMemory(config["memory"])
        Worker(storage, plan, attempt, memory, events, board).run(config["checkpoint"])
        outcome = {"state": "succeeded", "reason": None, "message": ""}
    except CancelledRun as error:
        outcome = {"state": "cancelled", "reason": None, "message": str(error)}
    except ClError as error:
        reason = "data_error" if isinstance(error, DataError) else "user_error"
        reason = "internal" if isinstance(error, StateError) else reason
        outcome = {"state": "failed", "reason": reason, "message": str(error)}
    except torch.OutOfMemoryError as error:
        outcome = {"state": "failed", "reason": "oom", "message": str(error)}
    if board:
        board.close()
    if events:
        events.emit("run.finished", state=outcome["state"])
        storage.write_json(worker_outcome_key(run_id, attempt), outcome)


class Worker:
    """One worker's view of a run attempt: what it has loaded and where it writes."""

    def __init__(
        self,
        storage: Storage,
        plan: RunPlan,
        attempt: int,
        memory: ActorMemory,
        events: EventWriter | None,
        board: Board | None,
    ) -> None:
        self.storage, self.plan, self.attempt = storage, plan, attempt
        self.memory, self.events, self.board = memory, events, board
        self.loaded: LoadedModel
        self._next_look = 0.0
        self._is_cancelled = False

    def run(self, start_checkpoint: str | None) -> None:
        """Walk the pending tasks. Raises CancelledRun, ClError."""
        progress: Progress = on_rank0(lambda: find_progress(self.storage, self.plan, self.attempt))
        self.emit("run.started", num_workers=parallel.world_size())
        self.loaded = load_model(self.storage, self.plan, progress.task_dir)
        resume = self._read_checkpoint(start_checkpoint)
        version, parent_dir = progress.memory_version, progress.task_dir
        for task in self.plan.tasks[progress.num_done :]:
            here = resume if resume and resume["task_index"] == task.index else None
            version, parent_dir = self._do_task(task, version, parent_dir, here)

    def emit(self, type_: str, *, flush: bool = True, **data: Any) -> None:
        """Write a progress event from rank 0; silent on other workers."""
        if self.events:
            self.events.emit(type_, flush=flush, **data)
        if self.board:
            self.board.write(type_, data)

    def is_cancelled(self) -> bool:
        """Read on rank 0, now and then, whether the control plane wants the run to stop."""
        if parallel.rank() == 0 and not self._is_cancelled and time.monotonic() >= self._next_look:
            desired = self.storage.read_json(desired_key(self.plan.run_id))
            self._is_cancelled = desired["state"] == "cancelled"
            self._next_look = time.monotonic() + READ_DESIRED_EVERY_S
        return self._is_cancelled

    def stop_if_cancelled(self) -> None:
        """Let all workers leave together. Raises CancelledRun on every worker."""
        if parallel.from_rank0(int(self.is_cancelled())):
            raise CancelledRun("cancelled on request")

    # ----------------------------------------------------------------------------------------------- one task

    def _do_task(
        self, task: PlannedTask, version: int, parent_dir: str | None, resume: Mapping[str, Any] | None
    ) -> tuple[int, str]:
        """Train unless a checkpoint says it is done, evaluate, store; return the new version and folder."""
        self.stop_if_cancelled()
        self.emit("task.started", task=task.name, task_index=task.index, num_steps=task.steps)
        before = measure_before(self, task)
        curve = [CurvePoint.model_validate(point) for point in (resume or {}).get("curve", [])]
        if resume and resume["phase"] == "trained":
            values = {name: torch.as_tensor(value) for name, value in resume["params"].items()}
            assign_trained(self.loaded.model, values)
            summary, version = dict(resume["summary"]), int(resume["memory_version"])
        else:
            result = self._train(task, version, resume["training"] if resume else None, curve)
            if result.is_stopped:
                raise CancelledRun(f"cancelled on request during task {task.name!r}")
            summary, version = _summary(result), result.memory_version
            self._report_trained(task, summary, version, curve)
        self.emit(
            "task.trained", task=task.name, task_index=task.index, seconds=summary["train_s"], **summary
        )
        folder = finish_task(self, task, version, parent_dir, summary, before, curve)
        return version, folder

    def _train(
        self, task: PlannedTask, version: int, resume: Mapping[str, Any] | None, curve: list[CurvePoint]
    ) -> FitResult:
        """Train a task; adds to curve the points that the job asks for."""
        loaded, training = self.loaded, task.training
        rows = read_rows(self.storage, task.dataset)
        dataset = encode_rows(rows, task.dataset, loaded.tokenizer, training.max_length)
        session = MemorySession(
            self.memory,
            version=version,
            op_id=f"{self.plan.run_id}/{task.index}",
            seed=training.seed,
            encode=lambda row, ref: loaded.encode(row, ref, training.max_length),
        )

        points = curve_steps(task.steps, self.plan.evaluation.curve_points)

        def on_step(report: StepReport) -> None:
            self.emit(
                "step",
                flush=report.step == report.num_steps,
                task=task.name,
                task_index=task.index,
                step=report.step,
                num_steps=report.num_steps,
                loss=report.loss,
                learning_rate=report.learning_rate,
                tokens_per_s=report.tokens_per_s,
                eta_s=report.eta_s,
            )
            if report.step in points:
                curve.append(curve_point(self, task, report.step))
                self.emit("task.curve", task=task.name, task_index=task.index, **curve[-1].model_dump())

        return fit_task(
            loaded.model,
            self._strategy(),
            dataset,
            task_id=task.name,
            config=_train_config(task, loaded),
            memory=session,
            resume=resume,
            on_step=on_step,
            should_stop=self.is_cancelled,
            on_checkpoint=lambda state: self._report_training(task, version, state, curve),
        )

    def _strategy(self) -> Strategy:
        model = self.loaded.model
        return compose([build_strategy(spec.type, spec.params, model) for spec in self.plan.strategy])

    # -------------------------------------------------------------------------------------------- checkpoints

    def _report_training(
        self, task: PlannedTask, version: int, training: dict[str, Any], curve: Sequence[CurvePoint]
    ) -> None:
        state = {
            "task_index": task.index,
            "phase": "training",
            "memory_version": version,
            "training": training,
            "curve": [point.model_dump() for point in curve],
        }
        self._report(checkpoint_name(task.index, training["step"]), version, state)

    def _report_trained(
        self, task: PlannedTask, summary: dict[str, float], version: int, curve: Sequence[CurvePoint]
    ) -> None:
        state = {
            "task_index": task.index,
            "phase": "trained",
            "memory_version": version,
            "summary": summary,
            "params": Params.of(self.loaded.model).copies(),
            "curve": [point.model_dump() for point in curve],
        }
        self._report(checkpoint_name(task.index, task.steps), version, state)

    def _report(self, name: str, version: int, state: dict[str, Any]) -> None:
        """Hand a checkpoint to Ray Train on all workers: the state and its memory, together."""
        if parallel.rank() != 0:
            ray.train.report({}, checkpoint=None, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.memory.snapshot(version, Path(folder))
            save_state(Path(folder), "training", state, generation=self.plan.generation)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({}, checkpoint=checkpoint, checkpoint_dir_name=name)

    def _read_checkpoint(self, start_checkpoint: str | None) -> dict[str, Any] | None:
        """Read this attempt's newest checkpoint, else the one that the attempt started from."""
        own = ray.train.get_checkpoint()
        if own is not None:
            with own.as_directory() as folder:
                return load_state(Path(folder), "training", generation=self.plan.generation)
        if start_checkpoint is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            self.storage.get_folder(start_checkpoint, folder)
            return load_state(Path(folder), "training", generation=self.plan.generation)


def on_rank0(read: Any) -> Any:
    """Call a function on rank 0 and return its result on every worker."""
    holder = [read() if parallel.rank() == 0 else None]
    if parallel.world_size() > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _train_config(task: PlannedTask, loaded: LoadedModel) -> TrainConfig:
    training = task.training
    return TrainConfig(
        num_steps=task.steps,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        precision=training.precision,
        backend=training.backend,
        seed=training.seed,
        checkpoint_every_steps=training.checkpoint_every_steps,
        pad_token_id=loaded.pad_token_id,
    )


def _summary(result: FitResult) -> dict[str, float]:
    """Flatten a fit's result to numbers for the manifest."""
    return {
        "num_steps": float(result.num_steps),
        "label_tokens": float(result.label_tokens),
        "total_tokens": float(result.total_tokens),
        "replay_tokens": float(result.replay_tokens),
        "final_loss": result.final_loss,
        "train_s": result.train_s,
        "strategy_s": result.strategy_s,
        **{f"strategy/{name}": float(value) for name, value in result.metrics.items()},
    }
