"""One row or more of every table of the first schema revision, to be carried through all later ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FIRST_ROWS: dict[str, list[dict[str, Any]]] = {
    "datasets": [
        {
            "id": "ds_1",
            "name": "rows",
            "format": "completion",
            "num_rows": 3,
            "bytes": 2**40,
            "sha256": "0",
            "statistics": {"a": [1, None]},
            "created_at": NOW,
        },
    ],
    "jobs": [
        {
            "id": f"job_{n}",
            "name": "demo",
            "adapter": f"demo-{n}",
            "state": "succeeded",
            "reason": None,
            "message": "é\n" * 300,
            "spec": {"tasks": [{"name": "one"}]},
            "base_model_path": "/m",
            "base_model_id": "m",
            "labels": {},
            "num_tasks": 1,
            "num_committed": 1,
            "progress": {"step": 3},
            "created_at": NOW,
            "updated_at": NOW,
            "finished_at": None,
        }
        for n in (1, 2)
    ],
    "runs": [
        {
            "id": f"run_{n}",
            "job_id": f"job_{n}",
            "number": 1,
            "state": "succeeded",
            "reason": None,
            "message": None,
            "task_indexes": [0],
            "attempts_without_commit": 0,
            "cancel_requested_at": None,
            "created_at": NOW,
            "started_at": NOW,
            "finished_at": NOW,
        }
        for n in (1, 2)
    ],
    "attempts": [
        {
            "run_id": f"run_{n}",
            "number": 1,
            "submission_id": f"run_{n}-a1",
            "state": "succeeded",
            "reason": None,
            "message": None,
            "last_seq": 1,
            "created_at": NOW,
            "finished_at": NOW,
        }
        for n in (1, 2)
    ],
    "tasks": [
        {
            "id": "task_1",
            "job_id": "job_1",
            "run_id": "run_1",
            "index": 0,
            "name": "one",
            "spec": {},
            "planned": {},
            "dataset_id": "ds_1",
            "eval_dataset_id": "ds_1",
            "state": "committed",
            "version": 1,
        },
    ],
    "adapters": [
        {"name": "demo-1", "job_id": "job_1", "latest_version": 1, "created_at": NOW, "updated_at": NOW},
    ],
    "adapter_versions": [
        {
            "adapter": "demo-1",
            "version": 1,
            "job_id": "job_1",
            "run_id": "run_1",
            "attempt": 1,
            "task_index": 0,
            "task_name": "one",
            "task_dir": "runs/run_1/a1/tasks/0",
            "manifest": {"k": 0.1},
            "manifest_sha256": "0",
            "created_at": NOW,
        },
    ],
    "aliases": [{"adapter": "demo-1", "alias": "live", "version": 1, "updated_at": NOW}],
    "events": [  # of two jobs in turns; the first revision numbers them together
        {
            "id": number,
            "job_id": f"job_{job}",
            "run_id": None if seq is None else f"run_{job}",
            "attempt": None if seq is None else 1,
            "seq": seq,
            "time": NOW,
            "type": kind,
            "data": {"number": number},
        }
        for number, job, seq, kind in (
            (3, 1, None, "job.created"),
            (5, 2, None, "job.created"),
            (6, 2, 1, "step"),
            (7, 1, 1, "step"),
            (9, 1, None, "job.succeeded"),
        )
    ],
}
