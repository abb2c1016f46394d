"""Stops on request: a run that is paused at any moment ends as if it had never been."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from service.adapters.storage import Storage, desired_key, outcome_key, task_key
from service.jobs.events import read_worker_events
from service.processes import family
from service.ray_head import RayHead
from service.specs import EvaluationSpec, RunPlan, StrategySpec
from service.workers import events as events_module
from service.workers.stops import Stop, StopSign, read_stop
from tests.service.test_workers import start_driver, wait_for
from tests.service.tiny import STRATEGY, put_plan, save_tiny_model
from tests.service.workplace import Killed, Workplace

OWNER = (StrategySpec(type="orthogonal_lora"), StrategySpec(type="experience_replay", replay_ratio=0.3))
SETS = ("t0", "t1", "general/before", "general/after")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Empty storage."""
    return Storage(f"file://{tmp_path}/storage")


@pytest.fixture
def workplace(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A worker without Ray."""
    return Workplace(storage, monkeypatch)


def small_plan(storage: Storage, model: Path, run_id: str, **changes: Any) -> RunPlan:
    """Two tasks of three steps, with general ability and a point of a curve."""
    settings: dict[str, Any] = {
        "steps": 3,
        "num_workers": 1,
        "num_eval_rows": 3,
        "evaluation": EvaluationSpec(curve_points=1, curve_rows=2, batch_size=100),
        **changes,
    }
    return put_plan(storage, model, run_id, **settings)


def results(storage: Storage, plan: RunPlan, attempt: int) -> dict[str, bytes]:
    """Return what must not depend on stops: the adapters, the memory and what every row was scored."""
    found: dict[str, bytes] = {}
    for task in plan.tasks:
        folder = next(
            key
            for number in range(attempt, 0, -1)
            if storage.exists(f"{(key := task_key(plan.run_id, number, task.index))}/manifest.json")
        )
        manifest = storage.read_json(f"{folder}/manifest.json")
        scores = {
            key: manifest[key] for key in ("scores", "base_scores", "before_scores", "general", "curve")
        }
        found[f"{task.name}/scores"] = json.dumps(scores, sort_keys=True).encode()
        counts = {key: value for key, value in manifest["training"].items() if not key.endswith("_s")}
        assert {"label_tokens", "total_tokens", "replay_tokens", "final_loss"} <= counts.keys()
        found[f"{task.name}/counts"] = json.dumps(counts, sort_keys=True).encode()
        kept = ("adapter/adapter_model.safetensors", "state/memory.safetensors", *SETS)
        for name in kept:
            path = (
                f"{folder}/{name}"
                if "/" in name and name not in SETS
                else f"{folder}/predictions/{name}.jsonl"
            )
            found[f"{task.name}/{name}"] = storage.read_bytes(path)
    return found


def steps_of(storage: Storage, run_id: str, attempts: int) -> list[tuple[str, int]]:
    """Return (task, step) of every step event of the attempts, one after the other."""
    found = itertools.chain.from_iterable(
        read_worker_events(storage, run_id, attempt, 0) for attempt in range(1, attempts + 1)
    )
    return [(event.data["task"], event.data["step"]) for event in found if event.type == "step"]


def straight_run(
    workplace: Workplace, model: Path, strategy: Sequence[StrategySpec]
) -> tuple[dict[str, bytes], int]:
    """Return what an uninterrupted run leaves, and how often it looked for a stop."""
    plan = small_plan(workplace.storage, model, "run_straight", strategy=strategy)
    workplace.work_on()
    assert workplace.start(plan, 1)()["state"] == "succeeded"
    looks = workplace.looks
    assert looks > 20
    found = results(workplace.storage, plan, 1)
    workplace.storage.delete("outputs")  # what it answered, others answer again
    return found, looks


def all_steps(plan: RunPlan) -> list[tuple[str, int]]:
    """Return (task, step) of a whole run."""
    return [(task.name, step) for task in plan.tasks for step in range(1, task.steps + 1)]


@pytest.mark.parametrize(
    ("strategy", "every"),
    [
        pytest.param(STRATEGY, 4, id="ewc+replay"),
        pytest.param(OWNER, 7, id="orthogonal_lora+replay"),
        pytest.param(STRATEGY, 1, id="ewc+replay-all", marks=pytest.mark.slow),
        pytest.param(OWNER, 1, id="orthogonal_lora+replay-all", marks=pytest.mark.slow),
    ],
)
def test_a_run_paused_at_any_look_goes_on_bit_for_bit_and_repeats_no_step(
    strategy: Sequence[StrategySpec], every: int, workplace: Workplace, model: Path
) -> None:
    storage = workplace.storage
    expected, num_looks = straight_run(workplace, model, strategy)
    for look in range(1, num_looks, every):  # the last one is while the last version is stored
        storage.delete("outputs")
        plan = small_plan(storage, model, f"run_{look}", strategy=strategy)
        workplace.stop_at(look, Stop.PAUSED)
        outcome = workplace.start(plan, 1)()
        assert outcome == {"state": "paused", "reason": None, "message": "paused on request"}
        workplace.work_on()
        assert workplace.start(plan, 2)()["state"] == "succeeded"
        assert steps_of(storage, plan.run_id, 2) == all_steps(plan)
        assert results(storage, plan, 2) == expected


def test_a_pause_while_the_last_version_is_stored_comes_too_late(workplace: Workplace, model: Path) -> None:
    _, num_looks = straight_run(workplace, model, STRATEGY)
    plan = small_plan(workplace.storage, model, "run_late")
    workplace.stop_at(num_looks, Stop.PAUSED)
    assert workplace.start(plan, 1)()["state"] == "succeeded"


def test_a_run_paused_again_and_again_ends_with_the_same_bytes(workplace: Workplace, model: Path) -> None:
    storage = workplace.storage
    expected, _ = straight_run(workplace, model, STRATEGY)
    plan = small_plan(storage, model, "run_often")
    attempt, state = 0, "paused"
    while state == "paused":
        attempt += 1
        workplace.stop_at(3 + 2 * attempt, Stop.PAUSED)
        state = workplace.start(plan, attempt)()["state"]
    assert (state, attempt > 4) == ("succeeded", True)
    assert steps_of(storage, plan.run_id, attempt) == all_steps(plan)
    assert results(storage, plan, attempt) == expected


@pytest.mark.parametrize(("killed", "paused"), [(7, 4), (20, 6), (12, 1)])
def test_a_pause_after_a_worker_came_back_goes_on_bit_for_bit(
    killed: int, paused: int, workplace: Workplace, model: Path
) -> None:
    storage = workplace.storage
    expected, _ = straight_run(workplace, model, STRATEGY)
    plan = small_plan(storage, model, "run_back", checkpoint_every_steps=2)
    work = workplace.start(plan, 1)
    workplace.kill_at(killed)
    with pytest.raises(Killed):
        work()
    workplace.stop_at(paused, Stop.PAUSED)
    assert work()["state"] == "paused"
    workplace.work_on()
    assert workplace.start(plan, 2)()["state"] == "succeeded"
    assert results(storage, plan, 2) == expected
    for attempt in (1, 2):
        found = read_worker_events(storage, plan.run_id, attempt, 0)
        assert [event.seq for event in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("killed", [6, 9, 16, 20])
def test_a_worker_that_is_killed_has_stored_the_steps_that_its_checkpoint_covers(
    killed: int, workplace: Workplace, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "FLUSH_EVERY_S", math.inf)
    plan = small_plan(
        workplace.storage, model, "run_seen", steps=8, checkpoint_every_steps=3, evaluation=EvaluationSpec()
    )
    work = workplace.start(plan, 1)
    workplace.kill_at(killed)
    with pytest.raises(Killed):
        work()
    workplace.work_on()
    assert work()["state"] == "succeeded"
    assert sorted(set(steps_of(workplace.storage, plan.run_id, 1))) == all_steps(plan)


@pytest.mark.parametrize("look", [1, 4, 8, 13])
def test_a_superseded_attempt_leaves_no_checkpoint_and_no_version_behind(
    look: int, workplace: Workplace, model: Path
) -> None:
    storage = workplace.storage
    plan = small_plan(storage, model, "run_old", num_tasks=1)
    reported: dict[int, list[str]] = {}

    def answer(number: int) -> Stop | None:
        reported[number] = storage.names(f"runs/{plan.run_id}/train/a1")
        return Stop.SUPERSEDED if number == look else None

    workplace.answer = answer
    outcome = workplace.start(plan, 1)()
    assert outcome == {"state": "superseded", "reason": None, "message": "a newer attempt may work"}
    assert storage.names(f"runs/{plan.run_id}/train/a1") == reported[look]
    assert not storage.exists(f"{task_key(plan.run_id, 1, 0)}/manifest.json")
    assert set(storage.names(f"runs/{plan.run_id}")) <= {"a1", "train", "plan.json", "desired.json"}


def test_an_attempt_superseded_while_it_stores_a_version_writes_no_manifest(
    workplace: Workplace, model: Path
) -> None:
    _, num_looks = straight_run(workplace, model, STRATEGY)
    plan = small_plan(workplace.storage, model, "run_last")
    workplace.stop_at(num_looks, Stop.SUPERSEDED)
    assert workplace.start(plan, 1)()["state"] == "superseded"
    folder = task_key(plan.run_id, 1, 1)
    assert "adapter" in workplace.storage.names(folder)
    assert "manifest.json" not in workplace.storage.names(folder)


def test_a_version_that_an_older_attempt_completes_too_late_is_not_gone_on_from(
    workplace: Workplace, model: Path
) -> None:
    storage = workplace.storage
    expected, _ = straight_run(workplace, model, STRATEGY)
    plan = small_plan(storage, model, "run_two", checkpoint_every_steps=2)
    work = workplace.start(plan, 2)
    workplace.kill_at(10)
    with pytest.raises(Killed):
        work()
    storage.write_bytes(f"{task_key(plan.run_id, 1, 0)}/manifest.json", b"what a zombie wrote")
    workplace.work_on()
    assert work()["state"] == "succeeded"
    assert results(storage, plan, 2) == expected


# ------------------------------------------------------------------------------------------ desired.json


@pytest.mark.parametrize(
    ("desired", "stop"),
    [
        ({"state": "running"}, None),
        ({"state": "running", "attempt": 2}, None),
        ({"state": "paused", "attempt": 2}, Stop.PAUSED),
        ({"state": "cancelled"}, Stop.CANCELLED),
        ({"state": "running", "attempt": 3}, Stop.SUPERSEDED),
        ({"state": "paused", "attempt": 3}, Stop.SUPERSEDED),
    ],
)
def test_desired_json_says_whether_attempt_2_may_work(
    desired: dict[str, Any], stop: Stop | None, storage: Storage
) -> None:
    storage.write_json(desired_key("run_d"), desired)
    assert read_stop(storage, "run_d", 2) is stop


@pytest.mark.parametrize("content", [None, b"", b'{"state": "sleeping"}'])
def test_what_cannot_be_read_in_desired_json_does_not_end_a_run(
    content: bytes | None, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    sign = StopSign(storage, "run_d", 1)
    if content is not None:
        storage.write_bytes(desired_key("run_d"), content)
    assert sign.look() is None
    assert "desired.json of run run_d cannot be read" in caplog.text
    storage.write_json(desired_key("run_d"), {"state": "paused"})
    assert sign.look() is None  # not yet
    assert sign.look(now=True) is Stop.PAUSED
    storage.write_json(desired_key("run_d"), {"state": "running"})
    assert sign.look(now=True) is Stop.PAUSED  # a stop once seen stays


# ----------------------------------------------------------------------------------------- two workers on Ray


def train_workers(ray_head: RayHead) -> list[psutil.Process]:
    """Return the training workers' processes of a head."""
    found = []
    for process in family([ray_head.root], ray_head.marker):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[0].startswith("ray::RayTrainWorker"):
                found.append(process)
    return found


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_workers_that_are_paused_after_one_was_killed_go_on_bit_for_bit(
    ray_head: RayHead, model: Path, storage: Storage
) -> None:
    def plan_of(run_id: str) -> RunPlan:
        return small_plan(
            storage, model, run_id, steps=80, num_workers=2, checkpoint_every_steps=20, num_eval_rows=100
        )

    def restarts(plan: RunPlan, attempt: int) -> list[bool]:
        events = read_worker_events(storage, plan.run_id, attempt, 0)
        return [event.data["is_restart"] for event in events if event.type == "run.started"]

    straight, plan = plan_of("run_straight"), plan_of("run_paused")
    assert start_driver(ray_head, storage, straight.run_id, 1).wait(300) == 0
    storage.delete("outputs")
    driver = start_driver(ray_head, storage, plan.run_id, 1)
    checkpoint = f"runs/{plan.run_id}/train/a1/task00000-step000000020/training.json"
    wait_for(lambda: storage.exists(checkpoint), driver, 300)
    train_workers(ray_head)[0].kill()
    wait_for(lambda: restarts(plan, 1) == [False, True], driver, 300)
    storage.write_json(desired_key(plan.run_id), {"state": "paused", "attempt": 1})
    assert driver.wait(300) == 0
    assert storage.read_json(outcome_key(plan.run_id, 1))["state"] == "paused"
    storage.write_json(desired_key(plan.run_id), {"state": "running", "attempt": 2})
    assert start_driver(ray_head, storage, plan.run_id, 2).wait(300) == 0
    assert storage.read_json(outcome_key(plan.run_id, 2))["state"] == "succeeded"
    assert results(storage, plan, 2) == results(storage, straight, 1)
