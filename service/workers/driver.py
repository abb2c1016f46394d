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
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from service.adapters.storage import Storage, outcome_key, plan_key, worker_outcome_key
from service.memory.actor import NAMESPACE, start_memory
from service.specs import RunPlan
from service.workers.progress import find_progress, newest_checkpoint

MAX_WORKER_FAILURES = 3


def main() -> int:
    """Run one attempt and return the exit code."""
    parser = argparse.ArgumentParser(description="Run one attempt of a run (started by the control plane).")
    parser.add_argument("--run", required=True)
    parser.add_argument("--attempt", required=True, type=int)
    arguments = parser.parse_args()
    run_attempt(os.environ["CLPEFT_STORAGE_URL"], arguments.run, arguments.attempt)
    return 0


def run_attempt(storage_url: str, run_id: str, attempt: int) -> None:
    """Train the pending tasks of a run and write outcome.json.

    Raises what Ray Train raises when workers died more often than allowed: the caller's exit code then asks
    for another attempt.
    """
    storage = Storage(storage_url)
    plan = RunPlan.model_validate_json(storage.read_bytes(plan_key(run_id)))
    progress = find_progress(storage, plan, attempt)
    if progress.num_done == len(plan.tasks):
        storage.write_json(
            outcome_key(run_id, attempt), {"state": "succeeded", "reason": None, "message": ""}
        )
        return
    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=True)
    wait_s = float(os.environ.get("CLPEFT_CAPACITY_WAIT_S", "5"))
    missing = missing_capacity(plan.training.num_workers, wait_s)
    if missing:
        outcome = {"state": "failed", "reason": "no_capacity", "message": missing}
        storage.write_json(outcome_key(run_id, attempt), outcome)
        return
    checkpoint = newest_checkpoint(storage, plan, attempt, progress)
    memory_key = checkpoint or progress.memory_key
    memory = start_memory(storage_url, run_id, attempt, plan.generation, memory_key)
    num_gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    use_gpu = num_gpus >= plan.training.num_workers
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={
            "storage_url": storage_url,
            "run_id": run_id,
            "attempt": attempt,
            "memory": memory,
            "checkpoint": checkpoint,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=plan.training.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"a{attempt}",
            storage_path=_train_folder(storage, run_id),
            failure_config=FailureConfig(max_failures=MAX_WORKER_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
        outcome = storage.read_json(worker_outcome_key(run_id, attempt))
    except WorkerGroupError as error:
        if any(
            isinstance(e, RayActorError | WorkerHealthCheckFailedError)
            for e in error.worker_failures.values()
        ):
            raise  # a worker or its machine died; another attempt may succeed
        outcome = {"state": "failed", "reason": "internal", "message": str(error)[-2000:]}
    finally:
        ray.kill(memory)
    storage.write_json(outcome_key(run_id, attempt), outcome)


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

    train_tasks(config)


def _train_folder(storage: Storage, run_id: str) -> str:
    key = f"runs/{run_id}/train"
    if not storage.is_local:
        return storage.uri(key)
    folder = Path(urlparse(storage.uri(key)).path)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
