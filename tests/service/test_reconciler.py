"""The reconciler against a Jobs API that lies, dies or is away, and workers that stop anywhere.

Longer than other files: one short test per promise, and all of them share five small helpers.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import event

from service import reconciler as reconciler_module
from service.db.tables import utc_now
from service.jobs import advance as advance_module
from service.jobs import repository
from service.jobs.runner import RayJobState, RunnerRefused
from tests.service.control import Service, run_service, wait_until, write_events, write_outcome, write_task


@pytest.fixture
def job(service: Service) -> dict[str, Any]:
    """A job of two tasks whose first attempt was submitted."""
    submitted = service.submit("one", "two")
    service.reconciler.tick()
    return submitted


def run_of(job: dict[str, Any]) -> str:
    """The id of the job's first run."""
    return str(job["runs"][0]["id"])


def attempts(service: Service, run_id: str) -> list[tuple[int, str, str | None]]:
    """Number, state and reason of the run's attempts."""
    rows = service.client.get(f"/v1/runs/{run_id}/attempts").json()["data"]
    return [(row["number"], row["state"], row["reason"]) for row in rows]


def versions(service: Service) -> list[tuple[int, int, int]]:
    """Version, task and attempt of every version of the adapter demo."""
    answer = service.client.get("/v1/adapters/demo")
    rows = answer.json()["versions"] if answer.status_code == 200 else []
    return [(row["version"], row["task_index"], row["attempt"]) for row in rows]


def die(service: Service, run_id: str, attempt: int, state: RayJobState | None = RayJobState.FAILED) -> None:
    """The attempt's driver ends without an outcome."""
    service.runner.states[f"{run_id}-a{attempt}"] = state
    service.reconciler.tick()


def end_back_off(service: Service, run_id: str) -> None:
    """The pause before the run's next attempt is over."""
    with service.sessions.write() as session:
        run = repository.lock_run(session, run_id)
        assert run.not_before is not None
        run.not_before = utc_now()
    service.reconciler.tick()


def test_plan_and_desired_state_are_stored_before_the_job_is_submitted(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit("one")
    seen = []

    def look(_submission_id: str, entrypoint: str, env: Any) -> None:
        seen.append(
            (
                service.storage.read_json(f"runs/{run_of(job)}/desired.json"),
                entrypoint,
                env["CLPEFT_STORAGE_URL"],
            )
        )
        assert service.storage.read_json(f"runs/{run_of(job)}/plan.json")["run_id"] == run_of(job)

    monkeypatch.setattr(service.runner, "submit", look)
    service.reconciler.tick()
    command = f"python -m service.workers.driver --run {run_of(job)} --attempt 1"
    assert seen == [
        ({"state": "running", "attempt": 1, "parent": None}, command, service.settings.storage_url)
    ]
    assert service.job(job["id"])["state"] == "scheduling"


def test_no_more_runs_are_submitted_than_allowed(service: Service) -> None:
    first, second = service.submit(name="a"), service.submit(name="b")
    service.reconciler.tick()
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_of(first)}-a1"]
    write_task(service.storage, run_of(first), 1, 0)
    service.reconciler.tick()
    assert service.runner.submitted[1:] == [f"{run_of(second)}-a1"]


def test_each_manifest_becomes_one_version_and_the_alias_follows(
    service: Service, job: dict[str, Any]
) -> None:
    write_task(service.storage, run_of(job), 1, 0)
    for _ in range(3):
        service.reconciler.tick()
    assert versions(service) == [(1, 0, 1)]
    assert service.job(job["id"])["state"] == "scheduling"
    write_task(service.storage, run_of(job), 1, 1)
    service.reconciler.tick()
    assert versions(service) == [(1, 0, 1), (2, 1, 1)]
    assert service.client.get("/v1/adapters/demo").json()["aliases"] == {"live": 2}
    assert service.job(job["id"])["state"] == "succeeded"
    types = service.event_types(job["id"])
    assert types.count("task.committed") == 2
    assert types[-2:] == ["run.succeeded", "job.succeeded"]


def test_events_written_while_the_reconciler_looks_are_kept_although_the_last_task_ends_the_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit("one")
    service.reconciler.tick()
    steps = [("step", {"task": "one", "step": step, "num_steps": 2}) for step in (1, 2)]
    look = advance_module.ingest_manifests

    def trains_meanwhile(sessions: Any, storage: Any, run_id: str, number: int) -> None:
        if not service.storage.exists(f"runs/{run_id}/a1/tasks/0/manifest.json"):
            write_events(service.storage, run_id, 1, 1, steps)  # after the look at the events
            write_task(service.storage, run_id, 1, 0)
        look(sessions, storage, run_id, number)

    monkeypatch.setattr(advance_module, "ingest_manifests", trains_meanwhile)
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "succeeded"
    types = service.event_types(job["id"])
    assert types.count("step") == 2
    assert types.index("step") < types.index("task.committed")


