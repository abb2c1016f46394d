"""The driver of one run attempt: python -m service.workers.driver --run <id> --attempt <n>, as one Ray job.

Starts the memory actor and one TorchTrainer.fit() for all pending tasks, then says in outcome.json how it
ended. It exits with 0 whenever the outcome is written; without an outcome the control plane starts another
attempt.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from service.adapters.logs import DRIVER, worker_process
from service.adapters.storage import (
    Storage,
    StorageError,
    outcome_key,
    plan_key,
    train_key,
    worker_outcome_key,
)
from service.adapters.store_calls import PATIENCE_S
from service.memory.actor import NAMESPACE, start_memory
from service.scratch import remove_abandoned_folders
from service.specs import RunPlan
from service.workers.log_shipping import shipped_log
from service.workers.progress import find_progress, newest_checkpoint
from service.workers.ray_storage import ray_filesystem
from service.workers.stops import read_stop

MAX_WORKER_FAILURES = 3
Outcome = Mapping[str, Any]
"""state, reason and message, as in outcome.json."""


def main() -> int:
    """Run one attempt and return the exit code."""
    parser = argparse.ArgumentParser(description="Run one attempt of a run (started by the control plane).")
    parser.add_argument("--run", required=True)
    parser.add_argument("--attempt", required=True, type=int)
    arguments = parser.parse_args()
    storage = Storage(os.environ["CLPEFT_STORAGE_URL"], patience_s=PATIENCE_S)
    with shipped_log(storage, arguments.run, arguments.attempt, DRIVER):
        run_attempt(storage, arguments.run, arguments.attempt)
    return 0


def run_attempt(storage: Storage, run_id: str, attempt: int) -> None:
    """Train the pending tasks of a run and write outcome.json.

    Raises what Ray Train raises when workers died more often than allowed, and StorageError when even the
    outcome cannot be written: the caller's exit code then asks for another attempt.
    """
    try:
        outcome = _stop_wanted(storage, run_id, attempt) or _train(storage, run_id, attempt)
    except StorageError as error:
        outcome = {"state": "failed", "reason": "storage_error", "message": str(error)}
    storage.write_json(outcome_key(run_id, attempt), outcome)


def _stop_wanted(storage: Storage, run_id: str, attempt: int) -> Outcome | None:
    """Return the outcome of an attempt that need not begin; None if it is to work."""
    try:
        stop = read_stop(storage, run_id, attempt)
    except FileNotFoundError:
        return None
    if stop is None:
        return None
    return {"state": stop.value, "reason": None, "message": f"{stop} before it began"}


def _train(storage: Storage, run_id: str, attempt: int) -> Outcome:
    """Run one fit over the pending tasks and return how it ended."""
    plan = RunPlan.model_validate_json(storage.read_bytes(plan_key(run_id)))
    progress = find_progress(storage, plan, attempt)
    if progress.num_done == len(plan.tasks):
        return {"state": "succeeded", "reason": None, "message": ""}
    # by this Ray Train's own actors find this cluster where the machine runs another one too
    address = {name: os.environ[name] for name in ("RAY_ADDRESS",) if name in os.environ}
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=True, runtime_env={"env_vars": address})
    wait_s = float(os.environ.get("CLPEFT_CAPACITY_WAIT_S", "5"))
    missing = missing_capacity(plan.training.num_workers, wait_s)
    if missing:
        return {"state": "failed", "reason": "no_capacity", "message": missing}
    checkpoint = newest_checkpoint(storage, plan, attempt, progress)
    memory_key = checkpoint or progress.memory_key
    memory = start_memory(storage.url, run_id, attempt, plan.generation, memory_key)
    num_gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    use_gpu = num_gpus >= plan.training.num_workers
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "storage_url": storage.url,
            "run_id": run_id,
            "attempt": attempt,
            "memory": memory,
            "progress": progress,
            "checkpoint": checkpoint,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=plan.training.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"a{attempt}",
            storage_path=train_key(run_id),
            storage_filesystem=ray_filesystem(storage),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[EndOnStorageError()],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        # what the workers said of their end counts more than that Ray could not start them again
        if storage.exists(worker_outcome_key(run_id, attempt)):
            return _worker_outcome(storage, run_id, attempt)
        return _failure(error)
    finally:
        ray.kill(memory)
    return _worker_outcome(storage, run_id, attempt)


def _worker_outcome(storage: Storage, run_id: str, attempt: int) -> Outcome:
    outcome: Outcome = storage.read_json(worker_outcome_key(run_id, attempt))
    return outcome


class EndOnStorageError(UserCallback):
    """Ends the fit when storage fails a worker: it has waited long enough, new workers would wait again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:  # noqa: ARG002
        """Called in Train's controller, where an exception ends the fit. Raises StorageError."""
        for error in worker_exceptions.values():
            if isinstance(error, StorageError):
                raise error


def _failure(error: TrainingFailedError) -> Outcome:
    """Say how a fit failed. Raises StorageError, and the error itself when another attempt may succeed."""
    causes = [error.controller_failure] if isinstance(error, ControllerError) else []
    if isinstance(error, WorkerGroupError):
        causes = list(error.worker_failures.values())
    for cause in causes:
        if isinstance(cause, StorageError):
            raise cause
        if isinstance(cause, RayActorError | WorkerHealthCheckFailedError):
            raise error  # a worker or its machine died
    if not isinstance(error, WorkerGroupError):
        raise error
    return {"state": "failed", "reason": "internal", "message": str(error)[-2000:]}


def missing_capacity(num_workers: int, wait_s: float) -> str | None:
    """Say what the cluster lacks for one CPU per worker, after wait_s seconds to grow; None if nothing."""
    deadline = time.monotonic() + wait_s
    while (num_cpus := ray.cluster_resources().get("CPU", 0)) < num_workers:  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            return f"num_workers {num_workers} needs {num_workers} CPUs, the cluster has {num_cpus:g}"
        request_resources(num_cpus=num_workers)  # an autoscaler grows the cluster for it
        time.sleep(0.5)
    return None


def train_loop(config: dict[str, Any]) -> None:
    """Run on every worker; what it imports takes seconds, which the driver and Ray's controller save."""
    from service.workers.train_loop import train_tasks

    remove_abandoned_folders()
    storage = Storage(config["storage_url"], patience_s=PATIENCE_S)
    rank = ray.train.get_context().get_world_rank()
    with shipped_log(storage, config["run_id"], config["attempt"], worker_process(rank, os.getpid())):
        train_tasks(config)


if __name__ == "__main__":
    sys.exit(main())
