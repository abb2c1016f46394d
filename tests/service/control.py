"""Parts for tests of the control plane: a real HTTP server, a scripted runner, and workers on paper."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import func, select

from service.adapters.storage import Storage, events_key, outcome_key, plan_key, task_key
from service.api.app import create_app
from service.db.session import Sessions
from service.db.tables import Table
from service.jobs.runner import JobRunner, RayJobState, RunnerUnreachable
from service.reconciler import Reconciler
from service.settings import Settings


@dataclass
class ScriptedRunner:
    """A Jobs API whose answers the test writes."""

    states: dict[str, RayJobState | None] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    entrypoints: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    is_reachable: bool = True

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        self.check()
        assert "CLPEFT_STORAGE_URL" in env
        self.submitted.append(submission_id)
        self.entrypoints[submission_id] = entrypoint
        self.states.setdefault(submission_id, RayJobState.RUNNING)

    def state(self, submission_id: str) -> RayJobState | None:
        self.check()
        return self.states.get(submission_id)

    def stop(self, submission_id: str) -> None:
        self.check()
        self.stopped.append(submission_id)

    def logs(self, submission_id: str) -> str | None:
        self.check()
        return f"log of {submission_id}\n" if submission_id in self.states else None

    def check(self) -> None:
        if not self.is_reachable:
            raise RunnerUnreachable("nothing answers")


@dataclass
class Service:
    """A control plane that answers over HTTP."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    runner: ScriptedRunner
    app: FastAPI
    client: httpx.Client

    @property
    def reconciler(self) -> Reconciler:
        """The application's reconciler."""
        reconciler: Reconciler = self.app.state.reconciler
        return reconciler

    def upload(self, name: str = "rows", num_rows: int = 10) -> str:
        """Upload prompt/completion rows and return the data set's id."""
        rows = "".join(
            json.dumps({"prompt": f"q{i}", "completion": f" a{i}"}) + "\n" for i in range(num_rows)
        )
        answer = self.client.post("/v1/datasets", params={"name": name}, content=rows, headers=NDJSON)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job_body(self, *task_names: str, name: str = "demo", **fields: Any) -> dict[str, Any]:
        """A job over fresh data sets, one task per name."""
        tasks = [{"name": task, "dataset": self.upload(task), "steps": 2} for task in task_names or ("one",)]
        return {"name": name, "base_model": {"id": "tiny"}, "tasks": tasks, **fields}

    def submit(self, *task_names: str, **fields: Any) -> dict[str, Any]:
        """Submit a job and return it."""
        answer = self.client.post("/v1/jobs", json=self.job_body(*task_names, **fields))
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        """Return the job as the API shows it."""
        return dict(self.client.get(f"/v1/jobs/{job_id}").json())

    def event_types(self, job_id: str) -> list[str]:
        """Return the types of all events of a job."""
        page = self.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 500}).json()
        assert not page["has_more"]
        return [event["type"] for event in page["data"]]

    def holdings(self) -> tuple[dict[str, int], list[str]]:
        """Count the rows of every table and list every object in storage."""
        with self.sessions.read() as session:
            tables = Table.metadata.sorted_tables
            counts = {
                table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables
            }
        root = self.storage.root
        found = self.storage.fs.find(root, withdirs=True) if self.storage.fs.exists(root) else []
        return counts, sorted(path for path in found if path not in (root, f"{root}/datasets"))


NDJSON = {"Content-Type": "application/x-ndjson"}


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Run the application under uvicorn on a free port; yields its address."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server to start")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def run_service(
    settings: Settings, sessions: Sessions, *, reconcile: bool = False, real_runner: JobRunner | None = None
) -> Iterator[Service]:
    """Serve a control plane; its Ray is scripted unless a real runner is given."""
    storage, runner = Storage(settings.storage_url), ScriptedRunner()
    app = create_app(
        settings, sessions=sessions, storage=storage, runner=real_runner or runner, reconcile=reconcile
    )
    with serve(app) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield Service(settings, sessions, storage, runner, app, client)


def wait_until(is_true: Any, what: str, timeout_s: float = 20.0) -> None:
    """Wait for a condition or fail."""
    end = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


def write_events(
    storage: Storage, run_id: str, attempt: int, first_seq: int, events: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Write one event segment as a worker does."""
    lines = [
        json.dumps({"seq": first_seq + i, "time": datetime.now(UTC).isoformat(), "type": kind, "data": data})
        for i, (kind, data) in enumerate(events)
    ]
    storage.write_bytes(
        f"{events_key(run_id, attempt)}/{first_seq:012d}.jsonl", "\n".join(lines).encode() + b"\n"
    )


def write_task(
    storage: Storage,
    run_id: str,
    attempt: int,
    index: int,
    *,
    scores: dict[str, float] | None = None,
    base_scores: dict[str, float] | None = None,
    parent_dir: str | None = None,
    predictions: Mapping[str, Sequence[float | tuple[float, int]]] | None = None,
    **changes: Any,
) -> str:
    """Write a finished task's folder with its manifest; returns the folder's key.

    predictions: the scores of each task's rows, as the worker leaves them.

    The parent is what the driver would continue from: this attempt's task before, else the plan's parent.
    """
    plan = storage.read_json(plan_key(run_id))
    task = next(task for task in plan["tasks"] if task["index"] == index)
    folder = task_key(run_id, attempt, index)
    if parent_dir is None and index > plan["tasks"][0]["index"]:
        parent_dir = task_key(run_id, attempt, index - 1)
    elif parent_dir is None and plan["parent"]:
        parent_dir = plan["parent"]["task_dir"]
    contents = {"adapter/adapter_model.safetensors": f"weights of {folder}".encode()}
    for name, values in (predictions or {}).items():
        lines = [
            json.dumps({"row": row, "answer": "", "reference": "", **_scored(value)})
            for row, value in enumerate(values)
        ]
        contents[f"predictions/{name}.jsonl"] = "\n".join(lines).encode()
    for path, data in contents.items():
        storage.write_bytes(f"{folder}/{path}", data)
    manifest = {
        "job_id": plan["job_id"],
        "run_id": run_id,
        "attempt": attempt,
        "task_index": index,
        "task_name": task["name"],
        "adapter": plan["adapter"],
        "parent_dir": parent_dir,
        "base_model": plan["base_model"],
        "base_model_path": plan["base_model_path"],
        "peft": plan["peft"],
        "strategy": plan["strategy"],
        "data_format": "completion",
        "files": {
            path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in contents.items()
        },
        "dataset_sha256": {task["name"]: task["dataset"]["sha256"]},
        "memory_version": index + 1,
        "scores": scores or {task["name"]: 1.0},
        "base_scores": base_scores or {},
        "num_eval_rows": {task["name"]: 10},
        "training": {"num_steps": 2.0},
        "environment": {},
        "code_version": "0.1.0",
        "created_at": datetime.now(UTC).isoformat(),
        **changes,
    }
    storage.write_json(f"{folder}/manifest.json", manifest)
    return folder


def _scored(value: float | tuple[float, int]) -> dict[str, float]:
    """A row's score, or its nll and tokens."""
    if isinstance(value, tuple):
        return {"nll": value[0], "num_tokens": value[1], "score": math.exp(-value[0] / value[1])}
    return {"score": value}


def write_outcome(storage: Storage, run_id: str, attempt: int, state: str, reason: str | None = None) -> None:
    """Write how a driver ended."""
    outcome = {"state": state, "reason": reason, "message": f"said {state}"}
    storage.write_json(outcome_key(run_id, attempt), outcome)
