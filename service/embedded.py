"""The whole service on this machine: a Ray head, the Serve application and the API, processes of their own.

    up(settings)      start what does not run yet; a Ray that runs without its API is adopted
    down(home)        end exactly what up started
    read_state(home)  what runs, from <home>/run/embedded.json

The processes outlive their starter, so that restarting the API never touches Ray and a training run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from service.processes import MARKER, ProcessRef, end_family, free_ports, port_is_free, spawn, uninterrupted
from service.ray_head import (
    RayHead,
    RayStartError,
    launch_ray,
    log_tail,
    ray_processes,
    running_ray,
    stop_ray,
    wait_ray,
)
from service.settings import Settings

__all__ = [
    "EmbeddedError",
    "EmbeddedState",
    "RayHead",
    "RayStartError",
    "down",
    "embedded_settings",
    "launch_ray",
    "ray_processes",
    "read_state",
    "running_ray",
    "stop_api",
    "stop_ray",
    "up",
    "wait_ray",
]

Progress = Callable[[str], None]
PORT_PATIENCE_S = 5.0
"""How long a new API waits for the port of the one before."""


class EmbeddedError(RuntimeError):
    """The embedded service cannot be started or ended."""


class EmbeddedState(BaseModel):
    """What an embedded service consists of; stored as <home>/run/embedded.json."""

    model_config = ConfigDict(frozen=True)
    home: Path
    ray: RayHead
    serve_url: str
    api: ProcessRef | None = None
    api_url: str = ""

    @property
    def api_runs(self) -> bool:
        """Does the API's process run?"""
        return self.api is not None and self.api.process() is not None

    @property
    def api_marker(self) -> str:
        """The marker of the API's own processes, which are not Ray's."""
        return f"{self.ray.marker}-api"


def read_state(home: Path) -> EmbeddedState | None:
    """Return what was started under home, running or not; None when nothing was. Raises EmbeddedError."""
    path = _state_path(home)
    try:
        return EmbeddedState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise EmbeddedError(f"{path} is damaged; end its processes by hand and delete it") from error


def up(settings: Settings, *, progress: Progress = lambda _: None) -> EmbeddedState:
    """Start the service, or what is missing of it, and wait until every part answers.

    Port 0 takes a free port; without a port in the settings a new API takes that of the one before. Raises
    EmbeddedError with the end of the failing part's log; what this call started is ended again then.
    """
    home = settings.home
    with _lock(home):
        state = read_state(home)
        if state is not None and state.ray.is_alive() and state.api_runs:
            return _running(settings, state)
        patience_s = 0.0 if state is None else PORT_PATIENCE_S
        if state is not None and state.api_url and "port" not in settings.model_fields_set:
            # whoever watches a job looks for the API where it was
            settings = settings.model_copy(update={"port": urlsplit(state.api_url).port})
        if state is not None and not state.ray.is_alive():
            progress("removing what an earlier service left")
            _end(state)
            state = None
        _check_port(settings, patience_s=patience_s)
        adopted = state is not None
        try:
            if state is None:
                progress("starting Ray")
                ray = launch_ray(home / "run")
                state = EmbeddedState(home=home, ray=ray, serve_url=f"http://127.0.0.1:{free_ports(1)[0]}")
                _write_state(state)
            state = _launch_api(settings, state)
            _write_state(state)
            wait_ray(state.ray)
            progress("starting the API")
            _wait_api(state)
            progress("starting Ray Serve")
            _wait_serve(embedded_settings(settings, state))
        except BaseException as error:
            if state is not None and adopted:
                stop_api(state)
            elif state is not None:
                _end(state)
            if isinstance(error, RayStartError):
                raise EmbeddedError(str(error)) from error
            raise
    return state


