"""Jobs over HTTP: submitting, appending, cancelling, retrying, and what is refused without a trace."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import httpx
import pytest

from clcore.engine.registry import STRATEGIES
from service.jobs.runner import RayJobState
from tests.service.control import Service, write_events, write_outcome, write_task


def refused(service: Service, body: dict[str, Any], status: int, pointer: str, says: str) -> None:
    """Submit, and check that the refusal points at the value and that nothing was stored."""
    before = service.holdings()
    answer = service.client.post(
        "/v1/jobs", content=dumps(body), headers={"Content-Type": "application/json"}
    )
    problem = answer.json()
    assert answer.status_code == status, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert pointer in [error["pointer"] for error in problem["errors"]], problem
    assert says in problem["errors"][0]["detail"], problem
    assert service.holdings() == before


def dumps(body: dict[str, Any]) -> str:
    """JSON with NaN written as Python and many clients write it."""
    import json

    return json.dumps(body, allow_nan=True)


def finish(service: Service, job: dict[str, Any]) -> None:
    """Let the job's newest run train all its tasks."""
    service.reconciler.tick()
    run = service.client.get(f"/v1/jobs/{job['id']}/runs").json()["data"][-1]
    for index in run["task_indexes"]:
        write_task(service.storage, run["id"], 1, index)
    write_outcome(service.storage, run["id"], 1, "succeeded")
    service.reconciler.tick()


def test_a_submitted_job_is_shown_with_resolved_defaults_tasks_and_a_queued_run(service: Service) -> None:
    job = service.submit("one", "two", strategy={"type": "ewc"}, labels={"team": "a"})
    assert service.job(job["id"]) == job
    assert (job["state"], job["adapter"], job["num_tasks"], job["num_committed"]) == ("queued", "demo", 2, 0)
    assert [task["name"] for task in job["tasks"]] == ["one", "two"]
    assert [run["task_indexes"] for run in job["runs"]] == [[0, 1]]
    assert job["spec"]["strategy"][0]["type"] == "ewc"
    assert len(job["spec"]["strategy"][0]) > 1  # the defaults of its parameters
    assert service.event_types(job["id"]) == ["job.created", "run.queued"]


@pytest.mark.parametrize(
    ("changes", "pointer", "says"),
    [
        ({"strategy": {"type": "magic"}}, "/strategy/0", f"'magic'; known: {', '.join(sorted(STRATEGIES))}"),
        ({"strategy": {"type": "ewc", "colour": 1}}, "/strategy/0", "colour"),
        ({"strategy": {"type": "ewc", "ewc_lambda": math.nan}}, "/strategy/0/ewc_lambda", "finite"),
        ({"strategy": {"type": "ewc", "ewc_lambda": "much"}}, "/strategy/0/ewc_lambda", "much"),
        ({"strategy": [{"type": "none"}, {"type": "ewc"}]}, "/strategy", "'none'"),
        ({"base_model": {"id": "huge"}}, "/base_model/id", "'huge'; prepared here: tiny"),
        ({"base_model": {"id": "../tiny"}}, "/base_model/id", "no model id"),
        ({"base_model": {"id": "/etc"}}, "/base_model/id", "no model id"),
        ({"base_model": {"id": "tiny", "revision": "main"}}, "/base_model/revision", "no revisions"),
        ({"training": {"learning_rate": 0}}, "/training/learning_rate", "greater than 0, got 0"),
        ({"training": {"learning_rate": math.nan}}, "/training/learning_rate", "finite number"),
        ({"training": {"learning_rate": -1}}, "/training/learning_rate", "greater than 0"),
        ({"training": {"backend": "fsdp"}}, "/training/backend", "'fsdp' is not available yet; use 'ddp'"),
        ({"training": {"num_workers": 9}}, "/training/batch_size", "at least 9"),
        ({"training": {"speed": 9}}, "/training/speed", "unknown field"),
        ({"name": "../x"}, "/name", "pattern"),
        ({"adapter": "a/b"}, "/adapter", "pattern"),
        ({"tasks": []}, "/tasks", "1 to 1000 tasks, got 0"),
        ({"promotion": {"alias": "v7"}}, "/promotion/alias", "'v7' looks like a version"),
        ({"peft": {"type": "lora", "target_modules": []}}, "/peft/target_modules", "at least 1"),
        ({"training": {"learning_rate": True}}, "/training/learning_rate", "valid number, got True"),
        ({"training": {"batch_size": "8"}}, "/training/batch_size", "valid integer, got '8'"),
        ({"labels": {"a": "\ud800"}}, "/", "half of a surrogate pair"),
        ({"tasks": [{"name": "one", "dataset": "ds_1", "overrides": {"\udfff": 1}}]}, "/", "surrogate"),
    ],
)
def test_a_bad_job_is_refused_and_nothing_is_stored(
    service: Service, changes: dict[str, Any], pointer: str, says: str
) -> None:
    refused(service, service.job_body("one") | changes, 422, pointer, says)


