"""When a struck part has recovered: the first sign, seen from outside, that the job or the part goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
import psutil

from service.client import FINAL_EVENTS
from tests.chaos.asker import Asker
from tests.chaos.cases import Case
from tests.chaos.jobs import REFERENCE
from tests.chaos.links import CONTROL_CUT_S, heal
from tests.chaos.parts import processes
from tests.chaos.phases import Moment
from tests.chaos.stand import Stand
from tests.chaos.watch import PROGRESS, Seen, Watch

RECOVERY_TIMEOUT_S = 180.0
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Strike:
    """What was true when a case struck."""

    at: float
    """Monotonic seconds."""
    time: datetime
    num_seen: int
    num_starts: dict[str, int]
    victims: tuple[psutil.Process, ...]
    host: str = ""
    """Whose link is cut."""


def recovery(stand: Stand, case: Case, watch: Watch, strike: Strike, following: Moment) -> float:
    """Wait for the recovery and return its moment. Raises TimeoutError, RuntimeError.

    following: the next case's moment, armed at the strike; a job that has come there has gone on.
    """
    if case.part in ("api", "postgres"):
        return _when(stand, lambda: _answers(stand, watch.job_id), f"an answer after {case.id}")
    if case.part == "replica" and case.action == "stop":  # Serve may replace it, or it goes on
        return _when(stand, lambda: Asker(stand.api_url, REFERENCE).ask()[0] == 200, "an answer of a replica")
    if case.part == "replica":
        return _when(stand, lambda: _is_new(stand, case.part, strike), "a new replica")
    if case.action == "stop":
        return _progress(watch, strike, case, following)
    if case.part in ("reconciler", "s3"):
        started = _when(
            stand,
            lambda: stand.supervisor.num_starts()[case.part] > strike.num_starts[case.part],
            f"the start of {case.part}",
        )
        return _seen_or_held(
            watch,
            lambda seen: seen.at > started or seen.event.type in FINAL_EVENTS,
            following,
            "an event",
            strike.num_seen,
        )
    if case.part == "memory":
        return max(_progress(watch, strike, case, following), _memory_back(stand, watch, strike))
    return _restarted(watch, strike, case, following)


def _answers(stand: Stand, job_id: str) -> bool:
    url = f"{stand.api_url}/v1/jobs/{job_id}"
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _when(stand: Stand, is_true: Callable[[], bool], what: str) -> float:
    stand.wait_for(is_true, what, RECOVERY_TIMEOUT_S)
    return time.monotonic()


def _progress(watch: Watch, strike: Strike, case: Case, following: Moment) -> float:
    """The first progress that happened after the strike, or that the job is held for the next case."""

    def is_wanted(seen: Seen) -> bool:
        return seen.event.type in PROGRESS and _time(seen.event.time) > strike.time

    return _seen_or_held(watch, is_wanted, following, f"progress after {case.id}", strike.num_seen)


def _seen_or_held(
    watch: Watch, is_wanted: Callable[[Seen], bool], following: Moment, what: str, start: int
) -> float:
    deadline = time.monotonic() + RECOVERY_TIMEOUT_S
    while True:
        try:
            return watch.seen[watch.wait(is_wanted, what, LOOK_EVERY_S, start)].at
        except TimeoutError:
            if following.is_reached:
                return time.monotonic()
            if time.monotonic() > deadline:
                raise


def _restarted(watch: Watch, strike: Strike, case: Case, following: Moment) -> float:
    """The first progress of workers that started after the strike, or their hold, or the job's end."""
    place = watch.wait(
        lambda seen: (
            seen.event.type in FINAL_EVENTS
            or (seen.event.type == "run.started" and _time(seen.event.time) > strike.time)
        ),
        f"new workers after {case.id}",
        RECOVERY_TIMEOUT_S,
        strike.num_seen,
    )
    return _seen_or_held(
        watch, lambda seen: seen.event.type in PROGRESS, following, f"progress after {case.id}", place
    )


def _is_new(stand: Stand, part: str, strike: Strike) -> bool:
    return any(process not in strike.victims for process in processes(stand, part))


def _memory_back(stand: Stand, watch: Watch, strike: Strike) -> float:
    """A new memory actor runs, or the job has ended without asking it again."""

    def is_back() -> bool:
        return watch.has_ended or _is_new(stand, "memory", strike)

    return _when(stand, is_back, "a new memory actor")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


# -------------------------------------------------------------------------------------------------- cut links


def cut_host(stand: Stand, part: str) -> str:
    """Return the host whose link is cut: the control plane's, or the first worker node's that trains."""
    if part == "control":
        return part
    workers = set(processes(stand, "worker"))
    return next(name for name in stand.program_names()[1:] if workers & set(stand.supervisor.members(name)))


def play_cut(stand: Stand, case: Case, watch: Watch, strike: Strike, following: Moment) -> float:
    """Wait for the recovery from a cut link, heal it, and see that what was cut off comes back.

    A worker node is replaced while its link is still cut. Without its link to Ray and S3 the control plane
    knows nothing of the run: it answers, waits, and goes on with the same attempt once the link is there.
    """
    try:
        if case.part == "node":
            return _restarted(watch, strike, case, following)
        while time.monotonic() < strike.at + CONTROL_CUT_S:
            if not _answers(stand, watch.job_id):
                raise RuntimeError("the API did not answer while its link to Ray was cut")
            time.sleep(1.0)
    finally:
        heal(strike.host)
    healed_at = time.monotonic()
    place = watch.wait(
        lambda seen: seen.event.type in PROGRESS and seen.at > healed_at,
        "an event after the cut",
        RECOVERY_TIMEOUT_S,
        strike.num_seen,
    )
    if any(seen.event.type == "attempt.started" for seen in watch.seen[strike.num_seen :]):
        raise RuntimeError("another attempt was begun though nothing was known of the first")
    return watch.seen[place].at
