"""Processes that outlive their starter: named so that a reused pid is never ended, found even as orphans."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

KILL_TIMEOUT_S = 10.0
MARKER = "CLPEFT_EMBEDDED_ID"
"""Environment variable that every process of one embedded service inherits."""


class ProcessRef(BaseModel):
    """A process that cannot be mistaken for another: a pid is reused, a pid with its creation time is not."""

    model_config = ConfigDict(frozen=True)
    pid: int
    create_time: float

    def process(self) -> psutil.Process | None:
        """Return the running process, or None when it has ended (a zombie has)."""
        try:
            found = psutil.Process(self.pid)
            # creation times are counted from the boot, whose time moves a little when the clock is set
            same = abs(found.create_time() - self.create_time) < 2.0
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def spawn(command: Sequence[str], variables: Mapping[str, str], log_path: Path) -> ProcessRef:
    """Start a program in a session of its own that outlives this process; its output goes to a log file.

    The log of the process before it is kept beside that, with .1 at its end.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if log_path.exists():
        log_path.replace(log_path.with_name(f"{log_path.name}.1"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    pid = os.posix_spawn(
        command[0],
        list(command),
        dict(variables),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return refer_to(pid)


def refer_to(pid: int) -> ProcessRef:
    """Name a process that runs now. Raises psutil.NoSuchProcess."""
    return ProcessRef(pid=pid, create_time=psutil.Process(pid).create_time())


def family(roots: Iterable[ProcessRef], marker: str) -> list[psutil.Process]:
    """Find all processes of one embedded service, orphans included.

    Takes the roots, members of their sessions, whoever inherited MARKER=marker, and the descendants of all
    these. One sign is not enough: Ray renames its workers, which can hide their environment, and starts
    drivers in sessions of their own.
    """
    wanted = f"{MARKER}={marker}".encode()
    alive = {root.pid: found for root in roots if (found := root.process())}
    roots_pids = {root.pid for root in roots}
    everyone = list(psutil.process_iter())
    members: dict[int, psutil.Process] = dict(alive)
    parents: dict[int, int] = {}
    for process in everyone:
        with contextlib.suppress(psutil.Error, OSError):
            parents[process.pid] = process.ppid()
            if os.getsid(process.pid) in roots_pids or _inherits(process.pid, wanted):
                members[process.pid] = process
    grew = True
    while grew:
        born = [p for p in everyone if p.pid not in members and parents.get(p.pid) in members]
        members.update((p.pid, p) for p in born)
        grew = bool(born)
    members.pop(os.getpid(), None)
    return [process for process in members.values() if _runs(process)]


def end_family(roots: Iterable[ProcessRef], marker: str, *, grace_s: float = 8.0) -> list[psutil.Process]:
    """End a service: SIGTERM to its roots, SIGKILL to what is left after the grace; return what survived."""
    roots = list(roots)
    members = family(roots, marker)
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process := root.process():
                process.terminate()
    _wait_gone([process for root in roots if (process := root.process())], grace_s)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while True:
        _reap(roots)
        # members known from before count too: once the roots are gone, only its pid tells a renamed orphan
        members = [p for p in {*members, *family(roots, marker)} if _runs(p)]
        if not members or time.monotonic() > deadline:
            return members
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_gone(members, 1.0)


def free_ports(count: int) -> list[int]:
    """Choose TCP ports on 127.0.0.1 that are free now.

    They lie below the range from which the system takes ports for outgoing connections, so that none is lost
    between this call and the bind.
    """
    held: list[socket.socket] = []
    candidates = random.SystemRandom().sample(range(20000, 32000), 2000)
    try:
        for port in candidates:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                sock.close()
                continue
            held.append(sock)
            if len(held) == count:
                return [sock.getsockname()[1] for sock in held]
    finally:
        for sock in held:
            sock.close()
    raise RuntimeError(f"cannot find {count} free ports on 127.0.0.1")


def port_is_free(host: str, port: int) -> bool:
    """Can a server bind this address now?"""
    family_, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family_, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            return False
    return True


def interrupt_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt: one clean-up path for all. Main thread only."""

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGHUP, interrupt)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a clean-up finish: Ctrl-C inside the block does nothing, SIGTERM and SIGHUP count at its end."""
    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
        yield
        return
    arrived: list[int] = []

    def note(kind: int, _frame: Any) -> None:
        arrived.append(kind)

    before = {kind: signal.signal(kind, note) for kind in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if arrived:
            signal.raise_signal(arrived[0])


class MemoryWatch:
    """Sample the summed proportional memory (PSS) of this process and a service; keep the peak in bytes."""

    def __init__(self, *, every_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self._every_s = every_s
        self._service: tuple[list[ProcessRef], str] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def include(self, roots: Iterable[ProcessRef], marker: str) -> None:
        """Count a service's processes from now on."""
        self._service = (list(roots), marker)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            if self._service is not None:
                processes += family(*self._service)
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(process) for process in set(processes)))
            if self._stop.wait(self._every_s):
                return


def _pss_bytes(process: psutil.Process) -> int:
    try:
        info = process.memory_full_info()
        return int(getattr(info, "pss", info.uss))
    except psutil.Error:
        return 0


def _reap(roots: Iterable[ProcessRef]) -> None:
    for root in roots:
        with contextlib.suppress(ChildProcessError):  # it was started by another process
            os.waitpid(root.pid, os.WNOHANG)


def _inherits(pid: int, wanted: bytes) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return wanted in file.read().split(b"\0")


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
