"""Cases of the phase serving: an adapter is asked again and again while a part dies."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import httpx
import psutil

from service.client import ApiError
from tests.chaos.asker import Asker
from tests.chaos.cases import Case
from tests.chaos.checks import check_leaks, version_digests
from tests.chaos.parts import processes, send
from tests.chaos.play import PART_TIMEOUT_S, Result
from tests.chaos.stand import Stand

RECOVERY_TIMEOUT_S = 240.0


def play_serving(
    stand: Stand,
    adapter: str,
    expected: dict[int, str],
    case: Case,
    say: Callable[[Case, str], None],
    run: str,
) -> Result:
    """Kill a part between answers. No answer may be wrong, and answers must come again."""
    result = Result(case, run=run)
    asker = Asker(stand.api_url, adapter)
    thread = threading.Thread(target=asker.run, name="asker", daemon=True)
    try:
        say(case, "waiting for an answer")
        first = stand.wait_for(lambda: _text(asker.ask()), "the first answer", RECOVERY_TIMEOUT_S)
        thread.start()
        stand.wait_for(lambda: asker.answers, "an answer")
        victims = stand.wait_for(lambda: processes(stand, case.part), f"the {case.part}", PART_TIMEOUT_S)
        struck_at = time.monotonic()
        send(victims, signal.SIGKILL)
        say(case, f"{case.part} is struck")
        stand.wait_for(lambda: not any(map(_runs, victims)), "the end of what was killed")
        answered = stand.wait_for(
            lambda: _first_answer(asker, struck_at), f"an answer after {case.id}", RECOVERY_TIMEOUT_S
        )
        result.recovery_s = answered - struck_at
        say(case, f"recovered after {result.recovery_s:.1f} s")
        stand.wait_for(stand.is_whole, "every part")
        texts = {text for *_, status, text in asker.answers if status == 200}
        if texts != {first}:
            result.problems.append(f"answers differ: {sorted(texts)}")
        codes = {status for *_, status, _ in asker.answers} - {0, 200, 503}
        if codes:
            said = next(text for *_, status, text in asker.answers if status in codes)
            result.problems.append(f"answers with HTTP {sorted(codes)}: {said}")
        if version_digests(stand, adapter) != expected:
            result.problems.append("the stored versions changed")
    except (TimeoutError, RuntimeError, ApiError, httpx.HTTPError, psutil.Error) as error:
        said = asker.answers[-1][2:] if asker.answers else "none"
        result.problems.append(f"{type(error).__name__}: {error}; the last answer: {said}")
    finally:
        asker.stopping.set()
        if thread.ident is not None:
            thread.join()
    result.problems += check_leaks(stand)
    return result


def _text(answer: tuple[int, str]) -> str:
    """Return the text of an answer; empty when there is none."""
    return answer[1] if answer[0] == 200 else ""


def _first_answer(asker: Asker, after: float) -> float | None:
    """Return when the first question that was put after a moment was answered."""
    for asked_at, answered_at, status, _ in list(asker.answers):
        if asked_at > after and status == 200:
            return answered_at
    return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
