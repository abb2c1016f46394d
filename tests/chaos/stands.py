"""The stand that runs are played on, with its uninterrupted job; a new one after a run that failed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from service.client import ApiError
from tests.chaos.board import Board
from tests.chaos.cases import Case
from tests.chaos.hosts import Hosts
from tests.chaos.jobs import Jobs, play_reference
from tests.chaos.links import hosts_in_namespaces
from tests.chaos.play import Result, play_run
from tests.chaos.serving import play_serving
from tests.chaos.stand import Stand, running_stand

STAND_ERRORS = (TimeoutError, RuntimeError, OSError, ApiError)


class Stands:
    """Plays runs; starts the stand when it is needed. hosts None: in network namespaces of their own."""

    def __init__(self, hosts: Hosts | None, board: Board, *, logs: Path) -> None:
        self._hosts, self._board, self._logs = hosts, board, logs
        self._stack = ExitStack()
        self._current: tuple[Stand, Jobs, str, dict[int, str]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def play(self, run: Sequence[Case], name: str) -> list[Result]:
        """Play one run; what stops even the stand is a problem of every case."""
        try:
            stand, jobs, adapter, expected = self._get()
            if run[0].phase == "serving":
                found = [play_serving(stand, adapter, expected, run[0], self._board.case, name)]
            else:
                found = play_run(stand, jobs, expected, run, self._board.case, name)
        except STAND_ERRORS as error:
            problem = f"the stand: {type(error).__name__}: {error}"
            found = [Result(case, problems=[problem], run=name) for case in run]
        if any(result.problems for result in found):  # what is wrong may be the stand
            self._keep_logs(name)
            self._end()
        return found

    def _get(self) -> tuple[Stand, Jobs, str, dict[int, str]]:
        if self._current is None:
            hosts = self._hosts or self._stack.enter_context(hosts_in_namespaces())
            stand = self._stack.enter_context(running_stand(self._board.say, hosts))
            jobs = Jobs(stand)
            self._board.say("the uninterrupted run")
            self._current = (stand, jobs, "", {})  # its logs are kept when even that run fails
            self._current = (stand, jobs, *play_reference(stand, jobs))
        return self._current

    def _end(self) -> None:
        self._current = None
        self._stack.close()

    def _keep_logs(self, name: str) -> None:
        """Copy the programs' and the drivers' logs beside the results."""
        if self._current is None:
            return
        stand = self._current[0]
        target = self._logs / name
        target.mkdir(parents=True, exist_ok=True)
        for path in [*stand.root.glob("*.log"), *stand.root.glob("ray/session_2*/logs/job-driver-*.log")]:
            shutil.copy(path, target)
