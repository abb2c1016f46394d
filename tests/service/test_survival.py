"""What keeps a control plane right over time: metrics, owners, files of ended runs, rows that are final."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from service import ids
from service.adapters.storage import StorageError, dataset_key, unowned_key
from service.api import routes_datasets
from service.ids import new_id
from service.jobs import repository
from service.jobs.events import add_event, events_after
from tests.service.control import Service, write_events, write_outcome, write_task
from tests.service.test_pause import run_id


def step(number: int, loss: float) -> tuple[str, dict[str, Any]]:
    """A step event of the first task."""
    data = {"task": "one", "task_index": 0, "step": number, "num_steps": 3, "loss": loss, "eta_s": 1.0}
    return "step", data


def test_a_step_that_is_trained_again_is_one_metric_with_its_newest_value(service: Service) -> None:
    job = service.submit("one")
    run = run_id(job)
    service.reconciler.tick()
    write_events(service.storage, run, 1, 1, [step(1, 3.0), step(2, 2.0)])
    service.reconciler.tick()
    service.runner.states[f"{run}-a1"] = None
    service.reconciler.tick()
    write_events(service.storage, run, 2, 1, [step(2, 2.5), step(3, 1.0)])
    service.reconciler.tick()
    page = service.client.get(f"/v1/jobs/{job['id']}/metrics", params={"task": "one"}).json()
    assert [(row["step"], row["attempt"], row["data"]) for row in page["data"]] == [
        (1, 1, {"loss": 3.0}),
        (2, 2, {"loss": 2.5}),
        (3, 2, {"loss": 1.0}),
    ]
    paged = service.client.get(f"/v1/jobs/{job['id']}/metrics", params={"limit": 2}).json()
    assert (len(paged["data"]), paged["has_more"], paged["next_cursor"]) == (2, True, "0.2")
    rest = service.client.get(f"/v1/jobs/{job['id']}/metrics", params={"limit": 2, "after": "0.2"}).json()
    assert [row["step"] for row in rest["data"]] == [3]
    unknown = service.client.get(f"/v1/jobs/{job['id']}/metrics", params={"task": "two"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "task_not_found")


def test_what_a_lost_attempt_still_measured_comes_before_what_follows_it(service: Service) -> None:
    job = service.submit("one")
    run = run_id(job)
    service.reconciler.tick()
    write_events(service.storage, run, 1, 1, [step(1, 3.0)])
    service.runner.states[f"{run}-a1"] = None
    service.reconciler.tick()
    service.reconciler.tick()
    write_events(
        service.storage, run, 1, 2, [step(2, 2.0), step(3, 1.5)]
    )  # its workers lived a little longer
    write_events(service.storage, run, 2, 1, [step(3, 1.0)])  # and left a checkpoint after step 2
    service.reconciler.tick()
    page = service.client.get(f"/v1/jobs/{job['id']}/metrics").json()["data"]
    assert [(row["step"], row["attempt"], row["data"]["loss"]) for row in page] == [
        (1, 1, 3.0),
        (2, 1, 2.0),
        (3, 2, 1.0),
    ]
    events = service.client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    steps = [(event["attempt"], event["seq"]) for event in events if event["type"] == "step"]
    assert steps == [(1, 1), (1, 2), (1, 3), (2, 1)]


def test_owners_come_from_the_header_of_a_trusted_proxy_and_share_the_places(service: Service) -> None:
    object.__setattr__(service.settings, "owner_header", "X-Forwarded-User")
    service.client.headers["X-Forwarded-User"] = "alice"
    alices = [service.submit(name=f"alice-{number}", priority=number) for number in range(2)]
    service.client.headers["X-Forwarded-User"] = "bob"
    bobs = service.submit(name="bob")
    assert bobs["owner"] == "bob"
    object.__setattr__(service.settings, "max_concurrent_runs", 2)
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_id(alices[1])}-a1", f"{run_id(bobs)}-a1"]
    body = service.job_body("one", name="nobody")
    assert {row["owner"] for row in service.client.get("/v1/datasets").json()["data"]} == {"alice", "bob"}
    del service.client.headers["X-Forwarded-User"]
    jsonl = {
        "content": b'{"prompt": "a", "completion": "b"}',
        "headers": {"Content-Type": "application/jsonl"},
    }
    for refused in (
        service.client.post("/v1/jobs", json=body),
        service.client.post("/v1/datasets?name=nobodys", **jsonl),
    ):
        assert refused.status_code == 422
        assert "X-Forwarded-User" in refused.json()["detail"]


def test_an_owner_over_the_quota_is_told_so_and_a_run_that_has_begun_goes_on(service: Service) -> None:
    job = service.submit("one", "two")
    service.reconciler.tick()
    folder = write_task(service.storage, run_id(job), 1, 0)
    service.reconciler.tick()
    other = service.job_body("one", name="other")
    datasets = service.client.get("/v1/datasets").json()["data"]
    of_datasets = sum(row["bytes"] for row in datasets)
    files = service.storage.read_json(f"{folder}/manifest.json")["files"].values()
    used = of_datasets + sum(file["bytes"] for file in files)
    assert sum(file["bytes"] for file in files) > 0
    row = b'{"prompt": "a", "completion": "b"}\n'

    def answer(path: str, quota: int, **request: Any) -> tuple[int, str, str]:
        object.__setattr__(service.settings, "owner_quota_bytes", quota)
        got = service.client.post(path, **request)
        body = got.json()
        return got.status_code, body.get("code", ""), body.get("detail", "")

    upload = {"content": row * 3, "headers": {"Content-Type": "application/x-ndjson"}}
    full = (413, "quota_exceeded")
    found = answer("/v1/datasets?name=more", used + len(row) * 2, **upload)
    assert found[:2] == full
    assert f"leaves {len(row) * 2}" in found[2]
    found = answer("/v1/datasets?name=more", used, **upload)
    assert found[:2] == full
    assert f"{of_datasets} bytes of data sets" in found[2]
    assert answer("/v1/jobs", used, json=other)[:2] == full
    task = {"name": "three", "dataset": datasets[0]["id"]}
    assert answer(f"/v1/jobs/{job['id']}/tasks", used, json=task)[:2] == full
    assert answer("/v1/datasets?name=more", used + len(row) * 3, **upload)[0] == 201
    write_task(service.storage, run_id(job), 1, 1)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "succeeded"


def test_files_that_no_version_needs_go_when_a_run_has_ended(service: Service) -> None:
    job = service.submit("one", "two")
    service.reconciler.tick()
    run, storage = run_id(job), service.storage
    kept = write_task(storage, run, 1, 0)
    for key in (
        f"runs/{run}/train/a1/task00001-step000000004/data",
        f"runs/{run}/a1/memory/3/data",
        f"runs/{run}/a1/tasks/1/adapter/half",
        f"runs/{run}/a1/logs/driver/000000000000.log",
        f"runs/{run}/a1/outcome.json.0a1b.tmp",
    ):
        storage.write_bytes(key, b"x")
    write_outcome(storage, run, 1, "failed", "oom")
    service.reconciler.tick()
    assert storage.exists(f"runs/{run}/train")  # not yet: they are kept for a while
    object.__setattr__(service.settings, "keep_files_s", 0.0)
    service.reconciler.tick()
    gone = ("train", "a1/memory", "a1/tasks/1", "a1/outcome.json.0a1b.tmp")
    assert not any(storage.exists(f"runs/{run}/{name}") for name in gone)
    assert storage.exists(f"{kept}/manifest.json")
    assert storage.exists(f"runs/{run}/a1/logs/driver/000000000000.log")
    assert storage.exists(f"runs/{run}/plan.json")


def test_rows_of_uploads_that_were_cut_off_go_after_a_day_and_nothing_else(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = service.upload()
    storage = service.storage
    assert not storage.exists(unowned_key(kept))
    storage.write_bytes("datasets/ours/rows.jsonl", b"not an id of the service")
    names = {}
    for what, hours in (("goes on", 23), ("cut off", 25), ("of another database", 25), ("known", 25)):
        now = time.time_ns() - hours * 3600 * 10**9
        monkeypatch.setattr(ids, "time", SimpleNamespace(time_ns=lambda now=now: now))
        names[what] = service.upload() if what == "known" else new_id("ds")
        storage.write_bytes(f"datasets/{names[what]}/rows.jsonl.0a1b.tmp", b"half")
        storage.write_bytes(dataset_key(names[what]), b"rows")
        storage.write_bytes(f"outputs/{names[what]}/key/0.jsonl", b"answers")
        if what != "of another database":
            storage.write_bytes(unowned_key(names[what]), b"")
    assert service.reconciler.tick()
    left = sorted([kept, names["goes on"], names["of another database"], names["known"], "ours"])
    assert storage.names("datasets") == left
    assert names["cut off"] not in storage.names("outputs")
    assert not storage.exists(unowned_key(names["known"]))


def test_a_data_set_whose_files_could_not_be_deleted_is_gone_and_its_files_go_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns() - 25 * 3600 * 10**9
    with monkeypatch.context() as patch:
        patch.setattr(ids, "time", SimpleNamespace(time_ns=lambda: now))
        dataset = service.upload()
    storage = service.storage
    storage.write_bytes(f"outputs/{dataset}/key/0.jsonl", b"answers")

    def fail(*_: object) -> None:
        raise StorageError("the disk is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(routes_datasets, "remove_files", fail)
        assert service.client.delete(f"/v1/datasets/{dataset}").status_code == 204
    assert service.client.get(f"/v1/datasets/{dataset}").status_code == 404
    assert storage.exists(dataset_key(dataset))
    assert service.reconciler.tick()
    assert (storage.names(f"datasets/{dataset}"), storage.names(f"outputs/{dataset}")) == ([], [])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE runs SET state = 'queued'",
        "UPDATE runs SET message = 'other'",
        "UPDATE attempts SET state = 'running'",
        "UPDATE tasks SET state = 'pending'",
        "UPDATE adapter_versions SET task_name = 'other'",
        "UPDATE events SET type = 'other'",
    ],
)
def test_the_database_itself_refuses_to_change_what_is_final(service: Service, statement: str) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    write_task(service.storage, run_id(job), 1, 0)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "succeeded"
    with pytest.raises(DatabaseError, match="change"), service.sessions.write() as session:
        session.execute(text(statement))


def test_writers_of_one_job_number_its_events_without_a_gap(service: Service) -> None:
    job_id = service.submit("one")["id"]
    given: list[int] = []

    def write() -> None:
        for _ in range(15):
            with service.sessions.write() as session:
                given.append(repository.lock_job(session, job_id).last_event)
                add_event(session, job_id, "job.odd", {})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with service.sessions.read() as session:
        ids = [event.id for event in events_after(session, job_id, 0, 1000)]
    assert ids == list(range(1, len(ids) + 1))
    assert len(ids) == 60 + 2  # job.created and run.queued
    assert sorted(given) == list(range(2, 62))