def test_a_manifest_whose_files_differ_is_not_committed(service: Service, job: dict[str, Any]) -> None:
    folder = write_task(service.storage, run_of(job), 1, 0)
    path = f"{folder}/adapter/adapter_model.safetensors"
    right = service.storage.read_bytes(path)
    for wrong in (right[:-1], right[:-1] + b"?", None):
        if wrong is None:
            service.storage.delete(path)
        else:
            service.storage.write_bytes(path, wrong)
        service.reconciler.tick()
        assert versions(service) == []
    service.storage.write_bytes(path, right)
    service.reconciler.tick()
    assert versions(service) == [(1, 0, 1)]


@pytest.mark.parametrize(
    "changes",
    [
        {"job_id": "job_x"},
        {"task_name": "two"},
        {"adapter": "other"},
        {"parent_dir": "runs/run_x/a1/tasks/0"},
    ],
)
def test_a_manifest_of_something_else_is_not_committed(
    service: Service, job: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_task(service.storage, run_of(job), 1, 0, **changes)
    service.reconciler.tick()
    assert versions(service) == []


def test_worker_events_are_taken_once_in_order_and_wait_for_a_gap(
    service: Service, job: dict[str, Any]
) -> None:
    run = run_of(job)
    write_events(service.storage, run, 1, 1, [("run.started", {}), ("step", {"step": 1})])
    write_events(service.storage, run, 1, 4, [("step", {"step": 3})])
    service.reconciler.tick()
    service.reconciler.tick()

    def steps() -> list[Any]:
        page = service.client.get(f"/v1/jobs/{job['id']}/events").json()["data"]
        return [(row["seq"], row["data"]["step"]) for row in page if row["type"] == "step"]

    assert steps() == [(2, 1)]
    write_events(service.storage, run, 1, 3, [("step", {"step": 2})])
    service.reconciler.tick()
    assert steps() == [(2, 1), (3, 2), (4, 3)]


def test_an_unreadable_line_does_not_hide_what_follows(service: Service, job: dict[str, Any]) -> None:
    run = run_of(job)
    service.storage.write_bytes(f"runs/{run}/a1/events/000000000001.jsonl", b'{"seq": 1\n')
    write_events(service.storage, run, 1, 2, [("run.started", {})])
    service.reconciler.tick()
    assert service.event_types(job["id"])[-2:] == ["event.unreadable", "run.started"]


def test_an_idle_tick_does_not_write(service: Service, job: dict[str, Any]) -> None:
    write_events(service.storage, run_of(job), 1, 1, [("run.started", {})])
    write_task(service.storage, run_of(job), 1, 0)
    service.reconciler.tick()
    statements: list[str] = []
    event.listen(service.sessions.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    service.reconciler.tick()
    assert statements
    assert [text for text in statements if not text.startswith(("SELECT", "BEGIN"))] == []
    assert "BEGIN IMMEDIATE" not in statements


def test_a_dead_driver_is_followed_by_an_attempt_that_trains_only_the_rest(
    service: Service, job: dict[str, Any]
) -> None:
    run = run_of(job)
    write_events(service.storage, run, 1, 1, [("run.started", {}), ("task.started", {"task": "two"})])
    first = write_task(service.storage, run, 1, 0)
    plan = service.storage.read_json(f"runs/{run}/plan.json")
    die(service, run, 1)
    assert attempts(service, run) == [(1, "lost", "worker_lost"), (2, "pending", None)]
    assert [task["state"] for task in service.job(job["id"])["tasks"]] == ["committed", "pending"]
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run}-a1", f"{run}-a2"]
    assert service.storage.read_json(f"runs/{run}/plan.json") == plan
    write_task(service.storage, run, 2, 1, parent_dir=first)
    service.reconciler.tick()
    assert versions(service) == [(1, 0, 1), (2, 1, 2)]
    assert service.job(job["id"])["state"] == "succeeded"


def test_a_driver_that_dies_after_its_last_commit_has_succeeded(
    service: Service, job: dict[str, Any]
) -> None:
    write_task(service.storage, run_of(job), 1, 0)
    write_task(service.storage, run_of(job), 1, 1)
    die(service, run_of(job), 1)
    assert service.job(job["id"])["state"] == "succeeded"
    assert attempts(service, run_of(job)) == [(1, "succeeded", None)]


def test_a_task_that_a_given_up_attempt_finished_late_is_committed_through_its_child(
    service: Service, job: dict[str, Any]
) -> None:
    run = run_of(job)
    die(service, run, 1)
    service.reconciler.tick()
    late = write_task(service.storage, run, 1, 0)
    service.reconciler.tick()
    assert versions(service) == []  # attempt 2 may be training the same task
    write_task(service.storage, run, 2, 1, parent_dir=late)
    service.runner.states[f"{run}-a2"] = RayJobState.SUCCEEDED
    write_outcome(service.storage, run, 2, "succeeded")
    service.reconciler.tick()
    assert versions(service) == [(1, 0, 1), (2, 1, 2)]
    assert service.job(job["id"])["state"] == "succeeded"


def test_attempts_without_a_new_task_are_limited_and_a_commit_resets_the_count(
    service: Service, job: dict[str, Any]
) -> None:
    run = run_of(job)
    die(service, run, 1)
    die(service, run, 2)
    end_back_off(service, run)
    first = write_task(service.storage, run, 3, 0)  # max_attempts is 3
    die(service, run, 3)
    die(service, run, 4)
    assert service.job(job["id"])["state"] == "queued"
    end_back_off(service, run)
    assert service.job(job["id"])["state"] == "scheduling"
    die(service, run, 5, state=None)
    shown = service.job(job["id"])
    assert (shown["state"], shown["reason"]) == ("failed", "cluster_lost")
    assert "3 attempts without a finished task" in shown["message"]
    assert [task["state"] for task in shown["tasks"]] == ["committed", "skipped"]
    assert len(service.runner.submitted) == 5
    assert versions(service) == [(1, 0, 3)]
    assert first == f"runs/{run}/a3/tasks/0"


def test_an_unreachable_jobs_api_changes_nothing(service: Service, job: dict[str, Any]) -> None:
    before = service.holdings(), service.job(job["id"])
    service.runner.is_reachable = False
    for _ in range(5):
        service.reconciler.tick()
    assert (service.holdings(), service.job(job["id"])) == before
    service.runner.is_reachable = True
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_of(job)}-a1"]


