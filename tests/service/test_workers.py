"""Runs on a real Ray cluster: driver and workers as the control plane starts them, but without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clcore.engine.memory import MemorySession
from clcore.engine.tasks import encode_row
from clcore.strategies.replay_experience import ExperienceReplay
from service.adapters.storage import Storage, events_key, outcome_key, plan_key, task_key, tensorboard_key
from service.adapters.version_files import read_manifest
from service.memory.actor import NAMESPACE, actor_name, start_memory
from service.memory.client import ActorMemory
from service.memory.rows import RowReader, row_ref
from service.ray_head import RayHead, running_ray
from service.specs import EvaluationSpec, LoggingSpec, PlannedDataset, RunPlan, StrategySpec
from service.workers.progress import find_progress
from tests.service.control import wait_until
from tests.service.tiny import letter_rows, put_dataset, put_plan, save_tiny_model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Empty storage."""
    return Storage(f"file://{tmp_path}/storage")


@pytest.fixture(scope="module")
def straight(
    ray_head: RayHead, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Storage, RunPlan]:
    """An uninterrupted run of two tasks on two workers, which other runs are compared with."""
    storage = Storage(f"file://{tmp_path_factory.mktemp('straight')}/storage")
    plan = put_plan(
        storage,
        model,
        "run_straight",
        steps=12,
        evaluation=EvaluationSpec(curve_points=2, curve_rows=4),
        logging=LoggingSpec(tensorboard=True),
    )
    process = start_driver(ray_head, storage, plan.run_id, 1)
    assert process.wait(240) == 0
    return storage, plan


def start_driver(ray_head: RayHead, storage: Storage, run_id: str, attempt: int) -> subprocess.Popen[bytes]:
    """Start a driver as the Jobs API would; its log lands beside the storage."""
    environment = {**os.environ, **ray_head.environment(), "CLPEFT_STORAGE_URL": storage.url}
    log = Path(storage.root).parent / f"{run_id}-a{attempt}.log"
    command = [sys.executable, "-m", "service.workers.driver", "--run", run_id, "--attempt", str(attempt)]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float = 120) -> None:
    """Poll quickly until the condition holds; fail when the driver ends first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the driver ended before the awaited moment"
        assert time.monotonic() < deadline, "the awaited moment did not come"
        time.sleep(0.01)


def ray_rows(ray_head: RayHead, kind: str, **wanted: str) -> list[dict[str, object]]:
    """Return what the cluster's state API lists."""
    headers = {"Authorization": f"Bearer {ray_head.token_path.read_text().strip()}"}
    url = f"{ray_head.dashboard_url}/api/v0/{kind}?limit=1000&detail=1"
    rows = httpx.get(url, headers=headers, timeout=30, trust_env=False).raise_for_status().json()
    found = rows["data"]["result"]["result"]
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def read_events(storage: Storage, run_id: str, attempt: int) -> list[dict[str, object]]:
    """Return all events of an attempt in the order of their segments."""
    folder = events_key(run_id, attempt)
    lines = (
        line for name in storage.names(folder) for line in storage.read_bytes(f"{folder}/{name}").splitlines()
    )
    return [json.loads(line) for line in lines]


def adapter_bytes(storage: Storage, task_dir: str) -> bytes:
    """Return the adapter's weights as stored."""
    return storage.read_bytes(f"{task_dir}/adapter/adapter_model.safetensors")


def rows_answered_twice(storage: Storage) -> list[tuple[str, int]]:
    """Return (key, row) of every row that stands in two segments of stored answers."""
    twice = []
    for dataset in storage.names("outputs"):
        for key in storage.names(f"outputs/{dataset}"):
            folder = f"outputs/{dataset}/{key}"
            segments = [storage.read_json(f"{folder}/{name}") for name in storage.names(folder)]
            rows = [row for segment in segments for row, _, _ in segment["rows"]]
            twice += [(key, row) for row in sorted(set(rows)) if rows.count(row) > 1]
    return twice


def test_a_run_leaves_one_whole_version_per_task(straight: tuple[Storage, RunPlan]) -> None:
    storage, plan = straight
    assert storage.read_json(outcome_key(plan.run_id, 1))["state"] == "succeeded"
    events = read_events(storage, plan.run_id, 1)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    steps = [event for event in events if event["type"] == "step"]
    assert len(steps) == 24
    first, second = (read_manifest(storage, task_key(plan.run_id, 1, i)) for i in (0, 1))
    assert set(first.scores) == set(second.scores) == set(first.base_scores) == {"t0", "t1"}
    assert second.base_scores == {}
    assert (first.memory_version, second.memory_version) == (1, 2)
    assert second.parent_dir == task_key(plan.run_id, 1, 0)
    assert first.training["replay_tokens"] == 0 < second.training["replay_tokens"]
    assert str(Path(plan.base_model_path)) not in json.dumps(
        storage.read_json(f"{second.parent_dir}/adapter/adapter_config.json")
    )


