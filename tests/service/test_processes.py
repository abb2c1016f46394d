"""Processes that outlive their starter: found again, ended completely, never mistaken."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.processes import (
    MARKER,
    MemoryWatch,
    ProcessRef,
    end_family,
    family,
    free_ports,
    interrupt_on_signals,
    refer_to,
    spawn,
    uninterrupted,
)

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, __file__], start_new_session=True)
    if sys.argv[1] == "leave":
        sys.exit(0)
time.sleep(100)
"""


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """Is it more than an entry that init has yet to remove?"""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A program that ignores SIGTERM and starts a child in a session of its own."""
    path = tmp_path / "stubborn.py"
    path.write_text(STUBBORN)
    return path


@pytest.mark.parametrize("mode", ["stay", "leave"])
def test_every_descendant_is_ended_even_when_it_ignores_sigterm_or_is_an_orphan(
    script: Path, tmp_path: Path, mode: str
) -> None:
    marker = f"test-{os.getpid()}-{mode}"
    command = [sys.executable, str(script), mode]
    root = spawn(command, {**os.environ, MARKER: marker}, tmp_path / "log")
    expected = 2 if mode == "stay" else 1
    wait_for(
        lambda: len(family([root], marker)) == expected and (root.process() is None) == (mode == "leave")
    )
    members = family([root], marker)
    assert end_family([root], marker, grace_s=1.0) == []
    assert not psutil.pid_exists(root.pid), "a zombie is left"
    assert not any(runs(process) for process in members)


def test_the_log_of_the_process_before_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "api.log"
    for text in ("first", "second", "third"):
        spawned = spawn([sys.executable, "-c", f"print('{text}')"], dict(os.environ), log)
        wait_for(lambda spawned=spawned: spawned.process() is None)  # type: ignore[misc]
    assert (log.read_text(), log.with_name("api.log.1").read_text()) == ("third\n", "second\n")


def test_a_reused_pid_is_not_the_process(tmp_path: Path) -> None:
    me = refer_to(os.getpid())
    assert me.process() is not None
    other = ProcessRef(pid=me.pid, create_time=me.create_time - 100)
    assert other.process() is None
    assert end_family([other], f"nobody-{tmp_path.name}") == []


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    sockets = [socket.create_server(("127.0.0.1", port)) for port in ports]
    assert set(free_ports(20)).isdisjoint(ports)
    for sock in sockets:
        sock.close()


def test_the_memory_watch_sees_this_process_and_the_service(tmp_path: Path) -> None:
    block = b"x" * (100 * 2**20)
    with MemoryWatch(every_s=0.05) as watch:
        wait_for(lambda: watch.peak_bytes > len(block))
        alone = watch.peak_bytes
        marker = f"memory-{os.getpid()}"
        command = [sys.executable, "-c", "import time; block = b'x' * (100 * 2**20); time.sleep(100)"]
        root = spawn(command, {**os.environ, MARKER: marker}, tmp_path / "log")
        watch.include([root], marker)
        wait_for(lambda: watch.peak_bytes > alone + 90 * 2**20)
        assert end_family([root], marker) == []


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Handlers of signals as before the test."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.usefixtures("own_handlers")
def test_a_clean_up_is_finished_before_a_signal_ends_the_program() -> None:
    steps = []

    def clean_up() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")

    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        clean_up()
    assert steps == ["inner", "outer"]
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)  # one who presses Ctrl-C again wants the same