def test_a_submission_that_nobody_answered_is_repeated_under_the_same_id(service: Service) -> None:
    job = service.submit("one")
    service.runner.is_reachable = False
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "submitting"
    service.runner.is_reachable = True
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_of(job)}-a1"]
    assert service.job(job["id"])["state"] == "scheduling"


def test_a_refused_submission_fails_the_run(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job = service.submit("one")

    def refuse(*_: Any) -> None:
        raise RunnerRefused("no such runtime")

    monkeypatch.setattr(service.runner, "submit", refuse)
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert (shown["state"], shown["reason"], shown["message"]) == ("failed", "internal", "no such runtime")


@pytest.mark.parametrize("reason", ["user_error", "data_error", "oom", "internal"])
def test_an_outcome_that_a_repeat_cannot_help_fails_the_run(
    service: Service, job: dict[str, Any], reason: str
) -> None:
    write_outcome(service.storage, run_of(job), 1, "failed", reason)
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert (shown["state"], shown["reason"], shown["message"]) == ("failed", reason, "said failed")


@pytest.mark.parametrize("reason", ["worker_lost", "storage_error"])
def test_an_outcome_that_a_repeat_can_help_is_repeated(
    service: Service, job: dict[str, Any], reason: str
) -> None:
    write_outcome(service.storage, run_of(job), 1, "failed", reason)
    service.reconciler.tick()
    assert attempts(service, run_of(job)) == [(1, "failed", reason), (2, "pending", None)]


def test_a_driver_that_says_succeeded_without_its_tasks_is_not_believed(
    service: Service, job: dict[str, Any]
) -> None:
    write_task(service.storage, run_of(job), 1, 0)
    write_outcome(service.storage, run_of(job), 1, "succeeded")
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "failed"
    assert versions(service) == [(1, 0, 1)]


def test_a_commit_that_is_refused_fails_the_run_and_frees_its_place(
    service: Service, job: dict[str, Any]
) -> None:
    waiting = service.submit(name="waiting")
    with service.sessions.write() as session:
        row = repository.get_job(session, job["id"])
        row.spec = {**row.spec, "promotion": {"alias": "v7"}}  # as an older release let pass
    write_task(service.storage, run_of(job), 1, 0)
    service.reconciler.tick()
    failed = service.job(job["id"])
    assert (failed["state"], failed["reason"]) == ("failed", "internal")
    assert "'v7' looks like a version" in failed["message"]
    service.reconciler.tick()
    assert service.runner.submitted[-1] == f"{run_of(waiting)}-a1"


def test_a_job_that_this_release_cannot_read_fails_and_frees_its_place(service: Service) -> None:
    job, waiting = service.submit(name="old"), service.submit(name="waiting")
    with service.sessions.write() as session:
        row = repository.lock_job(session, job["id"])
        row.spec = {**row.spec, "a_field_of_another_release": 1}
    service.reconciler.tick()
    failed = service.job(job["id"])
    assert (failed["state"], failed["reason"]) == ("failed", "internal")
    assert "a_field_of_another_release" in failed["message"]
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_of(waiting)}-a1"]


