"""A job over HTTP on a real cluster: its driver is ended between two tasks, and a task is appended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.db.session import Sessions
from service.jobs.runner import RayJobRunner
from service.ray_head import RayHead
from service.settings import Settings
from tests.service.control import NDJSON, Service, run_service, wait_until
from tests.service.tiny import letter_rows, save_tiny_model

pytestmark = pytest.mark.ray
TIMEOUT_S = 240.0


@pytest.fixture
def live(settings: Settings, sessions: Sessions, ray_head: RayHead) -> Iterator[tuple[Service, RayJobRunner]]:
    """A control plane whose reconciler works against the cluster, with a tiny model that can be trained."""
    save_tiny_model(settings.models_dir / "letters")
    runner = RayJobRunner(ray_head.dashboard_url, token_path=ray_head.token_path)
    with run_service(settings, sessions, reconcile=True, real_runner=runner) as service:
        yield service, runner
    runner.close()


def task(service: Service, number: int) -> dict[str, Any]:
    """Upload rows of one kind and return a task over them."""
    rows = "".join(json.dumps(row) + "\n" for row in letter_rows(12, number + 1))
    answer = service.client.post("/v1/datasets", params={"name": f"t{number}"}, content=rows, headers=NDJSON)
    return {"name": f"t{number}", "dataset": answer.json()["id"], "steps": 4}


def versions(service: Service) -> list[tuple[int, int, int]]:
    """Version, task and attempt of every version."""
    answer = service.client.get("/v1/adapters/letters")
    rows = answer.json()["versions"] if answer.is_success else []
    return [(row["version"], row["task_index"], row["attempt"]) for row in rows]


def test_a_job_survives_its_driver_and_takes_another_task(live: tuple[Service, RayJobRunner]) -> None:
    service, runner = live
    body = {
        "name": "letters",
        "base_model": {"id": "letters"},
        "strategy": [
            {"type": "ewc", "fisher_sample_size": 8},
            {"type": "experience_replay", "buffer_size": 4},
        ],
        "tasks": [task(service, 0), task(service, 1) | {"steps": 60}],
        "training": {"num_workers": 2, "micro_batch_size": 4, "max_length": 32},
    }
    job = service.client.post("/v1/jobs", json=body).json()
    run = job["runs"][0]["id"]
    wait_until(lambda: versions(service) == [(1, 0, 1)], "the first version", TIMEOUT_S)
    runner.stop(f"{run}-a1")
    wait_until(lambda: service.job(job["id"])["state"] == "succeeded", "the job", TIMEOUT_S)
    assert versions(service) == [(1, 0, 1), (2, 1, 2)]

    appended = service.client.post(f"/v1/jobs/{job['id']}/tasks", json=task(service, 2)).json()
    seen: list[dict[str, Any]] = []
    path = f"{service.client.base_url}/v1/jobs/{job['id']}/events"
    with httpx.stream("GET", path, headers={"Accept": "text/event-stream"}, timeout=TIMEOUT_S) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: "))
        seen.extend(json.loads(line.removeprefix("data: ")) for line in lines)
    assert seen[-1]["type"] == "job.succeeded"
    assert [event["id"] for event in seen] == sorted(event["id"] for event in seen)
    trained = [(event["run_id"], event["data"]["task"]) for event in seen if event["type"] == "task.started"]
    assert [name for run_id, name in trained if run_id == appended["runs"][1]["id"]] == ["t2"]
    assert versions(service) == [(1, 0, 1), (2, 1, 2), (3, 2, 1)]

    matrix = service.client.get(f"/v1/jobs/{job['id']}/eval-matrix").json()
    assert matrix["tasks"] == ["t0", "t1", "t2"]
    assert all(score is not None for score in matrix["matrix"][2])
    assert None not in (matrix["average_accuracy"], matrix["forgetting"], matrix["bwt"])
    assert service.client.get(f"/v1/jobs/{job['id']}/logs").text
    assert service.client.get("/readyz").json()["status"] == "ready"