def test_general_ability_and_curves_stand_in_the_manifest(straight: tuple[Storage, RunPlan]) -> None:
    storage, plan = straight
    first, second = (read_manifest(storage, task_key(plan.run_id, 1, i)) for i in (0, 1))
    assert first.general is not None
    assert second.general is not None
    assert (first.general.dataset, first.general.num_rows) == ("default", 100)
    assert first.general.before == first.general.base == second.general.base
    assert second.general.before == first.general.after != first.general.before
    assert [point.step for point in second.curve] == [0, 4, 8, 12]
    assert [set(point.scores) for point in first.curve] == [{"t0"}] * 4
    for point, row in ((second.curve[0], first), (second.curve[-1], second)):
        for name, score in point.scores.items():
            lines = storage.read_bytes(f"{task_key(plan.run_id, 1, row.task_index)}/predictions/{name}.jsonl")
            scores = [json.loads(line)["score"] for line in lines.splitlines()]
            assert score == sum(scores[:4]) / 4  # the first curve_rows rows of the version's own scores
            assert row.scores[name] == sum(scores) / 7
    assert rows_answered_twice(storage) == []


def test_tensorboard_shows_loss_scores_and_general_ability(straight: tuple[Storage, RunPlan]) -> None:
    storage, plan = straight
    board = EventAccumulator(storage.path(tensorboard_key(plan.run_id, 1)))
    board.Reload()
    losses = board.Scalars("train/loss")
    events = [e["data"] for e in read_events(storage, plan.run_id, 1) if e["type"] == "step"]
    assert [point.step for point in losses] == list(range(1, 25))
    assert [point.value for point in losses] == pytest.approx([e["loss"] for e in events])
    second = read_manifest(storage, task_key(plan.run_id, 1, 1))
    assert second.general is not None
    assert board.Scalars("score/t0")[-1].value == pytest.approx(second.scores["t0"])
    assert board.Scalars("general/perplexity")[-1].value == pytest.approx(1 / second.general.after)
    assert [point.step for point in board.Scalars("curve/t0")] == [4, 8, 16, 20]


