"""Play a run: strike each of its cases in its phase, wait for the recovery, and judge."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import psutil

from service.client import ApiError
from tests.chaos.cases import STOP_S, Case
from tests.chaos.checks import check_job, check_leaks
from tests.chaos.jobs import JOB_TIMEOUT_S, Jobs
from tests.chaos.links import cut
from tests.chaos.parts import processes, send
from tests.chaos.phases import Moment, arm
from tests.chaos.recovery import Strike, cut_host, play_cut, recovery
from tests.chaos.stand import Stand
from tests.chaos.watch import Watch

PART_TIMEOUT_S = 60.0
Say = Callable[[Case, str], None]


@dataclass
class Result:
    """How one case went."""

    case: Case
    recovery_s: float | None = None
    """From the strike to the first sign that the job, or the part that answers, goes on."""
    problems: list[str] = field(default_factory=list)
    run: str = ""
    """Name of the run; cases of one run share its job."""

    def row(self) -> dict[str, Any]:
        """Return the case's row of the report."""
        seconds = None if self.recovery_s is None else round(self.recovery_s, 2)
        return {
            "case": self.case.id,
            **asdict(self.case),
            "recovery_s": seconds,
            "ok": not self.problems,
            "problems": self.problems,
            "run": self.run,
        }


def play_run(
    stand: Stand, jobs: Jobs, expected: dict[int, str], cases: Sequence[Case], say: Say, run: str
) -> list[Result]:
    """Play the cases of one run over one job. What goes wrong stands in the results of all its cases."""
    results = [Result(case, run=run) for case in cases]
    moment = arm(stand, cases[0].phase, cases[0].task, 0)
    try:
        adapter, watch = jobs.submit()
        for place, result in enumerate(results):
            case = result.case
            say(case, f"waiting for {case.phase}")
            moment.reach(watch)
            strike = _strike(stand, case, watch)
            held, moment = moment, _arm_next(stand, cases[place + 1 :], watch)
            say(case, f"{case.part} is struck")
            held.let_go()
            if case.action == "cut":
                result.recovery_s = play_cut(stand, case, watch, strike, moment) - strike.at
            else:
                _hold_on(stand, case, strike)
                result.recovery_s = recovery(stand, case, watch, strike, moment) - strike.at
            say(case, f"recovered after {result.recovery_s:.1f} s")
        watch.wait_end(JOB_TIMEOUT_S)
        stand.wait_for(stand.is_whole, "every part")
        problems = check_job(stand, watch, adapter, expected)
        problems += check_leaks(stand)
    except (TimeoutError, RuntimeError, ApiError, httpx.HTTPError, psutil.Error) as error:
        problems = [f"{type(error).__name__}: {error}"]
    finally:
        moment.let_go()
        stand.supervisor.remove("standby", missing_ok=True)
    for result in results:
        result.problems += problems
    return results


def _arm_next(stand: Stand, following: Sequence[Case], watch: Watch) -> Moment:
    """Arm the next case before this one's hold ends, so that the job cannot run past its phase."""
    start = len(watch.seen)
    if not following:
        return Moment(stand, "end", start)
    return arm(stand, following[0].phase, following[0].task, start)


def _strike(stand: Stand, case: Case, watch: Watch) -> Strike:
    victims, host = [], ""
    if case.action == "cut":
        host = cut_host(stand, case.part)
    else:
        victims = stand.wait_for(lambda: processes(stand, case.part), f"the {case.part}", PART_TIMEOUT_S)
    if case.part == "worker":  # one of them, not the same in every phase
        victims = [victims[(len(case.phase) + case.task) % len(victims)]]
    strike = Strike(
        at=time.monotonic(),
        time=datetime.now(UTC),
        num_seen=len(watch.seen),
        num_starts=stand.supervisor.num_starts(),
        victims=tuple(victims),
        host=host,
    )
    if host:
        cut(host)
    send(victims, signal.SIGSTOP if case.action == "stop" else signal.SIGKILL)
    return strike


def _hold_on(stand: Stand, case: Case, strike: Strike) -> None:
    """Leave a stopped part stopped for its time; a stopped reconciler has one that stands by."""
    if case.action != "stop":
        return
    if case.part == "reconciler":
        stand.supervisor.start(stand.reconciler_program("standby"))
    time.sleep(max(0.0, strike.at + STOP_S[case.part] - time.monotonic()))
    send(strike.victims, signal.SIGCONT)