def _running(settings: Settings, state: EmbeddedState) -> EmbeddedState:
    """Wait for what an earlier call started, perhaps one that was killed meanwhile."""
    port = urlsplit(state.api_url).port
    if "port" in settings.model_fields_set and settings.port not in (0, port):
        raise EmbeddedError(
            f"the service runs already, on port {port}; "
            f"end it with 'clpeft down' to start it on {settings.port}"
        )
    try:
        wait_ray(state.ray)
    except RayStartError as error:
        raise EmbeddedError(str(error)) from error
    _wait_api(state)
    _wait_serve(embedded_settings(settings, state))
    return state


def down(home: Path) -> list[psutil.Process] | None:
    """End everything that up started; return the processes that could not be ended, None when nothing ran."""
    if not _state_path(home).exists():
        return None
    with _lock(home):
        state = read_state(home)
        return None if state is None else _end(state)


def stop_api(state: EmbeddedState) -> None:
    """End the API alone; Ray and a training run go on, and `up` starts a new API beside them."""
    if state.api is not None:
        with uninterrupted():
            end_family([state.api], state.api_marker)


def embedded_settings(settings: Settings, state: EmbeddedState) -> Settings:
    """Return the settings with the addresses of a running service."""
    return settings.model_copy(
        update={
            "ray_dashboard_url": state.ray.dashboard_url,
            "ray_token_path": state.ray.token_path,
            "serve_url": state.serve_url,
        }
    )


def settings_environment(settings: Settings) -> dict[str, str]:
    """Return the settings as the CLPEFT_ variables that another process reads them from."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {f"CLPEFT_{name.upper()}": str(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------ parts


def _check_port(settings: Settings, *, patience_s: float) -> None:
    """Raise EmbeddedError when the port stays taken; a process that was killed holds it for a moment."""
    deadline = time.monotonic() + patience_s
    while settings.port and not port_is_free(settings.host, settings.port):
        if time.monotonic() > deadline:
            raise EmbeddedError(
                f"port {settings.port} on {settings.host} is taken; choose another with --port"
            )
        time.sleep(0.05)


def _launch_api(settings: Settings, state: EmbeddedState) -> EmbeddedState:
    port = settings.port or free_ports(1)[0]
    wired = embedded_settings(settings.model_copy(update={"port": port}), state)
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CLPEFT_"))
    }
    variables |= {
        "OMP_WAIT_POLICY": "PASSIVE",
        MARKER: state.api_marker,
        **state.ray.environment(),
        **settings_environment(wired),
    }
    command = [sys.executable, "-m", "service.bootstrap"]
    api = spawn(command, variables, _api_log(state.home))
    return state.model_copy(update={"api": api, "api_url": f"http://{settings.host}:{port}"})


def _wait_api(state: EmbeddedState, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if not state.api_runs:
            raise EmbeddedError(f"the API ended while starting:\n{log_tail(_api_log(state.home))}")
        if time.monotonic() > deadline:
            raise EmbeddedError(f"{state.api_url} does not answer:\n{log_tail(_api_log(state.home))}")
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{state.api_url}/healthz", timeout=5.0, trust_env=False)
            if answer.status_code == httpx.codes.OK:
                return
        time.sleep(0.1)


def _wait_serve(settings: Settings) -> None:
    from service.serving.deploy import wait_ready
    from service.serving.engine import ServingError

    try:
        wait_ready(settings)
    except ServingError as error:
        raise EmbeddedError(str(error)) from error


def _end(state: EmbeddedState) -> list[psutil.Process]:
    with uninterrupted():
        stop_api(state)
        survivors = stop_ray(state.ray)
        if not survivors:
            _state_path(state.home).unlink(missing_ok=True)
    return survivors


# ------------------------------------------------------------------------------------------------------ files


def _state_path(home: Path) -> Path:
    return home / "run" / "embedded.json"


def _api_log(home: Path) -> Path:
    return home / "run" / "api.log"


def _write_state(state: EmbeddedState) -> None:
    path = _state_path(state.home)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(state.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Let one process at a time start or end the service of a home. Raises EmbeddedError for the second."""
    (home / "run").mkdir(parents=True, exist_ok=True)
    with (home / "run" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EmbeddedError(f"another process is starting or ending the service in {home}") from error
        yield
