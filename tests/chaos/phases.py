"""The phases of a job, and how a case stops the clock in one of them.

Storage marks most phases: the gate before S3 holds the one request that makes the phase, so that the case
strikes inside it and not just before or after. What is held:

queued         the reconciler is stopped before the job is submitted, so that nobody takes it
submitting     PUT plan.json: the run is claimed, Ray has not been asked yet
scheduling     nothing is held: from the Ray job's submission to the workers' first event there are seconds
training       nothing is held: the first event that says "step" passes and the case strikes at once
checkpointing  the first PUT of a checkpoint of the task
evaluating     the first PUT of answers after the task was trained
committing     PUT manifest.json of the task: all other files of the version are written
publishing     the first look of the reconciler at the manifest that was written
serving        nothing is held: requests for completions follow each other
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field

import psutil

from tests.chaos.gate import Rule, Wanted
from tests.chaos.parts import processes, send
from tests.chaos.stand import Stand
from tests.chaos.watch import Watch

PHASES = (
    "queued",
    "submitting",
    "scheduling",
    "training",
    "checkpointing",
    "evaluating",
    "committing",
    "publishing",
    "serving",
)
REACH_TIMEOUT_S = 240.0


@dataclass
class Moment:
    """A phase of a job that is waited for, then held until it is let go."""

    stand: Stand
    phase: str
    start: int
    """Events before this place are old."""
    rule: Rule | None = None
    stopped: list[psutil.Process] = field(default_factory=list)

    @property
    def is_reached(self) -> bool:
        """Is a request of the job held, or was the one seen that marks the phase?"""
        return self.rule is not None and self.rule.caught.is_set()

    def reach(self, watch: Watch) -> None:
        """Return once the job is in the phase. Raises TimeoutError, RuntimeError."""
        if self.phase == "scheduling":
            submitted = "run.submitted"
            watch.wait(lambda seen: seen.event.type == submitted, submitted, REACH_TIMEOUT_S, self.start)
        elif self.phase == "queued":
            self.stand.wait_for(
                lambda: self.stand.client.job(watch.job_id)["state"] == "queued", "the job in the queue"
            )
        elif self.rule is not None:
            deadline = time.monotonic() + REACH_TIMEOUT_S
            while not self.rule.caught.wait(1.0):
                if watch.has_ended:
                    raise RuntimeError(f"the job ended before the phase {self.phase}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {REACH_TIMEOUT_S:.0f} s for the phase {self.phase}")

    def let_go(self) -> None:
        """End the hold."""
        send(self.stopped, signal.SIGCONT)
        if self.rule is not None:
            self.stand.gate.release(self.rule)
            self.rule = None


def arm(stand: Stand, phase: str, task: int, start: int) -> Moment:
    """Begin to wait for a phase of the task; holds from now on."""
    moment = Moment(stand, phase, start)
    if phase == "queued":
        moment.stopped = processes(stand, "reconciler")
        send(moment.stopped, signal.SIGSTOP)
    elif phase in _RULES:
        wanted, after, holds = _RULES[phase]
        moment.rule = stand.gate.add(_of(wanted, task), after=after and _of(after, task), holds=holds)
    return moment


_MANIFEST = r" \S+/tasks/{task}/manifest\.json"
_EVENTS = r"^PUT \S+/events/"
_STEP = r'"type": "step", "data": \{"task": "t{task}"'
_TRAINED = r'"type": "task\.trained", "data": \{"task": "t{task}"'
_RULES: dict[str, tuple[Wanted, Wanted | None, bool]] = {
    # phase: the request, the one before it, whether it is held
    "submitting": (Wanted(r"^PUT \S+/plan\.json"), None, True),
    "training": (Wanted(_EVENTS, _STEP), None, False),
    "checkpointing": (Wanted(r"^(PUT|POST) \S+/train/a\d+/task0000{task}-step"), None, True),
    "evaluating": (Wanted(r"^PUT \S+/outputs/"), Wanted(_EVENTS, _TRAINED), True),
    "committing": (Wanted("^PUT" + _MANIFEST), None, True),
    "publishing": (Wanted("^(GET|HEAD)" + _MANIFEST), Wanted("^PUT" + _MANIFEST), True),
}


def _of(wanted: Wanted, task: int) -> Wanted:
    return Wanted(*(text.replace("{task}", str(task)) for text in (wanted.request, wanted.body)))
