"""A Ray head of our own on this machine: started beside others without a clash, ended without a trace.

`ray start --head --block` in its own session, every port chosen, 127.0.0.1 only, token authentication with
a token file that only the owner reads. It outlives the process that started it; RayHead holds what is
needed to find and end it. Never `ray stop`: that ends every Ray of the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from pydantic import BaseModel, ConfigDict

from service.processes import MARKER, ProcessRef, end_family, family, free_ports, spawn

OBJECT_STORE_BYTES = 200 * 2**20
STOP_GRACE_S = 2.0
PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
)


class RayStartError(RuntimeError):
    """The Ray head did not come up."""


class RayHead(BaseModel):
    """Where a Ray head runs and how to reach it."""

    model_config = ConfigDict(frozen=True)
    root: ProcessRef
    marker: str
    temp_dir: Path
    log_path: Path
    token_path: Path
    address: str
    """For ray.init and drivers: host:port of the GCS."""
    dashboard_url: str
    agent_url: str
    num_cpus: int

    def is_alive(self) -> bool:
        """Does the head's root process run?"""
        return self.root.process() is not None

    def environment(self) -> dict[str, str]:
        """Return the variables with which a process talks to this head; set them before `import ray`."""
        return {"RAY_ADDRESS": self.address, **_client_variables(self.token_path)}


def launch_ray(folder: Path, *, num_cpus: int | None = None) -> RayHead:
    """Start a Ray head and return at once; follow with wait_ray. Token and log go into folder.

    num_cpus are logical; None takes the machine's, at least 2, so that two workers fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_cpus = num_cpus or max(2, psutil.cpu_count() or 1)
    token_path = _write_token(folder / "ray_token")
    log_path = folder / "ray.log"
    marker = secrets.token_hex(8)
    temp_dir = Path(tempfile.mkdtemp(prefix="clpeft-", dir=_short_temp_root()))
    *chosen, dashboard_metrics, autoscaler_metrics = free_ports(len(PORT_OPTIONS) + 2)
    ports = dict(zip(PORT_OPTIONS, chosen, strict=True))
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += [
        "--node-ip-address",
        "127.0.0.1",
        "--dashboard-host",
        "127.0.0.1",
        "--include-dashboard",
        "true",
    ]
    command += ["--include-log-monitor", "false", "--log-color", "false", "--temp-dir", str(temp_dir)]
    command += ["--num-cpus", str(num_cpus), "--object-store-memory", str(OBJECT_STORE_BYTES)]
    command += [part for option, port in ports.items() for part in (option, str(port))]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "TMPDIR": str(temp_dir),  # so that what Ray's processes leave there goes with it
        "OMP_WAIT_POLICY": "PASSIVE",  # two processes that spin on two cores slow each other tenfold
        "TOKENIZERS_PARALLELISM": "false",
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
        "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
        MARKER: marker,
        **_client_variables(token_path),
    }
    return RayHead(
        root=spawn(command, variables, log_path),
        marker=marker,
        temp_dir=temp_dir,
        log_path=log_path,
        token_path=token_path,
        address=f"127.0.0.1:{ports['--port']}",
        dashboard_url=f"http://127.0.0.1:{ports['--dashboard-port']}",
        agent_url=f"http://127.0.0.1:{ports['--dashboard-agent-listen-port']}",
        num_cpus=num_cpus,
    )


def wait_ray(head: RayHead, *, timeout_s: float = 90.0) -> None:
    """Wait until the Jobs API and the agent that runs jobs both answer. Raises RayStartError with the log."""
    deadline = time.monotonic() + timeout_s
    headers = {"Authorization": f"Bearer {head.token_path.read_text(encoding='utf-8').strip()}"}
    pending = [f"{head.dashboard_url}/api/jobs/", f"{head.agent_url}/api/local_raylet_healthz"]
    with httpx.Client(headers=headers, timeout=5.0, trust_env=False) as client:
        while pending:
            if not head.is_alive():
                raise RayStartError(f"Ray ended while starting:\n{log_tail(head.log_path)}")
            if time.monotonic() > deadline:
                tail = log_tail(head.log_path)
                raise RayStartError(f"{pending[0]} does not answer after {timeout_s:.0f} s:\n{tail}")
            with contextlib.suppress(httpx.TransportError):
                if client.get(pending[0]).status_code == httpx.codes.OK:
                    pending.pop(0)
                    continue
            time.sleep(0.2)


def stop_ray(head: RayHead) -> list[psutil.Process]:
    """End the head, its workers and its jobs, and remove its files; return the processes that survived."""
    # left alone, Ray takes half a minute to end a Serve replica; nothing here needs that
    survivors = end_family([head.root], head.marker, grace_s=STOP_GRACE_S)
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    head.token_path.unlink(missing_ok=True)
    return survivors


@contextlib.contextmanager
def running_ray(folder: Path, *, num_cpus: int | None = None) -> Iterator[RayHead]:
    """Give a Ray head that answers, and end it after the block."""
    head = launch_ray(folder, num_cpus=num_cpus)
    try:
        wait_ray(head)
        yield head
    finally:
        stop_ray(head)


def ray_processes(head: RayHead) -> list[psutil.Process]:
    """Return what runs under this head now."""
    return family([head.root], head.marker)


def log_tail(path: Path, num_lines: int = 15) -> str:
    """Return the last lines of a log file."""
    if not path.is_file():
        return f"(no {path.name})"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def _client_variables(token_path: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # without it Ray turns 127.0.0.1 into the host's outside address and listens there
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _write_token(path: Path) -> Path:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    return path


def _short_temp_root() -> str:
    # Ray puts socket paths of about 70 characters under it, and the system allows 107 in all
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 20 else "/tmp"
