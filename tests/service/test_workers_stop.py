"""Stops on request: a run that is paused at any moment ends as if it had never been."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from clcore.engine.memory import Row, State
from clcore.engine.state import as_arrays
from service.adapters.storage import (
    Storage,
    desired_key,
    events_key,
    task_key,
    worker_outcome_key,
)
from service.jobs.events import read_worker_events
from service.memory.actor import MemoryActor
from service.specs import EvaluationSpec, RunPlan, StrategySpec
from service.workers import events, stops, train_loop
from service.workers.events import EventWriter
from service.workers.progress import find_progress, newest_checkpoint
from service.workers.stops import Stop, StopSign, read_stop
from tests.service.tiny import STRATEGY, put_plan, save_tiny_model

OWNER = (StrategySpec(type="orthogonal_lora"), StrategySpec(type="experience_replay", replay_ratio=0.3))
SETS = ("t0", "t1", "general/before", "general/after")


class Killed(BaseException):
    """What SIGKILL is to a process."""


class LocalMemory:
    """A MemoryStore over a memory actor in this process."""

    def __init__(self, actor: MemoryActor) -> None:
        self.actor = actor
        self.read, self.rows = actor.read, actor.rows

    def write(
        self,
        op_id: str,
        base_version: int,
        states: Mapping[str, State],
        rows: Mapping[str, Mapping[str, Row]],
    ) -> int:
        arrays = {key: as_arrays(state) for key, state in states.items()}
        return self.actor.write(
            op_id, base_version, arrays, {key: list(of_key) for key, of_key in rows.items()}
        )

    def snapshot(self, version: int, folder: Path) -> str:
        digest, files = self.actor.snapshot(version)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return digest


class Workplace:
    """One worker without Ray: what Ray Train, the driver and the memory actor do, as plain calls."""

    def __init__(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        self.storage, self.looks, self.newest = storage, 0, None
        self.answer: Callable[[int], Stop | None] = lambda look: None  # noqa: ARG005
        self._folder = ""
        monkeypatch.setattr(stops, "READ_DESIRED_EVERY_S", 0.0)
        monkeypatch.setattr(stops, "read_stop", self._read_stop)
        monkeypatch.setattr(train_loop, "ActorMemory", LocalMemory)
        monkeypatch.setattr("ray.train.report", self._report)
        monkeypatch.setattr("ray.train.get_checkpoint", lambda: self.newest)
        monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")

    def start(self, plan: RunPlan, attempt: int) -> Callable[[], dict[str, Any]]:
        """Do what the driver does; returns what the workers do, once and again after a crash."""
        progress = find_progress(self.storage, plan, attempt)
        checkpoint = newest_checkpoint(self.storage, plan, attempt, progress)
        key = checkpoint or progress.memory_key
        actor = MemoryActor(self.storage.url, plan.run_id, attempt, plan.generation, key)
        config = {
            "storage_url": self.storage.url,
            "run_id": plan.run_id,
            "attempt": attempt,
            "memory": actor,
            "checkpoint": checkpoint,
        }
        self.newest, self._folder = None, f"runs/{plan.run_id}/train/a{attempt}"

        def work() -> dict[str, Any]:
            self.looks = 0
            train_loop.train_tasks(config)
            outcome: dict[str, Any] = self.storage.read_json(worker_outcome_key(plan.run_id, attempt))
            return outcome

        return work

    def stop_at(self, number: int, stop: Stop) -> None:
        """Let the look of this number, from 1, see a stop."""
        self.answer = lambda look: stop if look == number else None

    def kill_at(self, number: int) -> None:
        """Let the worker die at the look of this number."""

        def die(look: int) -> None:
            if look == number:
                raise Killed

        self.answer = die

    def work_on(self) -> None:
        """Let no look see a stop."""
        self.answer = lambda look: None  # noqa: ARG005

    def _read_stop(self, *_: object) -> Stop | None:
        self.looks += 1
        return self.answer(self.looks)

    def _report(self, metrics: dict[str, Any], *, checkpoint: Any, checkpoint_dir_name: str) -> None:
        assert metrics == {}
        target = Path(self.storage.path(f"{self._folder}/{checkpoint_dir_name}"))
        assert not target.exists(), "a checkpoint is reported once"
        shutil.copytree(checkpoint.path, target)
        self.newest = type(checkpoint).from_directory(str(target))


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


# ------------------------------------------------------------------------------------------ events


class FailingStorage(Storage):
    """Storage that writes but does not say so, or does not write, while it is told to fail."""

    fails: str | None = None

    def write_bytes(self, key: str, data: bytes) -> None:
        if self.fails != "before":
            super().write_bytes(key, data)
        if self.fails:
            raise OSError("the store does not answer")


@pytest.mark.parametrize("fails", ["before", "after"])
def test_events_that_storage_does_not_take_are_written_later_in_order(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "RETRY_EVERY_S", 0.0)
    storage = FailingStorage(f"file://{tmp_path}")
    writer = EventWriter(storage, "run_e", 1)
    writer.emit("step", number=1)
    storage.fails = fails
    for number in (2, 3, 4):
        writer.emit("step", number=number)
    segments = storage.names(events_key("run_e", 1))
    seen = [event.data["number"] for event in read_worker_events(storage, "run_e", 1, 0)]
    with pytest.raises(OSError, match="does not answer"):
        writer.flush()
    storage.fails = None
    writer.emit("step", number=5)
    found = read_worker_events(storage, "run_e", 1, 0)
    assert [(event.seq, event.data["number"]) for event in found] == [(n, n) for n in range(1, 6)]
    # What a reader may have taken is not written over by something longer.
    assert storage.names(events_key("run_e", 1))[: len(segments)] == segments
    assert [event.data["number"] for event in found][: len(seen)] == seen
    later = read_worker_events(storage, "run_e", 1, seen[-1])
    assert [event.seq for event in later] == list(range(seen[-1] + 1, 6))


@pytest.mark.parametrize("kept_bytes", [0, 30, 150])
def test_a_worker_that_finds_a_torn_segment_goes_on_without_a_gap(kept_bytes: int, storage: Storage) -> None:
    writer = EventWriter(storage, "run_e", 1)
    writer.emit("step", number=1)
    writer.emit("step", flush=False, number=2)
    writer.emit("step", number=3)
    torn = f"{events_key('run_e', 1)}/000000000002.jsonl"
    whole = storage.read_bytes(torn)
    assert len(whole.splitlines()[0]) < 150 < len(whole)
    storage.write_bytes(torn, whole[:kept_bytes])
    EventWriter(storage, "run_e", 1).emit("run.started", number=9)
    found = read_worker_events(storage, "run_e", 1, 0)
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert (found[0].data, found[-1].data) == ({"number": 1}, {"number": 9})
