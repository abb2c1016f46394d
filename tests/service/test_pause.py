"""Pause, resume and deadlines against a scripted Jobs API; what workers do is in test_workers_stop.py."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from service.db.tables import utc_now
from service.jobs import repository
from tests.service.control import Service, write_events, write_outcome, write_task


def post(service: Service, job: dict[str, Any], verb: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a verb."""
    answer = service.client.post(f"/v1/jobs/{job['id']}:{verb}")
    return answer.status_code, answer.json()


def run_id(job: dict[str, Any]) -> str:
    """The first run's id."""
    return str(job["runs"][0]["id"])


@pytest.fixture
def job(service: Service) -> dict[str, Any]:
    """A job of two tasks at work."""
    submitted = service.submit("one", "two")
    service.reconciler.tick()
    write_events(service.storage, run_id(submitted), 1, 1, [("run.started", {})])
    service.reconciler.tick()
    return submitted


def test_a_paused_run_keeps_its_tasks_frees_its_place_and_goes_on_in_a_new_attempt(
    service: Service, job: dict[str, Any]
) -> None:
    run = run_id(job)
    assert post(service, job, "pause")[1]["state"] == "pausing"
    service.reconciler.tick()
    assert service.storage.read_json(f"runs/{run}/desired.json") == {
        "state": "paused",
        "attempt": 1,
        "parent": None,
    }
    first = write_task(service.storage, run, 1, 0)
    write_outcome(service.storage, run, 1, "paused")
    waiting = service.submit(name="waiting")
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert (shown["state"], shown["message"], shown["num_committed"]) == ("paused", "paused by the user", 1)
    assert [task["state"] for task in shown["tasks"]] == ["committed", "pending"]
    assert service.runner.submitted[-1] == f"{run_id(waiting)}-a1"
    write_outcome(service.storage, run_id(waiting), 1, "failed", "oom")
    assert post(service, job, "resume")[1]["state"] == "queued"
    service.reconciler.tick()
    service.reconciler.tick()
    assert service.runner.submitted[-1] == f"{run}-a2"
    assert service.storage.read_json(f"runs/{run}/desired.json") == {
        "state": "running",
        "attempt": 2,
        "parent": first,
    }
    write_task(service.storage, run, 2, 1, parent_dir=first)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "succeeded"
    types = service.event_types(job["id"])
    assert [kind for kind in types if kind in ("run.pausing", "run.paused", "run.queued")] == [
        "run.queued",
        "run.pausing",
        "run.paused",
        "run.queued",
    ]


def test_a_driver_that_dies_while_it_pauses_leaves_a_paused_run(
    service: Service, job: dict[str, Any]
) -> None:
    post(service, job, "pause")
    service.runner.states[f"{run_id(job)}-a1"] = None
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "paused"


def test_a_pause_that_comes_after_the_last_task_finds_a_succeeded_job(
    service: Service, job: dict[str, Any]
) -> None:
    post(service, job, "pause")
    for index in (0, 1):
        write_task(service.storage, run_id(job), 1, index)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "succeeded"


def test_a_waiting_run_pauses_and_is_cancelled_at_once(service: Service) -> None:
    job = service.submit("one")
    assert post(service, job, "pause")[1]["state"] == "paused"
    service.reconciler.tick()
    assert service.runner.submitted == []
    assert post(service, job, "cancel")[1]["state"] == "cancelled"


def test_verbs_that_do_not_fit_the_state_are_refused_and_change_nothing(
    service: Service, job: dict[str, Any]
) -> None:
    assert post(service, job, "resume")[1]["code"] == "not_paused"
    post(service, job, "pause")
    assert post(service, job, "pause")[0] == 202  # again is no error
    status, body = post(service, job, "resume")
    assert (status, body["code"]) == (409, "job_pausing")
    assert post(service, job, "cancel")[1]["state"] == "cancelling"
    assert post(service, job, "pause")[1]["code"] == "not_pausable"
    write_outcome(service.storage, run_id(job), 1, "cancelled")
    service.reconciler.tick()
    assert post(service, job, "pause")[1]["code"] == "not_pausable"
    assert service.job(job["id"])["state"] == "cancelled"


def pass_deadline(service: Service, run: str) -> None:
    """The run's deadline was a second ago."""
    with service.sessions.write() as session:
        repository.lock_run(session, run).deadline_at = utc_now() - timedelta(seconds=1)


def test_a_late_run_is_asked_to_stop_and_fails_with_its_finished_tasks(service: Service) -> None:
    job = service.submit("one", "two", limits={"deadline_s": 60.0})
    service.reconciler.tick()
    run = run_id(job)
    write_task(service.storage, run, 1, 0)
    pass_deadline(service, run)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "cancelling"
    assert service.storage.read_json(f"runs/{run}/desired.json")["state"] == "cancelled"
    write_outcome(service.storage, run, 1, "cancelled")
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert (shown["state"], shown["reason"], shown["num_committed"]) == ("failed", "deadline", 1)
    assert "deadline" in shown["message"]


def test_a_late_run_that_waits_fails_at_once_and_a_paused_one_is_not_late(service: Service) -> None:
    waiting = service.submit(name="waiting", limits={"deadline_s": 60.0})
    paused = service.submit(name="paused", limits={"deadline_s": 60.0})
    post(service, paused, "pause")
    for job in (waiting, paused):
        pass_deadline(service, run_id(job))
    service.reconciler.tick()
    assert (service.job(waiting["id"])["state"], service.job(waiting["id"])["reason"]) == (
        "failed",
        "deadline",
    )
    assert service.job(paused["id"])["state"] == "paused"


def test_time_in_a_pause_does_not_count_for_the_deadline(service: Service) -> None:
    job = service.submit("one", limits={"deadline_s": 60.0})
    post(service, job, "pause")
    with service.sessions.write() as session:
        run = repository.lock_run(session, run_id(job))
        assert run.paused_at is not None
        assert run.deadline_at is not None
        run.paused_at -= timedelta(seconds=1000)
        run.created_at -= timedelta(seconds=2000)
        before = run.deadline_at
    post(service, job, "resume")
    with service.sessions.read() as session:
        after = repository.get_run(session, run_id(job)).deadline_at
    assert after is not None
    assert 1000 <= (after - before).total_seconds() < 1060


def test_a_job_s_own_budget_of_attempts_counts(service: Service) -> None:
    job = service.submit("one", limits={"max_attempts": 1})
    service.reconciler.tick()
    service.runner.states[f"{run_id(job)}-a1"] = None
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "failed"
    assert service.runner.submitted == [f"{run_id(job)}-a1"]
