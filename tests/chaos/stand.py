"""The stand: a whole service on this machine, every part a process of its own that is restarted when it ends.

S3 behind a gate, PostgreSQL, a Ray head and a worker node with one CPU each, the API and the reconciler.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.client import ApiError, Client
from service.embedded import settings_environment
from service.processes import free_ports, uninterrupted
from service.serving.deploy import wait_ready
from service.settings import Settings
from tests.chaos.gate import Gate
from tests.chaos.hosts import LOOPBACK, Hosts
from tests.chaos.ray_nodes import Cluster, head_program, node_program, plan_cluster
from tests.chaos.supervisor import Program, Supervisor, command_program
from tests.service.postgres import PostgresServer
from tests.service.s3_server import BUCKET, S3Server
from tests.service.tiny import save_tiny_model

STORE = f"{BUCKET}/chaos"
"""Where the product stores everything: bucket and prefix."""
START_TIMEOUT_S = 420.0
"""A busy machine lets Ray start at its second or third try."""


class Stand:
    """Everything that runs, with its addresses. Made by running_stand."""

    def __init__(self, root: Path, hosts: Hosts) -> None:
        self.root, self.hosts = root, hosts
        self.id = secrets.token_hex(4)
        self.supervisor = Supervisor()
        self.s3 = S3Server(root / "s3")
        self.postgres = PostgresServer() if hosts.is_loopback else None
        api_port, gate_port, serve_port = free_ports(3)
        self.gate = Gate((hosts.store, gate_port), ("127.0.0.1", self.s3.ports[0]))
        self.cluster: Cluster = plan_cluster(hosts, root, root / "ray")
        save_tiny_model(root / "models" / "tiny")
        self.settings = Settings(
            home=root,
            host=hosts.control.address,
            port=api_port,
            storage_url=f"s3://{STORE}",
            ray_dashboard_url=self.cluster.dashboard_url,
            ray_token_path=self.cluster.token_path,
            serve_url=f"http://{hosts.serve}:{serve_port}",
            capacity_wait_s=90.0,  # a lost worker node is replaced within that
            worker_silence_s=15.0,
        )
        self.api_url = f"http://{hosts.control.address}:{api_port}"
        self.client = Client(self.api_url, timeout_s=10.0)

    def stored(self, key: str) -> bytes:
        """Read an object, past the gate and past what the product reads with."""
        return bytes(self.s3.client().cat_file(f"{STORE}/{key}"))

    def temp_dir(self, name: str) -> Path:
        """Folder for the temporary files of one program."""
        folder = self.root / "tmp" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def program_names(self) -> list[str]:
        """Return the names of the Ray programs: the head and the worker nodes."""
        return ["head", *(f"node{i}" for i in range(len(self.hosts.nodes)))]

    # ----------------------------------------------------------------------------------------- start and end

    def start(self, say: Callable[[str], None]) -> None:
        """Start every part and wait until all answer. Raises TimeoutError."""
        say("S3 and PostgreSQL")
        self.supervisor.start(self._served("s3", self.s3.start, lambda: _pid(self.s3)))
        self.gate.start()
        if self.postgres is not None:
            self.supervisor.start(
                self._served("postgres", self.postgres.start, lambda: _postgres_pid(self.postgres))
            )
            url = self.postgres.url()
            self.settings = self.settings.model_copy(update={"database_url": url})
        say("Ray")
        self.supervisor.start(head_program(self.cluster, self._variables("head"), self._marker("head")))
        say("the API and the reconciler")
        self.supervisor.start(self.api_program())
        self.supervisor.start(self.reconciler_program("reconciler"))
        self.wait_for(self._ray_answers, "Ray", look_every_s=1.0)
        for index in range(len(self.hosts.nodes)):
            name = f"node{index}"
            self.supervisor.start(
                node_program(self.cluster, index, self._variables(name), self._marker(name))
            )
        self.wait_for(self.is_whole, "the API and the worker nodes", look_every_s=1.0)
        say("Ray Serve")
        wait_ready(self.settings, timeout_s=START_TIMEOUT_S)

    def close(self) -> None:
        """End everything and remove what the programs stored; their logs stay when something failed."""
        self.client.close()
        self.supervisor.close()
        self.gate.close()
        self.s3.kill()  # it has ended: this removes its sockets
        if self.postgres is not None:
            self.postgres.close()

    def api_program(self) -> Program:
        """The API, without a reconciler of its own."""
        command = (*self.hosts.control.prefix, sys.executable, "-m", "service.bootstrap")
        variables = self._variables("api") | settings_environment(self.settings)
        return self._command("api", command, variables | {"CLPEFT_RECONCILE": "false"})

    def reconciler_program(self, name: str) -> Program:
        """A reconciler; a second one of another name stands by."""
        run = "from service.cli import main; main()"  # what the command clpeft runs
        command = (*self.hosts.control.prefix, sys.executable, "-c", run, "reconciler")
        return self._command(name, command, self._variables(name) | settings_environment(self.settings))

    def _command(self, name: str, command: tuple[str, ...], variables: dict[str, str]) -> Program:
        return command_program(name, command, variables, self.root / f"{name}.log", marker=self._marker(name))

    def _served(self, name: str, start: Callable[[], None], pid: Callable[[], int]) -> Program:
        def launch() -> int:
            start()
            return pid()

        return Program(name=name, launch=launch, marker=self._marker(name))

    def _marker(self, name: str) -> str:
        return f"{self.id}-{name}"

    def _variables(self, name: str) -> dict[str, str]:
        """The environment of a program: this process's without other services' settings, and the store's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CLPEFT_", "AWS_"))}
        return kept | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "TMPDIR": str(self.temp_dir(name)),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.cluster.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            **self.s3.environment(),
            "AWS_ENDPOINT_URL": self.gate.url,
        }

    # ---------------------------------------------------------------------------------------------- questions

    def is_ready(self) -> bool:
        """Does the API answer, and do its database, storage and Ray?"""
        try:
            return self.client.health()["status"] == "ready"
        except ApiError:
            return False

    def is_whole(self) -> bool:
        """Is it ready, with all its Ray nodes?"""
        return self.is_ready() and self.num_nodes() == 1 + len(self.hosts.nodes)

    def num_nodes(self) -> int:
        """Count the Ray nodes that live; 0 while the dashboard is away."""
        return len(self.ray_list("nodes", state="ALIVE"))

    def ray_list(self, kind: str, **wanted: str) -> list[dict[str, Any]]:
        """Return what Ray's state API lists: nodes, actors or placement_groups; [] while it is away."""
        answer = self.dashboard(f"/api/v0/{kind}?limit=1000&detail=1")
        rows = (answer or {}).get("data", {}).get("result", {}).get("result", [])
        return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    def dashboard(self, path: str) -> dict[str, Any] | None:
        """Ask the Ray dashboard; None while it is away."""
        headers = {"Authorization": f"Bearer {self.cluster.token_path.read_text()}"}
        try:
            answer = httpx.get(
                f"{self.cluster.dashboard_url}{path}", headers=headers, timeout=10, trust_env=False
            )
            found: dict[str, Any] | None = answer.json() if answer.is_success else None
        except (httpx.TransportError, ValueError):
            return None
        return found

    def _ray_answers(self) -> bool:
        return self.dashboard("/api/version") is not None and self.num_nodes() > 0

    def wait_for(
        self,
        is_true: Callable[[], Any],
        what: str,
        timeout_s: float = START_TIMEOUT_S,
        *,
        look_every_s: float = 0.1,
    ) -> Any:
        """Wait for a condition and return what it gave. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not (found := is_true()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
            time.sleep(look_every_s)
        return found


@contextmanager
def running_stand(say: Callable[[str], None], hosts: Hosts = LOOPBACK) -> Iterator[Stand]:
    """Run a stand until the block ends; an error leaves the folder with the logs, and says where."""
    root = Path(tempfile.mkdtemp(prefix="clchaos-", dir="/tmp"))
    stand = Stand(root, hosts)
    try:
        stand.start(say)
        yield stand
    finally:
        with uninterrupted():
            stand.close()
    shutil.rmtree(root)


def _pid(server: S3Server) -> int:
    assert server.process is not None
    return server.process.pid


def _postgres_pid(server: PostgresServer | None) -> int:
    assert server is not None
    return server.pid
