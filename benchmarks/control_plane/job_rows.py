"""The rows of one job as the service would have left them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from service.db.tables import (
    Adapter,
    AdapterVersion,
    Alias,
    Attempt,
    Dataset,
    Event,
    Job,
    Metric,
    Run,
    Table,
    Task,
)
from service.jobs.states import (
    AT_WORK_RUN_STATES,
    FINAL_RUN_STATES,
    AttemptState,
    Reason,
    RunState,
    TaskState,
)
from service.planner import KnownDataset, plan_tasks
from service.specs import BaseModelSpec, JobSpec, PlannedDataset, TaskSpec

START = datetime(2026, 1, 1, tzinfo=UTC)
NUM_OWNERS = 20
MANY_TASKS = 100
SHARES = {
    RunState.SUCCEEDED: 0.62,
    RunState.FAILED: 0.1,
    RunState.CANCELLED: 0.1,
    RunState.QUEUED: 0.15,
    RunState.PAUSED: 0.03,
}
NUM_AT_WORK = 8
"""Jobs in the state running, whatever the number of jobs."""
Row = dict[str, Any]
TABLES: tuple[type[Table], ...] = (
    Dataset,
    Job,
    Run,
    Task,
    Attempt,
    Adapter,
    AdapterVersion,
    Alias,
    Event,
    Metric,
)
"""In the order in which their rows refer to others."""


class JobRows:
    """One job and everything that belongs to it."""

    def __init__(self, rng: random.Random, number: int, num_events: int) -> None:
        self.rng, self.number, self.num_events = rng, number, num_events
        self.id = made_id("job", number)
        self.name = f"support-{number:06d}"
        self.num_tasks = MANY_TASKS if number == 1 else 1 + number % 5
        if number in (0, 1):
            self.state = RunState.SUCCEEDED
        elif number < 2 + NUM_AT_WORK:
            self.state = RunState.RUNNING
        else:
            self.state = rng.choices(list(SHARES), list(SHARES.values()))[0]
        done = {RunState.SUCCEEDED: self.num_tasks, RunState.QUEUED: 0}
        self.num_committed = done.get(self.state, rng.randrange(self.num_tasks))
        self.num_runs = 2 if number % 4 == 0 else 1
        self.created = START + timedelta(minutes=7 * number)
        self.dataset = made_id("ds", number)
        self.spec, self.planned = _template(self.num_tasks)
        self.base_model = f"tiny-{number % 3}"

    def rows(self) -> Iterator[tuple[type[Table], Sequence[Row]]]:
        """Make the rows, table by table."""
        yield Dataset, [self._dataset()]
        yield Job, [self._job()]
        runs = [self._run(number) for number in range(1, self.num_runs + 1)]
        yield Run, runs
        yield Task, self._tasks()
        attempts = [row for run in runs for row in self._attempts(run)]
        yield Attempt, attempts
        if self.num_committed:
            yield Adapter, [self._adapter()]
            yield AdapterVersion, [self._version(index) for index in range(self.num_committed)]
            yield Alias, [self._alias()]
        events = self._events(attempts)
        yield Event, events
        yield Metric, [_metric(event) for event in events if event["type"] == "step"]

    def _dataset(self) -> Row:
        return {
            "id": self.dataset,
            "name": f"tickets-{self.number % 50}",
            "format": "completion",
            "num_rows": 240,
            "bytes": 48_000,
            "sha256": f"{self.number:064x}",
            "statistics": {"prompt_chars": {"p50": 180, "p95": 420}, "completion_chars": {"p50": 9}},
            "created_at": self.created,
        }

    def _job(self) -> Row:
        is_final = self.state in FINAL_RUN_STATES
        return {
            "id": self.id,
            "name": self.name,
            "adapter": self.name,
            "state": self.state,
            "reason": Reason.USER_ERROR if self.state == RunState.FAILED else None,
            "message": "the rows are too long" if self.state == RunState.FAILED else None,
            "spec": {**self.spec, "name": self.name, "base_model": {"id": self.base_model}},
            "base_model_path": f"/models/{self.base_model}",
            "base_model_id": self.base_model,
            "labels": {"team": f"team-{self.number % 7}"},
            "owner": f"owner-{self.number % NUM_OWNERS}",
            "priority": self.number % 3,
            "num_tasks": self.num_tasks,
            "num_committed": self.num_committed,
            "progress": {} if is_final else {"task": "topic-0", "task_index": 0, "step": 3, "loss": 1.25},
            "last_event": self.num_events,
            "created_at": self.created,
            "updated_at": self.created,
            "finished_at": self.created if is_final else None,
        }

    def _run(self, number: int) -> Row:
        is_last = number == self.num_runs
        state = self.state if is_last else RunState.SUCCEEDED
        indexes = list(range(self.num_tasks))
        cut = 1 if self.num_runs == 2 and self.num_tasks > 1 else 0
        ended = self.created if state in FINAL_RUN_STATES else None
        return {
            "id": made_id("run", 10 * self.number + number),
            "job_id": self.id,
            "number": number,
            "state": state,
            "reason": Reason.USER_ERROR if state == RunState.FAILED else None,
            "message": "the rows are too long" if state == RunState.FAILED else None,
            "task_indexes": indexes[cut:] if is_last else indexes[:cut],
            "attempts_without_commit": 0,
            "cleaned_at": ended,
            "created_at": self.created,
            "started_at": None if state == RunState.QUEUED else self.created,
            "finished_at": ended,
        }

    def _tasks(self) -> list[Row]:
        last_run = made_id("run", 10 * self.number + self.num_runs)
        return [
            {
                "id": made_id("task", 1000 * self.number + index),
                "job_id": self.id,
                "run_id": last_run,
                "index": index,
                "name": task["name"],
                "spec": task,
                "planned": plan,
                "dataset_id": task["dataset"],
                "eval_dataset_id": task["dataset"],
                "state": TaskState.COMMITTED if index < self.num_committed else TaskState.PENDING,
                "version": index + 1 if index < self.num_committed else None,
            }
            for index, (task, plan) in enumerate(zip(self.spec["tasks"], self.planned, strict=True))
        ]

    def _attempts(self, run: Row) -> list[Row]:
        if run["started_at"] is None:
            return []
        ends = {
            RunState.SUCCEEDED: AttemptState.SUCCEEDED,
            RunState.FAILED: AttemptState.FAILED,
            RunState.CANCELLED: AttemptState.CANCELLED,
            RunState.PAUSED: AttemptState.PAUSED,
        }
        states = [AttemptState.LOST] * (self.number % 3) + [ends.get(run["state"], AttemptState.RUNNING)]
        return [
            {
                "run_id": run["id"],
                "number": number,
                "submission_id": f"{run['id']}-a{number}",
                "state": state,
                "last_seq": 0,
                "created_at": self.created,
                "finished_at": None if run["state"] in AT_WORK_RUN_STATES else self.created,
            }
            for number, state in enumerate(states, start=1)
        ]

    def _adapter(self) -> Row:
        return {
            "name": self.name,
            "job_id": self.id,
            "latest_version": self.num_committed,
            "created_at": self.created,
            "updated_at": self.created,
        }

    def _alias(self) -> Row:
        return {
            "adapter": self.name,
            "alias": "live",
            "version": self.num_committed,
            "updated_at": self.created,
        }

    def _version(self, index: int) -> Row:
        run = made_id("run", 10 * self.number + self.num_runs)
        folder = f"runs/{run}/a1/tasks"
        return {
            "adapter": self.name,
            "version": index + 1,
            "job_id": self.id,
            "run_id": run,
            "attempt": 1,
            "task_index": index,
            "task_name": f"topic-{index}",
            "task_dir": f"{folder}/{index}",
            "manifest": self._manifest(run, index, f"{folder}/{index - 1}" if index else None),
            "manifest_sha256": "0" * 64,
            "created_at": self.created,
        }

    def _manifest(self, run: str, index: int, parent_dir: str | None) -> Row:
        names = [f"topic-{earlier}" for earlier in range(index + 1)]
        files = ("adapter/adapter_model.safetensors", *(f"predictions/{name}.jsonl" for name in names))
        return {
            "job_id": self.id,
            "run_id": run,
            "attempt": 1,
            "task_index": index,
            "task_name": names[-1],
            "adapter": self.name,
            "parent_dir": parent_dir,
            "base_model": {"id": self.base_model, "revision": None},
            "base_model_path": f"/models/{self.base_model}",
            "peft": self.spec["peft"],
            "strategy": [{"type": "none"}],
            "data_format": "completion",
            "files": {name: {"bytes": 1_000, "sha256": "0" * 64} for name in files},
            "dataset_sha256": {names[-1]: "0" * 64},
            "memory_version": index + 1,
            "scores": dict.fromkeys(names, 0.9),
            "base_scores": {names[-1]: 0.1},
            "num_eval_rows": dict.fromkeys(names, 100),
            "training": {"num_steps": 90.0, "final_loss": 0.4},
            "environment": {"torch": "2.0", "cpu": "a processor"},
            "code_version": "0.1.0",
            "created_at": self.created.isoformat(),
        }

    def _events(self, attempts: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The first two and the last are the control plane's own; the rest are a worker's, if one worked."""
        newest = attempts[-1] if attempts else None
        events: list[Row] = []
        per_task = -(-self.num_events // self.num_tasks)
        for number in range(1, self.num_events + 1):
            is_worker = newest is not None and 2 < number < self.num_events
            step = {"task": f"topic-{number // per_task}", "task_index": number // per_task, "step": number}
            measured = {"loss": 2.5 / number, "learning_rate": 1e-3, "tokens_per_s": 512.0}
            events.append(
                {
                    "job_id": self.id,
                    "id": number,
                    "run_id": newest["run_id"] if newest and is_worker else None,
                    "attempt": newest["number"] if newest and is_worker else None,
                    "seq": number - 2 if is_worker else None,
                    "time": self.created + timedelta(seconds=number),
                    "type": "step" if is_worker else "run.queued",
                    "data": {**step, **measured} if is_worker else {"number": number},
                }
            )
        return events


def _metric(event: Row) -> Row:
    data = event["data"]
    return {
        "job_id": event["job_id"],
        "task_index": data["task_index"],
        "step": data["step"],
        "attempt": event["attempt"],
        "time": event["time"],
        "data": {name: data[name] for name in ("loss", "learning_rate", "tokens_per_s")},
    }


@cache
def _template(num_tasks: int) -> tuple[Row, list[Row]]:
    """Return the specification and the planned tasks that jobs of so many tasks share."""
    dataset = made_id("ds", 0)
    tasks = tuple(TaskSpec(name=f"topic-{i}", dataset=dataset, epochs=3.0) for i in range(num_tasks))
    spec = JobSpec(name="template", base_model=BaseModelSpec(id="tiny"), tasks=tasks)
    planned = PlannedDataset(id=dataset, path=f"datasets/{dataset}/rows.jsonl", sha256="0" * 64, num_rows=240)
    known = {dataset: KnownDataset(planned, "completion")}
    plans = plan_tasks(tasks, training=spec.training, datasets=known)
    return spec.model_dump(mode="json"), [plan.model_dump(mode="json") for plan in plans]


def made_id(prefix: str, number: int) -> str:
    """Return an id of the service's form; ids sort by number."""
    return f"{prefix}_{0x640000000000 + number:013x}{number:010x}"