@pytest.mark.parametrize(
    ("changes", "pointer", "says"),
    [
        ({"steps": -1}, "/tasks/0/steps", "greater than 0, got -1"),
        ({"steps": 2, "epochs": 1}, "/tasks/0", "not both"),
        ({"epochs": math.inf, "steps": None}, "/tasks/0/epochs", "finite"),
        ({"name": "two/../x"}, "/tasks/0/name", "pattern"),
        ({"dataset": "ds_0"}, "/tasks/0/dataset", "no data set 'ds_0'"),
        ({"eval_dataset": "ds_0"}, "/tasks/0/eval_dataset", "no data set 'ds_0'"),
        ({"dataset": "/etc/passwd"}, "/tasks/0/dataset", "path or URL"),
        ({"dataset": "https://example.org/rows.jsonl"}, "/tasks/0/dataset", "path or URL"),
        ({"overrides": {"learning_rate": 0}}, "/tasks/0/overrides/learning_rate", "greater than 0"),
        ({"overrides": {"learning_rate": math.nan}}, "/tasks/0/overrides/learning_rate", "finite"),
        ({"overrides": {"num_workers": 2}}, "/tasks/0/overrides/num_workers", "cannot differ"),
        ({"overrides": {"colour": 2}}, "/tasks/0/overrides/colour", "cannot differ"),
    ],
)
def test_a_bad_task_is_refused_and_nothing_is_stored(
    service: Service, changes: dict[str, Any], pointer: str, says: str
) -> None:
    body = service.job_body("one")
    body["tasks"][0].update(changes)
    refused(service, body, 422, pointer, says)


def test_two_tasks_of_one_name_are_refused(service: Service) -> None:
    refused(service, service.job_body("one", "one"), 422, "/tasks", "duplicate task name: one")


def test_a_body_that_is_no_json_or_too_large_is_refused(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    broken = service.client.post("/v1/jobs", content="{", headers=headers)
    large = service.client.post("/v1/jobs", content="[" + "1," * 3_000_000 + "1]", headers=headers)
    assert (broken.status_code, broken.json()["code"]) == (422, "invalid")
    assert "the body is not JSON" in broken.json()["detail"]
    assert (large.status_code, large.headers["content-type"]) == (413, "application/problem+json")


def test_a_hub_model_that_cannot_be_confirmed_is_refused(service: Service) -> None:
    body = service.job_body("one") | {"base_model": {"id": "no-such-org/no-such-model"}}
    refused(service, body, 422, "/base_model/id", "prepared here")


def test_an_adapter_name_belongs_to_one_job(service: Service) -> None:
    job = service.submit("one")
    before = service.holdings()
    body = {
        "name": "demo",
        "base_model": {"id": "tiny"},
        "tasks": [{"name": "a", "dataset": job["tasks"][0]["dataset_id"]}],
    }
    answer = service.client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "adapter_name_taken")
    assert job["id"] in answer.json()["detail"]
    assert service.holdings() == before
    assert service.client.post("/v1/jobs", json=body | {"adapter": "other"}).status_code == 201


