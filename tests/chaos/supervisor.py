"""Programs of the stand, kept running as Kubernetes keeps containers.

A program that ends is started again after a pause. A container ends with its first process, so whatever of a
program outlives it is killed before the restart.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from service.processes import MARKER, ProcessRef, end_family, family, refer_to

PAUSE_S = 1.0
"""Seconds from a program's end to its next start."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program and how to start it."""

    name: str
    launch: Callable[[], int]
    """Starts it and returns the process id of its first process."""
    marker: str
    """Value of the environment variable MARKER that its processes inherit, where they do."""


def command_program(
    name: str, command: tuple[str, ...], variables: Mapping[str, str], log: Path, *, marker: str
) -> Program:
    """A program that is one command; its output is appended to a log file.

    Its temporary folder TMPDIR is as new at every start, as a container's is.
    """

    def launch() -> int:
        shutil.rmtree(variables["TMPDIR"], ignore_errors=True)
        Path(variables["TMPDIR"]).mkdir(parents=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                env={**variables, MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).pid

    return Program(name=name, launch=launch, marker=marker)


@dataclass
class _Kept:
    """One program that is kept running."""

    program: Program
    root: ProcessRef
    num_starts: int = 1
    is_wanted: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    failure: BaseException | None = None


class Supervisor:
    """Starts programs and keeps them running until they are removed."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def start(self, program: Program) -> None:
        """Start a program and keep it running."""
        kept = _Kept(program, refer_to(program.launch()))
        kept.is_wanted.set()
        kept.thread = threading.Thread(
            target=self._keep, args=(kept,), name=f"keep-{program.name}", daemon=True
        )
        self._kept[program.name] = kept
        kept.thread.start()

    def members(self, name: str) -> list[psutil.Process]:
        """Return the program's processes, the first one first. Raises what its restart raised."""
        kept = self._kept[name]
        if kept.failure is not None:
            raise kept.failure
        found = family([kept.root], kept.program.marker)
        return sorted(found, key=lambda process: process.pid != kept.root.pid)

    def num_starts(self) -> dict[str, int]:
        """Return how often each program was started."""
        return {name: kept.num_starts for name, kept in self._kept.items()}

    def remove(self, name: str, *, missing_ok: bool = False) -> None:
        """End a program for good. Raises RuntimeError when a process of it cannot be ended."""
        if missing_ok and name not in self._kept:
            return
        kept = self._kept.pop(name)
        kept.is_wanted.clear()
        survivors = end_family([kept.root], kept.program.marker, grace_s=2.0)
        if kept.thread is not None:
            kept.thread.join()
        survivors += end_family([kept.root], kept.program.marker, grace_s=0.0)  # a start that was under way
        if survivors:
            raise RuntimeError(f"these processes of {name} could not be ended: {survivors}")

    def close(self) -> None:
        """End all programs, the last one first."""
        for name in reversed(list(self._kept)):
            self.remove(name)

    def _keep(self, kept: _Kept) -> None:
        pause = threading.Event()
        while kept.is_wanted.is_set():
            _wait_end(kept.root)
            for process in family([kept.root], kept.program.marker):
                _kill(process)
            pause.wait(PAUSE_S)
            if not kept.is_wanted.is_set():
                return
            try:
                kept.root = refer_to(kept.program.launch())
            except Exception as error:  # shown by members(), in the thread that runs the case
                kept.failure = error
                return
            kept.num_starts += 1


def _wait_end(root: ProcessRef) -> None:
    process = root.process()
    if process is not None:
        process.wait()


def _kill(process: psutil.Process, *_: Any) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
