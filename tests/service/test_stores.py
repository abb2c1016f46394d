"""One real run on S3, on a store that fails every third call, on a slow one and on a full disk.

Whatever the store, the adapters are those of the same run on a local disk, bit for bit.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from service.adapters.logs import log_processes, log_text
from service.adapters.manifest import ADAPTER, STATE
from service.adapters.storage import Storage, StorageError, outcome_key, task_key
from service.adapters.store_calls import DamagedFile
from service.adapters.version_files import fetch_folder, read_manifest
from service.db.session import Sessions
from service.memory.actor import MemoryActor
from service.ray_head import RayHead
from service.serving.engine import AdapterRef, Finished, GenerateRequest
from service.settings import Settings
from service.specs import EvaluationSpec, ParentVersion, RunPlan
from tests.service.control import run_service, write_task
from tests.service.failing_fs import register
from tests.service.s3_server import BUCKET, S3Server
from tests.service.tiny import put_plan, save_tiny_model

STEPS = 4


pytestmark = pytest.mark.timeout(900)  # Ray and an S3 server start inside


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def put_run(storage: Storage, model: Path, run_id: str = "run_1", **changes: Any) -> RunPlan:
    """Write the run that every store gets: two tasks on one worker, with checkpoints inside a task."""
    given = {"num_tasks": 2, "steps": STEPS, "num_workers": 1, "checkpoint_every_steps": 2, **changes}
    return put_plan(storage, model, run_id, evaluation=EvaluationSpec(general=None), **given)


def drive(
    head: RayHead,
    storage: Storage,
    environment: Mapping[str, str],
    *,
    run_id: str = "run_1",
    attempt: int = 1,
) -> tuple[int, dict[str, Any]]:
    """Run a driver as the Jobs API does, with an environment for it and all its workers.

    Returns its exit code and its outcome, empty when there is none.
    """
    process = start_driver(head, storage, environment, run_id, attempt)
    code = process.wait(600)
    try:
        return code, storage.read_json(outcome_key(run_id, attempt))
    except FileNotFoundError:
        return code, {}


def start_driver(
    head: RayHead, storage: Storage, environment: Mapping[str, str], run_id: str, attempt: int
) -> subprocess.Popen[bytes]:
    """Start a driver; its output goes to a file, as under the Jobs API."""
    job = {"runtime_env": {"env_vars": dict(environment)}}
    variables = {**os.environ, **head.environment(), **environment, "CLPEFT_STORAGE_URL": storage.url}
    variables["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)
    command = [sys.executable, "-m", "service.workers.driver", "--run", run_id, "--attempt", str(attempt)]
    log = Path(variables["CLPEFT_TEST_LOGS"]) / f"{run_id}-{attempt}.log"
    with log.open("wb") as file:
        return subprocess.Popen(command, env=variables, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPEFT_TEST_LOGS", str(tmp_path))


def weights(storage: Storage, attempts: tuple[int, int] = (1, 1)) -> list[bytes]:
    """The adapters of both tasks as stored."""
    folders = [task_key("run_1", attempt, index) for index, attempt in enumerate(attempts)]
    return [storage.read_bytes(f"{folder}/adapter/adapter_model.safetensors") for folder in folders]


@pytest.fixture(scope="module")
def straight(ray_head: RayHead, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """The run on a local disk."""
    folder = tmp_path_factory.mktemp("straight")
    storage = Storage(f"file://{folder}/storage")
    put_run(storage, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLPEFT_TEST_LOGS", str(folder))
        code, outcome = drive(ray_head, storage, {})
    assert (code, outcome["state"]) == (0, "succeeded")
    return storage


# ------------------------------------------------------------------------------------------- stores that work


@pytest.fixture(params=["s3", "failing", "slow"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A store: the variables that its users need, set in this process too, and its URL."""
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        variables = {**server.environment(), "CLPEFT_STORAGE_URL": f"s3://{BUCKET}/{tmp_path.name}"}
    else:
        variables = troubled(request.param, tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def troubled(protocol: str, folder: Path) -> dict[str, str]:
    """Return the variables of a store of tests.service.failing_fs."""
    name = f"tests.service.failing_fs.{protocol.capitalize()}FileSystem"
    fsspec.register_implementation(protocol, name, clobber=True)
    paths = [register(folder / "package"), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CLPEFT_STORAGE_URL": f"{protocol}://{folder}/storage",
    }


@pytest.mark.ray
def test_a_run_ends_with_the_adapters_of_a_local_one(
    ray_head: RayHead, model: Path, straight: Storage, store: dict[str, str]
) -> None:
    storage = Storage(store["CLPEFT_STORAGE_URL"])
    put_run(storage, model)
    code, outcome = drive(ray_head, storage, store)
    assert (code, outcome) == (0, {"state": "succeeded", "reason": None, "message": ""})
    assert weights(storage) == weights(straight)
    assert read_manifest(storage, task_key("run_1", 1, 1)).parent_dir == task_key("run_1", 1, 0)
    processes = log_processes(storage, "run_1", 1)
    assert processes[0] == "driver"
    assert [name.rpartition("-")[0] for name in processes[1:]] == ["worker-0"]
    assert "".join(log_text(storage, "run_1", 1, "driver"))
    if storage.url.startswith("s3:"):
        _is_served(storage, model)


def _is_served(storage: Storage, model: Path) -> None:
    """Ask the last version on S3."""
    from service.serving.transformers_engine import TransformersEngine

    async def ask() -> None:
        engine = TransformersEngine(storage_url=storage.url, max_adapters=2, num_threads=1)
        adapter = AdapterRef(id="tiny@v2", task_dir=task_key("run_1", 1, 1))
        request = GenerateRequest(
            base_model_path=str(model), adapter=adapter, prompt="a b 1 :", max_tokens=2, temperature=0.0
        )
        events = [event async for event in engine.generate(request)]
        assert isinstance(events[-1], Finished)
        assert engine.status().adapters == ("tiny@v2",)

    asyncio.run(ask())


def test_the_control_plane_works_on_s3(
    settings: Settings, sessions: Sessions, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{settings.home.name}"
    with run_service(settings.model_copy(update={"storage_url": url}), sessions) as service:
        assert service.client.get("/readyz").json()["checks"]["storage"] == "ok"
        job = service.submit("one")
        run = job["runs"][0]["id"]
        service.reconciler.tick()
        write_task(service.storage, run, 1, 0, scores={"one": 0.5})
        service.reconciler.tick()
        assert service.job(job["id"])["state"] == "succeeded"
        assert service.client.get("/v1/adapters/demo/versions/1").status_code == 200
        used = job["tasks"][0]["dataset_id"]
        free = service.upload("free")
        assert service.client.delete(f"/v1/datasets/{free}").status_code == 204
        assert service.storage.find("datasets") == [f"datasets/{used}/rows.jsonl"]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        service.app.state.storage = Storage(url)
        refused = service.client.post(
            "/v1/datasets",
            params={"name": "more"},
            content=b'{"prompt": "a", "completion": " b"}\n',
            headers={"Content-Type": "application/x-ndjson"},
        )
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
        assert refused.headers["retry-after"] == "5"


# -------------------------------------------------------------------------------------- stores that do not


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.ray
def test_a_full_disk_ends_the_attempt_and_the_next_one_goes_on_when_there_is_space(
    ray_head: RayHead, model: Path, straight: Storage, small_disk: Path, tmp_path: Path
) -> None:
    storage = Storage(f"file://{small_disk}/storage")
    put_run(storage, model)
    driver = start_driver(ray_head, storage, {}, "run_1", 1)
    first = task_key("run_1", 1, 0)
    while not storage.exists(f"{first}/manifest.json"):
        assert driver.poll() is None
    _fill(small_disk)
    code = driver.wait(300)
    text = (tmp_path / "run_1-1.log").read_text()
    assert code != 0, text  # there is no space for an outcome either
    assert "No space left on device" in text
    fetch_folder(storage, first, ADAPTER, tmp_path / "version")
    assert not storage.exists(f"{task_key('run_1', 1, 1)}/manifest.json")
    (small_disk / "filler").unlink()
    code, outcome = drive(ray_head, storage, {}, attempt=2)
    assert (code, outcome["state"]) == (0, "succeeded")
    assert weights(storage, (1, 2)) == weights(straight)


@pytest.mark.ray
def test_a_checkpoint_that_cannot_be_stored_ends_the_attempt(
    ray_head: RayHead, model: Path, tmp_path: Path
) -> None:
    variables = troubled("narrow", tmp_path)
    storage = Storage(variables["CLPEFT_STORAGE_URL"])
    put_run(storage, model)
    code, outcome = drive(ray_head, storage, variables)
    assert (code, outcome["state"], outcome["reason"]) == (0, "failed", "storage_error")
    assert "No space left on device" in outcome["message"]
    assert not storage.exists(f"{task_key('run_1', 1, 0)}/manifest.json")


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


@pytest.fixture
def damaged(straight: Storage, tmp_path: Path) -> Storage:
    """A copy of the straight run whose first version has one changed byte in adapter and state."""
    storage = Storage(f"file://{tmp_path}/storage")
    straight.get_folder("runs/run_1/a1/tasks/0", f"{storage.root}/runs/run_1/a1/tasks/0")
    for name in ("adapter/adapter_model.safetensors", "state/memory.safetensors"):
        path = Path(storage.root, "runs/run_1/a1/tasks/0", name)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    return storage


@pytest.mark.ray
def test_a_changed_file_of_a_version_is_refused_with_both_digests(damaged: Storage, tmp_path: Path) -> None:
    folder = task_key("run_1", 1, 0)
    manifest = read_manifest(damaged, folder)
    for part, name in ((ADAPTER, "adapter/adapter_model.safetensors"), (STATE, "state/memory.safetensors")):
        with pytest.raises(DamagedFile, match="is damaged") as refused:
            fetch_folder(damaged, folder, part, tmp_path / part)
        assert f"{folder}/{name}" in str(refused.value)
        assert manifest.files[name].sha256 in str(refused.value)
    actor = MemoryActor(damaged.url, "run_2", 1, "job/0", f"{folder}/{STATE}")
    with pytest.raises(StorageError, match=r"state/memory\.safetensors is damaged"):
        actor.newest()
    (Path(damaged.root) / folder / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(DamagedFile, match="not in storage"):
        fetch_folder(damaged, folder, ADAPTER, tmp_path / "again")


@pytest.mark.ray
def test_a_run_on_a_damaged_parent_ends_with_storage_error_and_its_worker_says_why(
    ray_head: RayHead, model: Path, damaged: Storage
) -> None:
    parent = ParentVersion(version=1, task_dir=task_key("run_1", 1, 0))
    put_run(damaged, model, "run_2", num_tasks=1, first=1, parent=parent)
    code, outcome = drive(ray_head, damaged, {}, run_id="run_2")
    assert (code, outcome["state"], outcome["reason"]) == (0, "failed", "storage_error")
    assert "runs/run_1/a1/tasks/0/" in outcome["message"]
    (worker,) = [name for name in log_processes(damaged, "run_2", 1) if name != "driver"]
    text = "".join(log_text(damaged, "run_2", 1, worker))
    assert "Traceback" in text
    assert "DamagedFile" in text


@pytest.mark.parametrize(
    ("desired", "state"),
    [
        ({"state": "paused", "attempt": 1}, "paused"),
        ({"state": "cancelled", "attempt": 1}, "cancelled"),
        ({"state": "running", "attempt": 2}, "superseded"),
    ],
)
def test_a_driver_that_should_not_work_says_so_before_it_joins_the_cluster(
    model: Path, tmp_path: Path, desired: dict[str, Any], state: str
) -> None:
    storage = Storage(f"file://{tmp_path}/storage")
    put_run(storage, model)
    storage.write_json("runs/run_1/desired.json", desired)
    variables = {**os.environ, "CLPEFT_STORAGE_URL": storage.url, "RAY_ADDRESS": "127.0.0.1:1"}
    command = [sys.executable, "-m", "service.workers.driver", "--run", "run_1", "--attempt", "1"]
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=120)
    assert storage.read_json(outcome_key("run_1", 1))["state"] == state