def test_a_refused_run_waits_for_the_jobs_api_and_does_not_stop_the_others(
    service: Service, job: dict[str, Any]
) -> None:
    object.__setattr__(service.settings, "max_concurrent_runs", 2)
    other = service.submit(name="other")
    service.reconciler.tick()
    with service.sessions.write() as session:
        row = repository.lock_job(session, job["id"])
        row.spec = {**row.spec, "promotion": {"alias": "v7"}}
    write_task(service.storage, run_of(job), 1, 0)
    write_task(service.storage, run_of(other), 1, 0)

    service.runner.is_reachable = False
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "scheduling"
    assert service.job(other["id"])["state"] == "succeeded"
    service.runner.is_reachable = True
    service.reconciler.tick()
    assert service.job(job["id"])["state"] == "failed"


def test_when_a_run_fails_the_runs_behind_it_are_cancelled_and_retry_takes_all(
    service: Service, job: dict[str, Any]
) -> None:
    task = {"name": "three", "dataset": service.upload()}
    service.client.post(f"/v1/jobs/{job['id']}/tasks", json=task)
    write_outcome(service.storage, run_of(job), 1, "failed", "oom")
    service.reconciler.tick()
    shown = service.job(job["id"])
    assert [(run["state"], run["reason"]) for run in shown["runs"]] == [
        ("failed", "oom"),
        ("cancelled", "parent_failed"),
    ]
    assert (shown["state"], shown["reason"]) == ("failed", "oom")
    retried = service.client.post(f"/v1/jobs/{job['id']}:retry").json()
    assert retried["runs"][2]["task_indexes"] == [0, 1, 2]


def test_a_cancelled_run_whose_driver_is_gone_ends_as_cancelled(
    service: Service, job: dict[str, Any]
) -> None:
    service.client.post(f"/v1/jobs/{job['id']}:cancel")
    die(service, run_of(job), 1)
    assert service.job(job["id"])["state"] == "cancelled"
    assert service.runner.submitted == [f"{run_of(job)}-a1"]


@pytest.mark.parametrize("verb", ["cancel", "pause"])
def test_a_run_that_does_not_stop_in_time_is_stopped_by_ray(
    service: Service, job: dict[str, Any], verb: str
) -> None:
    service.client.post(f"/v1/jobs/{job['id']}:{verb}")
    service.reconciler.tick()
    assert service.runner.stopped == []
    object.__setattr__(service.settings, "stop_grace_s", 0.0)
    service.reconciler.tick()
    assert service.runner.stopped == [f"{run_of(job)}-a1"]


def test_one_broken_run_does_not_stop_the_others(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = service.submit(name="a"), service.submit(name="b")
    advance = reconciler_module.advance

    def breaks(parts: Any, run_id: str) -> None:
        if run_id == run_of(first):
            raise RuntimeError("broken")
        advance(parts, run_id)

    monkeypatch.setattr(reconciler_module, "advance", breaks)
    object.__setattr__(service.settings, "max_concurrent_runs", 2)
    service.reconciler.tick()
    assert service.runner.submitted == [f"{run_of(second)}-a1"]


def test_the_thread_submits_within_half_a_second_of_the_request(settings: Any, sessions: Any) -> None:
    object.__setattr__(settings, "poll_interval_s", 60.0)  # only the wake-up can be this fast
    with run_service(settings, sessions, reconcile=True) as service:
        service.client.get("/v1/strategies")  # imports what the first check needs
        body = service.job_body("one")
        job = service.client.post("/v1/jobs", json=body).json()
        wait_until(lambda: service.runner.submitted == [f"{run_of(job)}-a1"], "the submission", timeout_s=0.5)


def test_what_goes_wrong_tick_after_tick_is_logged_once_and_again_after_it_was_well(
    service: Service, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ticks(broken: bool) -> int:
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(reconciler_module, "advance", fail)
            caplog.clear()
            for _ in range(3):
                service.reconciler.tick()
        return caplog.text.count("could not be looked at; the next tick tries again: KeyError: 'odd'")

    def fail(*_: object) -> None:
        raise KeyError("odd")

    assert ticks(broken=True) == 1
    assert "Traceback" in caplog.text
    assert ticks(broken=False) == 0
    assert ticks(broken=True) == 1
    assert service.job(job["id"])["state"] == "scheduling"


def test_a_tick_that_fails_again_after_a_good_one_is_logged_again(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = iter("xx.xx")
    rest = threading.Event()

    def tick() -> bool:
        result = next(results, None)
        if result is None:
            rest.set()
        elif result == "x":
            raise KeyError("odd")
        return True

    monkeypatch.setattr(service.reconciler, "tick", tick)
    service.reconciler.start()
    assert rest.wait(10)
    service.reconciler.stop()
    assert caplog.text.count("the tick failed; the next one tries again: KeyError: 'odd'") == 2