def test_who_finds_a_name_taken_learns_what_that_job_still_allows(service: Service) -> None:
    body = service.job_body("one")
    job_id = service.client.post("/v1/jobs", json=body).json()["id"]

    def advice() -> str:
        return str(service.client.post("/v1/jobs", json=body).json()["detail"]).partition(job_id)[2]

    other = "give another name in `adapter`"
    assert advice() == f": append tasks to it with POST /v1/jobs/{job_id}/tasks, or {other}"
    service.reconciler.tick()
    write_outcome(service.storage, service.job(job_id)["runs"][0]["id"], 1, "failed", "user_error")
    service.reconciler.tick()
    assert advice() == f", which failed: retry it with POST /v1/jobs/{job_id}:retry, or {other}"
    service.client.post(f"/v1/jobs/{job_id}:retry")
    service.client.post(f"/v1/jobs/{job_id}:cancel")
    assert advice() == f", which is cancelled: {other}"


def test_plan_shows_the_resolved_job_and_stores_nothing(service: Service) -> None:
    body = service.job_body("one")
    body["tasks"][0] = {"name": "one", "dataset": body["tasks"][0]["dataset"], "epochs": 2.5}
    before = service.holdings()
    plan = service.client.post("/v1/jobs:plan", json=body).json()
    assert plan["num_steps"] == 4  # 10 rows * 2.5 epochs / batches of 8 = 3.125
    assert plan["tasks"][0]["eval_dataset"] == plan["tasks"][0]["dataset"]
    assert plan["spec"]["adapter"] == "demo"
    assert service.holdings() == before
    assert service.client.post("/v1/jobs", json=body).status_code == 201
    again = service.client.post("/v1/jobs:plan", json=body)
    assert (again.status_code, again.json()["code"]) == (409, "adapter_name_taken")


def test_jobs_are_listed_in_pages_by_order_and_status(service: Service) -> None:
    ids = [service.submit(name=f"job{i}")["id"] for i in range(5)]
    service.client.post(f"/v1/jobs/{ids[1]}:cancel")

    def listed(**params: Any) -> list[str]:
        found, after = [], None
        while True:
            page = service.client.get(
                "/v1/jobs", params={**params, **({"after": after} if after else {})}
            ).json()
            found += [job["id"] for job in page["data"]]
            after = page["next_cursor"]
            if not page["has_more"]:
                return found

    assert listed(limit=2) == ids[::-1]
    assert listed(limit=2, order="asc") == ids
    assert listed(limit=1, status="cancelled") == [ids[1]]
    assert listed(status="queued", order="asc") == [ids[0], *ids[2:]]
    bad = service.client.get("/v1/jobs", params={"status": "asleep"})
    assert bad.status_code == 422
    assert "'queued'" in bad.json()["detail"]
    assert service.client.get("/v1/jobs", params={"limit": 101}).status_code == 422


@pytest.mark.parametrize(
    "path", ["jobs/job_x", "jobs/job_x/runs", "jobs/job_x/events", "jobs/job_x/logs", "runs/run_x"]
)
def test_an_unknown_id_is_404(service: Service, path: str) -> None:
    answer = service.client.get(f"/v1/{path}")
    assert answer.status_code == 404
    assert "_x" in answer.json()["detail"]


def test_a_task_appended_to_a_finished_job_continues_from_its_newest_version(service: Service) -> None:
    job = service.submit("one", "two")
    finish(service, job)
    assert service.job(job["id"])["state"] == "succeeded"
    task = {"name": "three", "dataset": service.upload(), "steps": 3}
    appended = service.client.post(f"/v1/jobs/{job['id']}/tasks", json=task)
    assert appended.status_code == 201, appended.text
    assert (appended.json()["state"], appended.json()["num_tasks"]) == ("queued", 3)
    service.reconciler.tick()
    run = appended.json()["runs"][1]["id"]
    plan = service.storage.read_json(f"runs/{run}/plan.json")
    assert [task["name"] for task in plan["tasks"]] == ["three"]
    assert [task["name"] for task in plan["earlier_tasks"]] == ["one", "two"]
    assert plan["parent"] == {"version": 2, "task_dir": f"runs/{job['runs'][0]['id']}/a1/tasks/1"}
    finish(service, job)
    assert service.job(job["id"])["tasks"][2]["version"] == 3
    assert service.job(job["id"])["state"] == "succeeded"


