"""The tests' own PostgreSQL server: it leaves nothing, whatever happens to the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from service.processes import refer_to
from tests.service.control import wait_until
from tests.service.postgres import PostgresServer, running_postgres

START = """
import time
from tests.service.postgres import PostgresServer
server = PostgresServer()
server.start()
print(server.pid, server.log.parent, flush=True)
time.sleep(600)
"""


def test_a_closed_server_leaves_no_process_and_no_file() -> None:
    with running_postgres() as server:
        processes, folder = [refer_to(pid) for pid in server.pids], server.log.parent
        assert len(processes) > 1
        assert folder.exists()
    assert not any(one.process() for one in processes)
    assert not folder.exists()


def test_a_server_that_never_started_leaves_no_file() -> None:
    server = PostgresServer()
    assert server.log.parent.exists()
    server.close()
    assert not server.log.parent.exists()


def test_a_server_that_somebody_killed_is_started_again_or_closed() -> None:
    with running_postgres() as server:
        for _ in range(2):
            os.kill(server.pid, signal.SIGKILL)
            server.start()
        folder = server.log.parent
        os.kill(server.pid, signal.SIGKILL)
    assert not folder.exists()


def test_a_server_ends_when_the_process_that_started_it_gets_sigkill() -> None:
    starter = subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid, folder = starter.stdout.readline().split()
    assert psutil.pid_exists(int(pid))
    os.kill(starter.pid, signal.SIGKILL)
    starter.communicate()
    wait_until(lambda: not psutil.pid_exists(int(pid)) and not Path(folder).exists(), "the server to end")
