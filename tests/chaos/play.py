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

from service.client import FINAL_EVENTS, ApiError
from tests.chaos.cases import STOP_S, Case
from tests.chaos.checks import check_job, check_leaks
from tests.chaos.jobs import JOB_TIMEOUT_S, Jobs
from tests.chaos.parts import processes, send
from tests.chaos.phases import Moment, arm
from tests.chaos.stand import Stand
from tests.chaos.watch import PROGRESS, Watch

RECOVERY_TIMEOUT_S = 180.0
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


@dataclass(frozen=True)
class Strike:
    """What was true when a case struck."""

    at: float
    """Monotonic seconds."""
    time: datetime
    num_seen: int
    num_starts: dict[str, int]
    victims: tuple[psutil.Process, ...]


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
            _hold_on(stand, case, strike)
            result.recovery_s = _recovery(stand, case, watch, strike) - strike.at
            say(case, f"recovered after {result.recovery_s:.1f} s")
        watch.wait_end(JOB_TIMEOUT_S)
        stand.wait_for(stand.is_ready, "every part")
        problems = check_job(stand, watch, adapter, expected)
        problems += check_leaks(stand)
    except (TimeoutError, RuntimeError, ApiError, httpx.HTTPError, psutil.Error) as error:
        problems = [f"{type(error).__name__}: {error}"]
    finally:
        moment.let_go()
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
    victims = stand.wait_for(lambda: processes(stand, case.part), f"the {case.part}", PART_TIMEOUT_S)
    if case.part == "worker":  # one of them, not the same in every phase
        victims = [victims[(len(case.phase) + case.task) % len(victims)]]
    names = ("api", "reconciler", "postgres", "s3", "head", "node0")
    strike = Strike(
        at=time.monotonic(),
        time=datetime.now(UTC),
        num_seen=len(watch.seen),
        num_starts={name: stand.supervisor.num_starts(name) for name in names},
        victims=tuple(victims),
    )
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


# ------------------------------------------------------------------------------------------------------ recovery


def _recovery(stand: Stand, case: Case, watch: Watch, strike: Strike) -> float:
    """Wait for the recovery and return its moment. Raises TimeoutError, RuntimeError."""
    if case.part in ("api", "postgres"):
        return _when(stand, lambda: _answers(stand, watch.job_id), f"an answer after {case.id}")
    if case.part == "replica":
        return _when(stand, lambda: processes(stand, "replica") != list(strike.victims), "a new replica")
    if case.action == "stop":
        return _progress(watch, strike, case)
    if case.part in ("reconciler", "s3"):
        started = _when(
            stand,
            lambda: stand.supervisor.num_starts(case.part) > strike.num_starts[case.part],
            f"the start of {case.part}",
        )
        place = watch.wait(
            lambda seen: seen.at > started, "an event", RECOVERY_TIMEOUT_S, strike.num_seen
        )
        return watch.seen[place].at
    if case.part == "memory":
        return max(_progress(watch, strike, case), _memory_back(stand, watch, strike))
    return _restarted(watch, strike, case)


def _answers(stand: Stand, job_id: str) -> bool:
    url = f"{stand.api_url}/v1/jobs/{job_id}"
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _when(stand: Stand, is_true: Callable[[], bool], what: str) -> float:
    stand.wait_for(is_true, what, RECOVERY_TIMEOUT_S)
    return time.monotonic()


def _progress(watch: Watch, strike: Strike, case: Case) -> float:
    """The first progress that happened after the strike."""
    place = watch.wait(
        lambda seen: seen.event.type in PROGRESS and _time(seen.event.time) > strike.time,
        f"progress after {case.id}",
        RECOVERY_TIMEOUT_S,
        strike.num_seen,
    )
    return watch.seen[place].at


def _restarted(watch: Watch, strike: Strike, case: Case) -> float:
    """The first progress of workers that started after the strike, or the job's end."""
    place = watch.wait(
        lambda seen: seen.event.type in FINAL_EVENTS
        or (seen.event.type == "run.started" and _time(seen.event.time) > strike.time),
        f"new workers after {case.id}",
        RECOVERY_TIMEOUT_S,
        strike.num_seen,
    )
    place = watch.wait(
        lambda seen: seen.event.type in PROGRESS, f"progress after {case.id}", RECOVERY_TIMEOUT_S, place
    )
    return watch.seen[place].at


def _memory_back(stand: Stand, watch: Watch, strike: Strike) -> float:
    """A new memory actor runs, or the job has ended without asking it again."""

    def is_back() -> bool:
        has_ended = bool(watch.seen) and watch.seen[-1].event.type in FINAL_EVENTS
        return has_ended or any(p not in strike.victims for p in processes(stand, "memory"))

    return _when(stand, is_back, "a new memory actor")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