def test_tasks_appended_to_an_active_job_wait_for_the_run_before(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    body = {
        "tasks": [
            {"name": "two", "dataset": service.upload()},
            {"name": "three", "dataset": service.upload()},
        ]
    }
    assert service.client.post(f"/v1/jobs/{job['id']}/tasks", json=body).status_code == 201
    service.reconciler.tick()
    assert [run["state"] for run in service.job(job["id"])["runs"]] == ["scheduling", "queued"]
    first = job["runs"][0]["id"]
    write_task(service.storage, first, 1, 0)
    service.reconciler.tick()
    assert [run["state"] for run in service.job(job["id"])["runs"]] == ["succeeded", "scheduling"]


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        ({"name": "one"}, "/name", "duplicate task name: one"),
        ({"name": "two", "steps": -1}, "/steps", "greater than 0"),
        ({"name": "two", "dataset": "ds_0"}, "/dataset", "no data set 'ds_0'"),
        ({"name": "two", "dataset": "s3://b/rows"}, "/dataset", "path or URL"),
        ({"name": "two", "colour": 1}, "/colour", "unknown field"),
    ],
)
def test_a_bad_task_is_not_appended(service: Service, body: dict[str, Any], pointer: str, says: str) -> None:
    job = service.submit("one")
    task = {"dataset": job["tasks"][0]["dataset_id"], **body}
    before = service.holdings()
    for sent, prefix in ((task, ""), ({"tasks": [task]}, "/tasks/0")):
        answer = service.client.post(f"/v1/jobs/{job['id']}/tasks", json=sent)
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["pointer"] == prefix + pointer
        assert says in answer.json()["errors"][0]["detail"]
    assert service.holdings() == before


def test_a_cancelled_or_failed_job_takes_no_tasks(service: Service) -> None:
    cancelled, failed = service.submit(name="a"), service.submit(name="b")
    assert service.client.post(f"/v1/jobs/{cancelled['id']}:cancel").json()["state"] == "cancelled"
    service.reconciler.tick()
    write_outcome(service.storage, failed["runs"][0]["id"], 1, "failed", "data_error")
    service.reconciler.tick()
    task = {"name": "two", "dataset": service.upload()}
    before = service.holdings()
    for job, code, says in ((cancelled, "job_cancelled", "cancelled"), (failed, "job_failed", "retry first")):
        answer = service.client.post(f"/v1/jobs/{job['id']}/tasks", json=task)
        assert (answer.status_code, answer.json()["code"]) == (409, code)
        assert says in answer.json()["detail"]
    assert service.holdings() == before


def test_cancel_asks_workers_to_stop_and_retry_takes_the_rest(service: Service) -> None:
    job = service.submit("one", "two")
    service.reconciler.tick()
    run = job["runs"][0]["id"]
    write_task(service.storage, run, 1, 0)
    assert service.client.post(f"/v1/jobs/{job['id']}:cancel").json()["state"] == "cancelling"
    service.reconciler.tick()
    assert service.storage.read_json(f"runs/{run}/desired.json") == {
        "state": "cancelled",
        "attempt": 1,
        "parent": None,
    }
    write_outcome(service.storage, run, 1, "cancelled")
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert shown["state"] == "cancelled"
    assert [task["state"] for task in shown["tasks"]] == ["committed", "skipped"]
    retried = service.client.post(f"/v1/jobs/{job['id']}:retry")
    assert retried.status_code == 202
    assert retried.json()["runs"][1]["task_indexes"] == [1]
    assert service.client.post(f"/v1/jobs/{job['id']}:retry").status_code == 409
    finish(service, job)
    assert service.job(job["id"])["state"] == "succeeded"
    assert service.client.post(f"/v1/jobs/{job['id']}:cancel").status_code == 409