def test_one_worker_gives_the_adapter_of_two(
    ray_head: RayHead, model: Path, straight: tuple[Storage, RunPlan], storage: Storage
) -> None:
    plan = put_plan(storage, model, "run_one", steps=12, num_workers=1)
    assert start_driver(ray_head, storage, plan.run_id, 1).wait(240) == 0
    one, two = (
        load_file(s.path(f"{task_key(p.run_id, 1, 1)}/adapter/adapter_model.safetensors"))
        for s, p in ((storage, plan), straight)
    )
    assert one.keys() == two.keys()
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    assert moved > 1e-2  # far above the bound below
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_driver_killed_inside_a_task_goes_on_from_its_checkpoint_bit_for_bit(
    ray_head: RayHead, model: Path, straight: tuple[Storage, RunPlan], storage: Storage, tmp_path: Path
) -> None:
    plan = put_plan(storage, model, "run_cut", steps=12, checkpoint_every_steps=5)
    checkpoint = f"runs/{plan.run_id}/train/a1/task00001-step000000005/training.json"
    guards = {"class_name": "PlacementGroupCleaner", "state": "ALIVE"}
    with running_ray(tmp_path / "other"):  # beside a second cluster Ray Train's guard must find its own
        driver = start_driver(ray_head, storage, plan.run_id, 1)
        wait_for(lambda: storage.exists(checkpoint), driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert ray_rows(ray_head, "actors", **guards)
        wait_until(lambda: ray_rows(ray_head, "actors", **guards) == [], "the guard to end", 60)
        assert ray_rows(ray_head, "placement_groups", state="CREATED") == []
    assert find_progress(storage, plan, 2).num_done == 1
    assert start_driver(ray_head, storage, plan.run_id, 2).wait(240) == 0
    resumed = [event["data"] for event in read_events(storage, plan.run_id, 2) if event["type"] == "step"]
    assert {(data["task"], data["step"]) for data in resumed} == {("t1", step) for step in range(6, 13)}  # type: ignore[index]
    ours = adapter_bytes(storage, task_key(plan.run_id, 2, 1))
    assert ours == adapter_bytes(straight[0], task_key("run_straight", 1, 1))


def test_a_driver_killed_before_the_evaluation_of_a_grown_adapter_ends_with_the_same_bytes(
    ray_head: RayHead, model: Path, storage: Storage
) -> None:
    strategy = (StrategySpec(type="orthogonal_lora"), StrategySpec(type="experience_replay"))
    straight = put_plan(storage, model, "run_owner", strategy=strategy, num_eval_rows=300)
    assert start_driver(ray_head, storage, straight.run_id, 1).wait(240) == 0
    # Longer answers than the straight run's: what that one answered is not found in storage.
    longer = EvaluationSpec(max_new_tokens=6)
    plan = put_plan(storage, model, "run_owner_cut", strategy=strategy, num_eval_rows=300, evaluation=longer)
    driver = start_driver(ray_head, storage, plan.run_id, 1)
    checkpoint = f"runs/{plan.run_id}/train/a1/task00001-step000000006/training.json"
    wait_for(lambda: storage.exists(checkpoint), driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert find_progress(storage, plan, 2).num_done == 1
    assert start_driver(ray_head, storage, plan.run_id, 2).wait(240) == 0
    assert "step" not in {event["type"] for event in read_events(storage, plan.run_id, 2)}
    folders = [task_key(straight.run_id, 1, 1), task_key(plan.run_id, 2, 1)]
    assert adapter_bytes(storage, folders[0]) == adapter_bytes(storage, folders[1])
    assert storage.read_json(f"{folders[1]}/adapter/adapter_config.json")["r"] == 2 * plan.peft.r
    first = load_file(storage.path(f"{task_key(straight.run_id, 1, 0)}/adapter/adapter_model.safetensors"))
    both = load_file(storage.path(f"{folders[0]}/adapter/adapter_model.safetensors"))
    assert all((both[name][: plan.peft.r] == a).all() for name, a in first.items() if "lora_A" in name)
    assert rows_answered_twice(storage) == []


def test_a_bad_row_fails_the_run_with_its_number_and_no_retry(
    ray_head: RayHead, model: Path, storage: Storage
) -> None:
    plan = put_plan(storage, model, "run_bad", num_tasks=1)
    rows = letter_rows(20, 1)
    rows[6]["completion"] = "a " * 40
    bad = put_dataset(storage, "ds_train0", rows)
    task = plan.tasks[0].model_copy(update={"dataset": bad})
    changed = plan.model_copy(update={"tasks": (task,)})
    storage.write_bytes(f"runs/{plan.run_id}/plan.json", changed.model_dump_json().encode())
    assert start_driver(ray_head, storage, plan.run_id, 1).wait(240) == 0
    outcome = storage.read_json(outcome_key(plan.run_id, 1))
    assert (outcome["state"], outcome["reason"]) == ("failed", "data_error")
    assert "row 7" in outcome["message"]
    assert "41 tokens" in outcome["message"]
    starts = [e for e in read_events(storage, plan.run_id, 1) if e["type"] == "run.started"]
    assert len(starts) == 1


def test_more_workers_than_the_cluster_has_cpus_fail_with_both_numbers(
    ray_head: RayHead, model: Path, storage: Storage
) -> None:
    plan = put_plan(storage, model, "run_wide", num_workers=64, batch_size=64)
    assert start_driver(ray_head, storage, plan.run_id, 1).wait(120) == 0
    outcome = storage.read_json(outcome_key(plan.run_id, 1))
    assert (outcome["state"], outcome["reason"]) == ("failed", "no_capacity")
    assert outcome["message"] == f"num_workers 64 needs 64 CPUs, the cluster has {ray_head.num_cpus}"


# --------------------------------------------------------------------------------- the memory actor


@pytest.fixture(scope="module")
def connected(ray_head: RayHead) -> Iterator[None]:
    """This process as a Ray driver of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_head.environment().items():
            patch.setenv(name, value)
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False)
        yield
        ray.shutdown()


def _remember(
    storage: Storage, dataset: PlannedDataset, tokenizer: object, make: Callable[[], ExperienceReplay]
) -> object:
    """Start a memory actor and let experience replay keep rows of a first task in it."""
    actor = start_memory(storage.url, "run_m", 1, "job/0", None)
    session = _session(actor, 0, tokenizer)
    strategy = make()
    strategy.bind(strategy.model, strategy.params, session)
    rows = [RowReader(storage)(row_ref(dataset.id, i)) for i in range(dataset.num_rows)]
    strategy.after_training(
        "t0", [encode_row(r, tokenizer, 32, row_ref(dataset.id, i)) for i, r in enumerate(rows)]
    )  # type: ignore[arg-type]
    assert session.commit() == 1
    return actor


def _session(actor: object, version: int, tokenizer: object) -> MemorySession:
    return MemorySession(
        ActorMemory(actor),
        version=version,
        op_id=f"t{version}",
        encode=lambda row, ref: encode_row(row, tokenizer, 32, ref),  # type: ignore[arg-type]
    )


@pytest.mark.usefixtures("connected")
def test_a_row_altered_in_the_actor_is_what_the_next_task_trains_on(model: Path, storage: Storage) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset = put_dataset(storage, "ds_old", letter_rows(20, 1))
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM"))
    actor = _remember(
        storage,
        dataset,
        tokenizer,
        lambda: ExperienceReplay(lora, buffer_size=4, replay_ratio=0.5, replay_frequency=1),
    )
    kept = ActorMemory(actor).read(1, "experience_replay")["refs"]
    altered = {"prompt": "z z z :", "completion": " 9 9 9"}
    ray.get(actor.replace_row.remote(kept[0], altered))  # type: ignore[attr-defined]

    fresh = ExperienceReplay(lora, buffer_size=4, replay_ratio=0.5, replay_frequency=1)
    fresh.bind(lora, fresh.params, _session(actor, 1, tokenizer))
    fresh.before_training("t1")
    new = [encode_row(row, tokenizer, 32, f"ds_new:{i}") for i, row in enumerate(letter_rows(8, 3))]
    mixed = [
        example["input_ids"].tolist() for step in range(4) for example in fresh.mix_batch(new, step=step)
    ]
    assert encode_row(altered, tokenizer, 32)["input_ids"].tolist() in mixed
    original = RowReader(storage)(kept[0])
    assert encode_row(original, tokenizer, 32)["input_ids"].tolist() not in mixed
    ray.kill(actor)


@pytest.mark.usefixtures("connected")
def test_the_memory_actor_survives_a_kill_with_what_it_had_answered(
    storage: Storage,
) -> None:
    dataset = put_dataset(storage, "ds_old", letter_rows(20, 1))
    actor = start_memory(storage.url, "run_k", 1, "job/0", None)
    memory = ActorMemory(actor)
    rows = {f"{dataset.id}:3": {}}
    assert memory.write("op1", 0, {"s": {"refs": list(rows), "count": 1}}, {"s": rows}) == 1
    assert memory.write("op2", 1, {"s": {"refs": list(rows), "count": 2}}, {"s": rows}) == 2
    ray.kill(actor, no_restart=False)
    assert memory.read(2, "s")["count"] == 2
    assert memory.read(1, "s")["count"] == 1
    assert memory.rows(2, list(rows)) == [letter_rows(20, 1)[3]]
    assert memory.write("op2", 1, {"s": {"count": 9}}, {}) == 2  # a repeated write is answered, not applied
    assert memory.read(2, "s")["count"] == 2
    ray.kill(ray.get_actor(actor_name("run_k", 1), namespace=NAMESPACE))


def test_what_one_worker_alone_cannot_do_is_the_runs_outcome(
    ray_head: RayHead, model: Path, tmp_path: Path
) -> None:
    storage = Storage(f"file://{tmp_path}/storage")
    plan = put_plan(storage, model, "run_alone", num_tasks=1, steps=2)
    rows = letter_rows(4, 1)
    rows[1] = {**rows[1], "prompt": ""}  # of four rows, worker 1 is asked rows 1 and 3
    bad = put_dataset(storage, "ds_bad", rows)
    tasks = (plan.tasks[0].model_copy(update={"eval_dataset": bad}),)
    plan = plan.model_copy(update={"tasks": tasks})
    storage.write_json(plan_key(plan.run_id), plan.model_dump(mode="json"))
    process = start_driver(ray_head, storage, plan.run_id, 1)
    assert process.wait(240) == 0
    outcome = storage.read_json(outcome_key(plan.run_id, 1))
    assert (outcome["state"], outcome["reason"]) == ("failed", "data_error")
    assert "row 1: the prompt has no tokens" in outcome["message"]
