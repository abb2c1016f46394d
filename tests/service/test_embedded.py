"""The embedded service: started, adopted, ended without a trace; bad starts leave nothing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from service import embedded
from service.chat import Conversation
from service.client import Client
from service.embedded import EmbeddedError, EmbeddedState
from service.processes import ProcessRef, family, refer_to
from service.ray_head import RayHead, ray_processes, running_ray
from service.settings import Settings
from tests.service.tiny import letter_rows, save_tiny_model


def settings_for(home: Path, **changes: object) -> Settings:
    return Settings.model_validate({"home": home, "port": 0, "poll_interval_s": 0.2, **changes})


def stored_state(home: Path, root: ProcessRef) -> Path:
    """Write the state of a service that consists of one process."""
    temp_dir = home / "ray_temp"
    temp_dir.mkdir(parents=True)
    ray = RayHead(
        root=root,
        marker=f"stored-{os.getpid()}",
        temp_dir=temp_dir,
        log_path=home / "run" / "ray.log",
        token_path=home / "run" / "ray_token",
        address="127.0.0.1:1",
        dashboard_url="http://127.0.0.1:1",
        agent_url="http://127.0.0.1:1",
        num_cpus=2,
    )
    path = home / "run" / "embedded.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        EmbeddedState(home=home, ray=ray, serve_url="http://127.0.0.1:1", api=root).model_dump_json()
    )
    return path


# ------------------------------------------------------------ state


def test_down_where_nothing_was_started_says_so(tmp_path: Path) -> None:
    assert embedded.down(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_stale_state_never_ends_the_process_that_got_the_pid(tmp_path: Path) -> None:
    me = refer_to(os.getpid())
    path = stored_state(tmp_path, ProcessRef(pid=me.pid, create_time=me.create_time - 1000))
    state = embedded.read_state(tmp_path)
    assert state is not None
    assert not state.api_runs
    assert not state.ray.is_alive()
    assert embedded.down(tmp_path) == []
    assert not path.exists()
    assert not (tmp_path / "ray_temp").exists()


def test_a_damaged_state_is_a_clear_error_and_stays(tmp_path: Path) -> None:
    path = stored_state(tmp_path, refer_to(os.getpid()))
    path.write_text(json.dumps({"home": str(tmp_path)}))
    with pytest.raises(EmbeddedError, match=r"embedded\.json is damaged"):
        embedded.down(tmp_path)
    assert path.exists()


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"port {port} on 127.0.0.1 is taken"):
            embedded.up(settings_for(tmp_path, port=port))
    assert embedded.read_state(tmp_path) is None
    assert not (tmp_path / "run" / "ray.log").exists()


def test_two_starts_at_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedError, match="another process is starting or ending the service"):
            embedded.up(settings_for(tmp_path))


# ------------------------------------------------------------ Ray alone


@pytest.mark.ray
def test_a_ray_head_is_private_and_leaves_nothing(tmp_path: Path) -> None:
    with running_ray(tmp_path) as head:
        processes = ray_processes(head)
        assert len(processes) > 5
        assert stat.S_IMODE(head.token_path.stat().st_mode) == 0o600
        assert head.num_cpus >= 2
        without_token = httpx.get(f"{head.dashboard_url}/api/jobs/", trust_env=False)
        assert without_token.status_code in (401, 403)
        addresses = {
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
        with running_ray(tmp_path / "second") as second:
            assert second.is_alive(), "two heads live side by side"
        assert head.is_alive(), "ending one leaves the other"
    assert not any(runs(process) for process in processes)
    assert ray_processes(head) == []
    assert not head.temp_dir.exists()
    assert not head.token_path.exists()


# ------------------------------------------------------------ whole service

START = "from service import embedded; from service.settings import Settings; embedded.up(Settings())"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tiny base model."""
    path = tmp_path_factory.mktemp("home")
    save_tiny_model(path / "models" / "tiny")
    return path


@pytest.fixture(scope="module")
def state(home: Path) -> Iterator[EmbeddedState]:
    """A running service."""
    started = embedded.up(settings_for(home))
    yield started
    embedded.down(home)


def job_spec(client: Client, folder: Path) -> dict[str, object]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in letter_rows(16, 1)))
    dataset = client.upload_dataset("letters", rows)
    return {
        "name": "letters",
        "base_model": {"id": "tiny"},
        "peft": {"r": 2, "target_modules": ["q_proj"]},
        "tasks": [{"name": "one", "dataset": dataset["id"], "steps": 2}],
        "training": {"batch_size": 4, "micro_batch_size": 4, "max_length": 32},
    }


