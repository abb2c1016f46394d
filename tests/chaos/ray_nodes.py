"""Ray's head and worker nodes as programs with fixed ports, so that a restarted one is found where it was."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.processes import free_ports
from service.ray_head import OBJECT_STORE_BYTES, PORT_OPTIONS
from tests.chaos.hosts import Host, Hosts
from tests.chaos.supervisor import Program, command_program

NODE_OPTIONS = (
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--node-manager-port",
    "--object-manager-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
NODE_SILENCE = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
    # how long a raylet waits for a head that is away before it ends itself
    "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
}
"""A node that does not answer four checks in a row is dead, 16 seconds at most; the default is a minute."""
WORKER_NICENESS = "0"
"""Ray starts its workers at 15, where whatever else the machine does comes first."""
_START = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
_COMMON = ("--log-color", "false", "--num-cpus", "1", "--object-store-memory", str(OBJECT_STORE_BYTES))
# Both nodes would hand out the same ports to their workers; 0 lets the system choose.
_WORKER_PORTS = ("--min-worker-port", "0", "--max-worker-port", "0")


@dataclass(frozen=True)
class Cluster:
    """Addresses of the head, fixed for the life of the stand."""

    hosts: Hosts
    folder: Path
    temp_dir: Path
    """Short, because Ray puts sockets under it."""
    token_path: Path
    ports: dict[str, int]

    @property
    def address(self) -> str:
        """host:port of the GCS."""
        return f"{self.hosts.head.address}:{self.ports['--port']}"

    @property
    def dashboard_url(self) -> str:
        """The Jobs API."""
        return f"http://{self.hosts.head.address}:{self.ports['--dashboard-port']}"

    @property
    def agent_url(self) -> str:
        """The agent that runs jobs on the head."""
        return f"http://{self.hosts.head.address}:{self.ports['--dashboard-agent-listen-port']}"


def plan_cluster(hosts: Hosts, folder: Path, temp_dir: Path) -> Cluster:
    """Choose the head's ports and write the cluster's token."""
    token_path = folder / "ray_token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    return Cluster(hosts, folder, temp_dir, token_path, ports)


def head_program(cluster: Cluster, variables: Mapping[str, str], marker: str) -> Program:
    """The head: GCS, dashboard, Jobs API and a node of one CPU."""
    dashboard, autoscaler = free_ports(2)
    metrics = {"DASHBOARD_METRIC_PORT": str(dashboard), "AUTOSCALER_METRIC_PORT": str(autoscaler)}
    address = cluster.hosts.head.address
    options = ("--head", "--dashboard-host", address, "--include-dashboard", "true")
    options += ("--include-log-monitor", "false", "--temp-dir", str(cluster.temp_dir))
    return _program(
        "head", cluster, cluster.hosts.head, options, cluster.ports, {**variables, **metrics}, marker
    )


def node_program(cluster: Cluster, index: int, variables: Mapping[str, str], marker: str) -> Program:
    """A worker node of one CPU, that joins the head whenever there is one."""
    ports = dict(zip(NODE_OPTIONS, free_ports(len(NODE_OPTIONS)), strict=True))
    host = cluster.hosts.nodes[index]
    options = ("--address", cluster.address)
    return _program(f"node{index}", cluster, host, options, ports, variables, marker)


def _program(
    name: str,
    cluster: Cluster,
    host: Host,
    options: tuple[str, ...],
    ports: Mapping[str, int],
    variables: Mapping[str, str],
    marker: str,
) -> Program:
    given = tuple(part for option, port in ports.items() for part in (option, str(port)))
    command = (*host.prefix, *_START, *options, *_COMMON, *_WORKER_PORTS, *given)
    command += ("--node-ip-address", host.address)
    silence = {
        "RAY_worker_niceness": WORKER_NICENESS,
        **NODE_SILENCE,
    }
    if not cluster.hosts.is_loopback:  # all share one host name, which stands for 127.0.0.1
        silence["GLOO_SOCKET_IFNAME"] = "eth0"
    return command_program(
        name, command, {**variables, **silence}, cluster.folder / f"{name}.log", marker=marker
    )
