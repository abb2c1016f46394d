"""The whole service embedded on this machine, with a tiny model: REST, Ray, Serve, and parts that die."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.client import ApiError, Client
from service.embedded import EmbeddedState, down, stop_api, up
from service.processes import family
from service.settings import Settings
from tests.service.tiny import letter_rows, save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = (6, 150)
"""The second task is long enough to be interrupted."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home of its own with the base model `tiny`."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "models" / "tiny")
    return Settings(home=home, port=0)


@pytest.fixture(scope="module")
def running(settings: Settings) -> Iterator[EmbeddedState]:
    """The embedded service; whatever is left of it at the end fails the test run."""
    state = up(settings)
    yield state
    assert down(settings.home) == []
    assert family([state.ray.root], state.ray.marker) == []
    assert not state.ray.temp_dir.exists()


@pytest.fixture(scope="module")
def client(running: EmbeddedState) -> Iterator[Client]:
    """The REST client."""
    with Client(running.api_url) as found:
        yield found


@pytest.fixture(scope="module")
def datasets(client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Uploaded data sets: name -> id."""
    folder = tmp_path_factory.mktemp("rows")
    ids = {}
    for i in range(3):
        for kind, count in (("train", 20), ("eval", 7)):
            path = folder / f"{kind}{i}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(count, i + 1)))
            ids[f"{kind}{i}"] = client.upload_dataset(f"{kind}{i}", path)["id"]
    return ids


def make_spec(name: str, datasets: dict[str, str]) -> dict[str, Any]:
    """A job of two tasks on two workers with EWC and experience replay."""
    return {
        "name": name,
        "base_model": {"id": "tiny"},
        "peft": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "strategy": [
            {"type": "ewc", "ewc_lambda": 10.0},
            {"type": "experience_replay", "buffer_size": 4, "replay_ratio": 0.3},
        ],
        "tasks": [
            {
                "name": f"t{i}",
                "dataset": datasets[f"train{i}"],
                "eval_dataset": datasets[f"eval{i}"],
                "steps": steps,
            }
            for i, steps in enumerate(STEPS)
        ],
        "training": {"num_workers": 2, "learning_rate": 0.01, "batch_size": 6, "max_length": 32},
    }


def finish(client: Client, job_id: str) -> tuple[dict[str, Any], list[Any]]:
    """Follow a job to its end; return it and all its events."""
    events = list(client.events(job_id))
    return client.job(job_id), events


@pytest.fixture(scope="module")
def straight(client: Client, datasets: dict[str, str]) -> tuple[dict[str, Any], list[Any]]:
    """An uninterrupted job."""
    job, events = finish(client, client.submit(make_spec("straight", datasets))["id"])
    assert job["state"] == "succeeded", job
    return job, events


def adapter_file(settings: Settings, client: Client, name: str, version: int) -> Path:
    """Return the stored weights of a version."""
    found = next(v for v in client.adapter(name)["versions"] if v["version"] == version)
    return settings.home / "storage" / found["task_dir"] / "adapter" / "adapter_model.safetensors"


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    """Poll until something is found and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the awaited moment did not come"
        time.sleep(0.01)
    return found


def drivers(run_id: str) -> list[psutil.Process]:
    """Return the driver process of a run."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if run_id in (process.info["cmdline"] or []) and "service.workers.driver" in process.info["cmdline"]
    ]


def test_a_job_reports_progress_scores_and_one_version_per_task(
    client: Client, straight: tuple[dict[str, Any], list[Any]]
) -> None:
    job, events = straight
    steps = [event.data for event in events if event.type == "step"]
    assert [(s["task"], s["step"]) for s in steps] == [
        (f"t{i}", step) for i, count in enumerate(STEPS) for step in range(1, count + 1)
    ]
    assert [e.data["version"] for e in events if e.type == "task.committed"] == [1, 2]
    assert [event.id for event in events] == sorted({event.id for event in events})
    matrix = client.matrix(job["id"])
    assert len(matrix["matrix"]) == 2
    assert all(score is not None for row in matrix["matrix"] for score in row)
    assert all(score is not None for score in matrix["base_scores"])
    for name in ("average_accuracy", "forgetting", "bwt", "fwt", "learning_accuracy"):
        assert isinstance(matrix[name], float)
    assert client.adapter("straight")["aliases"] == {"live": 2}
    logs = httpx.get(f"{client.url}/v1/jobs/{job['id']}/logs", trust_env=False)
    assert "Connected to Ray cluster" in logs.text
    assert client.health()["status"] == "ready"


@pytest.mark.usefixtures("straight")
def test_the_served_adapter_answers_with_the_tokens_of_peft(
    running: EmbeddedState, settings: Settings, client: Client
) -> None:
    folder = adapter_file(settings, client, "straight", 2).parent
    base_folder = settings.home / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).eval()
    with openai.OpenAI(base_url=f"{running.api_url}/v1", api_key="unused") as served:
        assert "straight" in {model.id for model in served.models.list()}
        for row in letter_rows(5, 2):
            ids = tokenizer(row["prompt"], return_tensors="pt")
            with torch.inference_mode():
                expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[
                    0, ids["input_ids"].shape[1] :
                ]
            answer = served.completions.create(
                model="straight", prompt=row["prompt"], max_tokens=8, temperature=0
            )
            assert answer.model == "straight@v2"
            assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.usefixtures("straight")
def test_a_job_whose_driver_is_killed_between_tasks_ends_with_the_same_bytes(
    client: Client, settings: Settings, datasets: dict[str, str]
) -> None:
    job = client.submit(make_spec("killed", datasets))
    run_id = wait_for(lambda: client.job(job["id"])["runs"])[0]["id"]
    first = settings.home / "storage" / "runs" / run_id / "a1" / "tasks" / "0" / "manifest.json"
    wait_for(first.exists)
    for process in drivers(run_id):
        process.kill()
    ended, events = finish(client, job["id"])
    assert ended["state"] == "succeeded", ended
    assert [e.data["attempt"] for e in events if e.type == "attempt.started"] == [1, 2]
    assert [e.data["version"] for e in events if e.type == "task.committed"] == [1, 2]
    again = [e.data for e in events if e.type == "step"][-STEPS[1] :]
    assert {data["task"] for data in again} == {"t1"}
    for version in (1, 2):
        ours, theirs = (adapter_file(settings, client, name, version) for name in ("killed", "straight"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_training_goes_on_while_the_api_is_restarted(
    running: EmbeddedState, settings: Settings, client: Client, datasets: dict[str, str]
) -> None:
    job = client.submit(make_spec("restarted", datasets))
    wait_for(lambda: client.job(job["id"])["state"] == "running")
    stop_api(running)
    with pytest.raises(ApiError, match="no service answers"):
        client.job(job["id"])
    port = int(running.api_url.rpartition(":")[2])
    restarted = up(settings.model_copy(update={"port": port}))
    assert restarted.ray.root == running.ray.root
    ended, events = finish(client, job["id"])
    assert ended["state"] == "succeeded", ended
    assert [e.data["attempt"] for e in events if e.type == "attempt.started"] == [1]
    steps = [event.data for event in events if event.type == "step"]
    assert len(steps) == sum(STEPS)  # nothing was lost meanwhile


def test_a_task_appended_to_a_finished_job_is_the_only_one_trained(
    running: EmbeddedState,
    settings: Settings,
    client: Client,
    datasets: dict[str, str],
    straight: tuple[dict[str, Any], list[Any]],
) -> None:
    job, before = straight
    task = {"name": "t2", "dataset": datasets["train2"], "eval_dataset": datasets["eval2"], "steps": 5}
    runs = settings.home / "storage" / "runs" / job["runs"][0]["id"]
    files = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    client.append_task(job["id"], task)
    ended, events = finish(client, job["id"])
    assert ended["state"] == "succeeded", ended
    new = [event for event in events if event.id > before[-1].id]
    assert {event.data["task"] for event in new if event.type == "step"} == {"t2"}
    trained = next(event.data for event in new if event.type == "task.trained")
    assert trained["replay_tokens"] > 0  # the buffer of the first run was there
    assert files == {path: path.read_bytes() for path in files}  # and nothing of it was touched
    matrix = client.matrix(job["id"])
    assert matrix["tasks"] == ["t0", "t1", "t2"]
    assert all(score is not None for score in matrix["matrix"][2])
    assert matrix["matrix"][1][2] is not None  # scored before it was trained, so that transfer counts it
    assert isinstance(matrix["fwt"], float)
    assert None not in matrix["intervals_95"].values()
    report = client.report(job["id"], format="md")
    assert "| t2 | training | " in report
    assert client.report(job["id"], format="md") == report
    with openai.OpenAI(base_url=f"{running.api_url}/v1", api_key="unused") as served:
        answers = {
            name: served.completions.create(model=name, prompt="a b 3 :", max_tokens=2, temperature=0).model
            for name in ("straight", "straight@v2", "straight@live")
        }
    assert answers == {
        "straight": "straight@v3",
        "straight@v2": "straight@v2",
        "straight@live": "straight@v3",
    }


def test_a_cancelled_job_stops_and_takes_no_more_tasks(client: Client, datasets: dict[str, str]) -> None:
    spec = make_spec("cancelled", datasets)
    spec["tasks"][0]["steps"] = 100_000
    job = client.submit(spec)
    wait_for(lambda: client.job(job["id"])["state"] == "running")
    client.cancel(job["id"])
    ended, _ = finish(client, job["id"])
    assert ended["state"] == "cancelled"
    task = {"name": "t2", "dataset": datasets["train2"], "steps": 5}
    with pytest.raises(ApiError, match="cancelled") as refused:
        client.append_task(job["id"], task)
    assert refused.value.status == 409
    assert len(client.job(job["id"])["tasks"]) == 2


def test_a_second_up_finds_the_running_service(running: EmbeddedState, settings: Settings) -> None:
    assert up(settings).ray.root == running.ray.root


def test_the_prepared_model_is_left_as_it_was(settings: Settings, tmp_path: Path) -> None:
    again = save_tiny_model(tmp_path / "tiny")
    weights = (settings.home / "models" / "tiny" / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    shutil.rmtree(again)