@pytest.mark.ray
def test_up_on_a_running_service_changes_nothing(state: EmbeddedState, home: Path) -> None:
    assert embedded.up(settings_for(home)) == state
    assert embedded.read_state(home) == state


@pytest.mark.ray
def test_up_on_a_running_service_refuses_another_port(state: EmbeddedState, home: Path) -> None:
    port = int(state.api_url.rpartition(":")[2])
    with pytest.raises(EmbeddedError, match=f"runs already, on port {port}; end it with 'clpeft down'"):
        embedded.up(settings_for(home, port=port + 1))
    assert embedded.up(settings_for(home, port=port)) == state


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_up_beside_a_service_that_was_half_started_waits_for_all_of_it(tmp_path: Path) -> None:
    variables = {**os.environ, "CLPEFT_HOME": str(tmp_path), "CLPEFT_PORT": "0"}
    starter = subprocess.Popen([sys.executable, "-c", START], env=variables)
    try:
        while (half := embedded.read_state(tmp_path)) is None or half.api is None:
            assert starter.poll() is None
            time.sleep(0.05)
        starter.kill()
        starter.wait()
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{half.api_url}/healthz", trust_env=False)
        whole = embedded.up(settings_for(tmp_path))
        assert whole == half
        assert httpx.get(f"{whole.api_url}/healthz", trust_env=False).is_success
        assert httpx.get(f"{whole.serve_url}/status", trust_env=False).is_success
    finally:
        starter.kill()
        assert embedded.down(tmp_path) == []


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_goes_on_while_the_api_is_killed_and_started_again(
    state: EmbeddedState, home: Path, tmp_path: Path
) -> None:
    with Client(state.api_url) as client:
        job = client.submit(job_spec(client, tmp_path))
        submitted = next(event for event in client.events(job["id"]) if event.type == "run.submitted")
    assert state.api is not None
    os.kill(state.api.pid, signal.SIGKILL)
    wait_until_gone(state.api)

    again = embedded.up(Settings.model_validate({"home": home, "poll_interval_s": 0.2}))  # no port is said
    assert again.ray == state.ray, "Ray was adopted, not started again"
    assert again.ray.is_alive()
    assert again.api != state.api
    assert again.api_url == state.api_url, "whoever watched goes on"
    with Client(again.api_url) as client:
        types = [event.type for event in client.events(job["id"], after=submitted.id)]
        assert types[-1] == "job.succeeded"
        assert "attempt.lost" not in types
        assert len(client.job(job["id"])["runs"]) == 1
        answer = "".join(Conversation(client, "letters@v1", max_tokens=3).ask("a b 1 :"))
        assert isinstance(answer, str)
        assert client.adapter("letters")["latest_version"] == 1


@pytest.mark.ray
@pytest.mark.usefixtures("state")
def test_down_leaves_no_process_and_no_file_of_a_run(home: Path) -> None:
    running = embedded.read_state(home)
    assert running is not None
    assert running.api is not None
    everything = [*family([running.ray.root], running.ray.marker), *family([running.api], running.api_marker)]
    assert len(everything) > 8
    assert embedded.down(home) == []
    assert not any(runs(process) for process in everything)
    assert not running.ray.temp_dir.exists()
    assert not running.ray.token_path.exists()
    assert embedded.read_state(home) is None
    assert embedded.down(home) is None
    assert (home / "clpeft.db").exists(), "jobs and adapters stay"


@pytest.mark.ray
def test_an_api_that_cannot_start_is_reported_with_its_log_and_ray_is_ended(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[EmbeddedState] = []

    def note_state(_text: str) -> None:
        if (current := embedded.read_state(tmp_path)) is not None:
            seen.append(current)

    settings = settings_for(tmp_path, database_url=f"sqlite:///{tmp_path / 'file' / 'clpeft.db'}")
    with pytest.raises(EmbeddedError, match="the API ended while starting"):
        embedded.up(settings, progress=note_state)
    assert seen, "Ray was started"
    assert embedded.read_state(tmp_path) is None
    assert family([seen[-1].ray.root], seen[-1].ray.marker) == []
    assert not seen[-1].ray.temp_dir.exists()


def runs(process: psutil.Process) -> bool:
    """Is it more than an entry that init has yet to remove?"""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(reference: ProcessRef) -> None:
    deadline = time.monotonic() + 20
    while reference.process() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