def test_the_matrix_has_null_where_nothing_was_measured(service: Service) -> None:
    job = service.submit("one", "two", "three")
    service.reconciler.tick()
    run = job["runs"][0]["id"]
    base = {"one": 0.0, "two": 0.25, "three": 0.0}
    write_task(service.storage, run, 1, 0, scores={"one": 1.0, "two": 0.5}, base_scores=base)
    write_task(service.storage, run, 1, 1, scores={"one": 0.5, "two": 1.0, "three": 0.25})
    service.reconciler.tick()
    shown = service.client.get(f"/v1/jobs/{job['id']}/eval-matrix").json()
    assert shown["tasks"] == ["one", "two", "three"]
    assert shown["matrix"] == [[1.0, 0.5, None], [0.5, 1.0, 0.25], [None, None, None]]
    assert shown["versions"] == [1, 2, None]
    assert shown["base_scores"] == [0.0, 0.25, 0.0]
    # Over the two trained tasks: (0.5 + 1.0)/2; 1.0 - 0.5; 0.5 - 1.0; 0.5 - 0.25; (1.0 + 1.0)/2
    scalars = [shown[name] for name in ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy")]
    assert scalars == [0.75, 0.5, -0.5, 0.25, 1.0]


def test_logs_are_the_newest_drivers(service: Service) -> None:
    job = service.submit("one")
    path, run = f"/v1/jobs/{job['id']}/logs", job["runs"][0]["id"]
    assert service.client.get(path).status_code == 404
    service.reconciler.tick()
    assert service.client.get(path).text == f"log of {run}-a1\n"
    service.runner.is_reachable = False
    away = service.client.get(path)
    assert (away.status_code, away.headers["retry-after"]) == (503, "5")


def test_a_loss_that_is_no_number_is_shown_as_null(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    run = job["runs"][0]["id"]
    write_events(service.storage, run, 1, 1, [("run.started", {}), ("step", {"step": 1, "loss": math.nan})])
    write_task(service.storage, run, 1, 0, training={"final_loss": math.nan})
    service.reconciler.tick()
    assert service.client.get("/v1/adapters/demo/versions/1").json()["training"] == {"final_loss": None}
    events = service.client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    assert [event["data"]["loss"] for event in events if event["type"] == "step"] == [None]


def test_attempts_and_progress_are_shown(service: Service) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    run = job["runs"][0]["id"]
    step = {"task": "one", "step": 1, "num_steps": 2, "loss": 0.5}
    write_events(
        service.storage, run, 1, 1, [("run.started", {}), ("task.started", {"task": "one"}), ("step", step)]
    )
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert (shown["state"], shown["progress"], shown["tasks"][0]["state"]) == ("running", step, "training")
    attempts = service.client.get(f"/v1/runs/{run}/attempts").json()["data"]
    assert [(row["number"], row["state"], row["submission_id"]) for row in attempts] == [
        (1, "running", f"{run}-a1")
    ]
    assert service.runner.states == {f"{run}-a1": RayJobState.RUNNING}
    assert service.client.get(f"/v1/runs/{run}").json()["state"] == "running"


def test_more_readers_than_threads_and_connections_are_all_answered(service: Service) -> None:
    job = service.submit("one")
    paths = [
        "/v1/jobs",
        f"/v1/jobs/{job['id']}",
        f"/v1/jobs/{job['id']}/runs",
        "/v1/datasets",
        "/v1/adapters",
    ]

    async def read_all() -> list[int]:
        num_readers = 150
        limits = httpx.Limits(max_connections=num_readers)
        async with httpx.AsyncClient(
            base_url=str(service.client.base_url), limits=limits, timeout=120, trust_env=False
        ) as client:
            asked = [client.get(paths[number % len(paths)]) for number in range(num_readers)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert set(asyncio.run(read_all())) == {200}
