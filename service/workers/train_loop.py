"""The function that Ray Train runs on every worker: the only bridge from Ray to clcore.

All workers walk the pending tasks together. Each task is trained, reported as a checkpoint, evaluated, and
written to storage by rank 0 with its manifest last. User and data errors end the run through the worker
outcome: raised, they would make Ray retry what cannot succeed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clcore.engine import parallel
from clcore.engine.adapters import assign_trained
from clcore.engine.errors import ClError, DataError, StateError
from clcore.engine.loop import FitResult, StepReport, TrainConfig, fit_task
from clcore.engine.memory import MemorySession
from clcore.engine.registry import build_strategy
from clcore.engine.strategy import Strategy, compose
from service.adapters.manifest import CurvePoint
from service.adapters.storage import Storage, plan_key, worker_outcome_key
from service.adapters.store_calls import PATIENCE_S
from service.memory.client import ActorMemory
from service.specs import PlannedTask, RunPlan
from service.workers.checkpoints import Checkpoints
from service.workers.events import EventWriter
from service.workers.model import LoadedModel, load_model
from service.workers.progress import Progress, find_progress
from service.workers.rows import encode_rows, read_rows
from service.workers.scoring import curve_point, curve_steps
from service.workers.stops import Stop, StoppedRun, StopSign
from service.workers.task_end import finish_task, measure_before
from service.workers.tensorboard import Board

T = TypeVar("T")


def train_tasks(config: dict[str, Any]) -> None:
    """Train, evaluate and store every pending task of a run. Runs on each worker of the group.

    A failure is written, then raised where other workers may wait for this one: Ray ends the group, and the
    next one finds the outcome and returns.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parallel.world_size()))
    storage = Storage(config["storage_url"], patience_s=PATIENCE_S)
    run_id, attempt = config["run_id"], config["attempt"]
    if storage.exists(worker_outcome_key(run_id, attempt)):
        return
    plan = RunPlan.model_validate_json(storage.read_bytes(plan_key(run_id)))
    events = EventWriter(storage, run_id, attempt) if parallel.rank() == 0 else None
    board = Board(storage, plan, attempt) if events and plan.logging.tensorboard else None
    failure: Exception | None = None
    try:
        memory = ActorMemory(config["memory"])
        worker = Worker(storage, plan, attempt, memory, events, board)
        worker.run(config["progress"], config["checkpoint"])
        outcome = {"state": "succeeded", "reason": None, "message": ""}
    except StoppedRun as stopped:  # on all workers
        outcome = {"state": stopped.stop.value, "reason": None, "message": str(stopped)}
    except (ClError, torch.OutOfMemoryError) as error:
        failure = error
        outcome = {"state": "failed", "reason": _reason(error), "message": str(error)}
    if board:
        board.close()
    if events:
        events.emit("run.finished", state=outcome["state"])
        events.flush()
    if events or failure:
        storage.write_json(worker_outcome_key(run_id, attempt), outcome)
    if failure and parallel.world_size() > 1:
        raise failure


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, DataError):
        return "data_error"
    return "internal" if isinstance(error, StateError) else "user_error"


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
        self.stop_sign = StopSign(storage.without_patience(), plan.run_id, attempt)
        self.checkpoints = Checkpoints(storage, plan, attempt, memory)
        self.loaded: LoadedModel

    def run(self, since: Progress, start_checkpoint: str | None) -> None:
        """Walk the tasks that are pending since the attempt began or a worker came back.

        Raises StoppedRun on all workers, ClError.
        """
        self.stop_if_asked()
        progress = on_rank0(lambda: find_progress(self.storage, self.plan, self.attempt, since))
        is_restart = self.events is not None and self.events.is_continued
        self.emit("run.started", num_workers=parallel.world_size(), is_restart=is_restart)
        self.loaded = load_model(self.storage, self.plan, progress.task_dir)
        resume = self.checkpoints.read(start_checkpoint)
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

    def flush_events(self) -> None:
        """Before a checkpoint: no worker trains its steps again, so what they measured must be stored.

        Raises StorageError.
        """
        if self.events:
            self.events.flush()

    def stop_if_asked(self) -> None:
        """Let all workers leave together. Raises StoppedRun on every worker."""
        stop = on_rank0(self.stop_sign.look)
        if stop is not None:
            raise StoppedRun(stop)

    @contextmanager
    def leaving_together(self) -> Iterator[None]:
        """Around what workers do apart: a stop that one of them saw is raised on all, once all are out."""
        seen: Stop | None = None
        try:
            yield
        except StoppedRun as stopped:
            seen = stopped.stop
        for stop in from_all_ranks(seen):
            if stop is not None:
                raise StoppedRun(stop)

    # ----------------------------------------------------------------------------------------------- one task

    def _do_task(
        self, task: PlannedTask, version: int, parent_dir: str | None, resume: Mapping[str, Any] | None
    ) -> tuple[int, str]:
        """Train unless a checkpoint says it is done, evaluate, store; return the new version and folder."""
        self.stop_if_asked()
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
                stop = on_rank0(lambda: self.stop_sign.seen)
                assert stop is not None
                raise StoppedRun(stop)
            summary, version = _summary(result), result.memory_version
            self.flush_events()
            self.checkpoints.report_trained(task, version, self.loaded.model, summary, curve)
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

        def on_checkpoint(state: dict[str, Any]) -> None:
            if on_rank0(lambda: self.stop_sign.seen) in (None, Stop.PAUSED):
                self.flush_events()
                self.checkpoints.report_training(task, version, state, curve)

        return fit_task(
            loaded.model,
            self._strategy(),
            dataset,
            task_id=task.name,
            config=_train_config(task, loaded),
            memory=session,
            resume=resume,
            on_step=on_step,
            should_stop=lambda: self.stop_sign.look() is not None,
            on_checkpoint=on_checkpoint,
        )

    def _strategy(self) -> Strategy:
        model = self.loaded.model
        return compose([build_strategy(spec.type, spec.params, model) for spec in self.plan.strategy])


def on_rank0(read: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every worker."""
    holder = [read() if parallel.rank() == 0 else None]
    if parallel.world_size() > 1:
        dist.broadcast_object_list(holder, src=0)
    return holder[0]  # type: ignore[return-value]


def from_all_ranks(value: T) -> list[T]:
    """Return every worker's value, in the order of ranks, on every worker."""
    values = [value] * parallel.world_size()
    if parallel.world_size() > 1:
        dist.all_gather_object(values, value)
    return values


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
