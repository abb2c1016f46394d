"""A real API in a process of its own, for benchmarks that measure it over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil

from service.processes import free_ports

START_TIMEOUT_S = 60.0
WARM_UP_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class ApiProcess:
    """A served API: one client of it, and its process."""

    client: httpx.Client
    process: psutil.Process

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return str(self.client.base_url).rstrip("/")

    def cpu_s(self) -> float:
        """Return the seconds of CPU that the process has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextmanager
def api_process(**variables: str) -> Iterator[ApiProcess]:
    """Serve `python -m service.bootstrap` until the block ends; variables: its settings but the port.

    Raises TimeoutError when it does not answer in time, RuntimeError when it ends before.
    """
    port = free_ports(1)[0]
    given = {**os.environ, **variables, "CLPEFT_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "service.bootstrap"], env=given)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            _wait(process, client)
            # it imports torch beside its first requests, and answers this once it has
            client.get("/v1/strategies", timeout=WARM_UP_TIMEOUT_S).raise_for_status()
            yield ApiProcess(client, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the API ended with {process.returncode}; its log is above")
        try:
            client.get("/healthz").raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(f"the API did not answer within {START_TIMEOUT_S:.0f} s")
