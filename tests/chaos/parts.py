"""The parts that a case kills, stops or cuts off, and their processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable

import psutil

from tests.chaos.stand import Stand

PARTS = ("api", "reconciler", "driver", "worker", "memory", "raylet", "head", "replica", "postgres", "s3")
_TITLES = {
    "worker": "ray::RayTrainWorker",
    "memory": "ray::MemoryActor",
    "replica": "ray::ServeReplica:clpeft",
}


def processes(stand: Stand, part: str) -> list[psutil.Process]:
    """Return what is killed when the part is: all processes of a program or host, or the one that is meant.

    The head is its whole host: GCS, dashboard, raylet, and the driver and workers that run there. A raylet is
    that of a worker node, without its workers. Both training workers are returned; a case takes one.
    """
    if part in ("api", "reconciler", "head", "postgres", "s3"):
        return stand.supervisor.members(part)
    if part == "raylet":
        return [p for p in stand.supervisor.members("node0") if _name(p) == "raylet"]
    found = [p for name in stand.program_names() for p in stand.supervisor.members(name)]
    if part == "driver":
        return [p for p in found if "service.workers.driver" in _command(p)]
    title = _TITLES[part]
    return sorted((p for p in found if _command(p)[:1] and _command(p)[0].startswith(title)), key=_pid)


def send(victims: Iterable[psutil.Process], what: signal.Signals) -> None:
    """Send a signal to processes; one that has ended meanwhile is as wanted."""
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def _pid(process: psutil.Process) -> int:
    return process.pid


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []
