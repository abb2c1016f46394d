"""Which part is struck in which phase, and how cases share runs.

A pair is listed where the part is alive and has a hand in the phase. Cases of one run strike one after another,
each after the one before has recovered; each is judged for itself, and when the run's end is wrong, each of its
cases is played again alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.phases import PHASES

PAIRS = {
    "queued": ("api", "reconciler", "postgres"),
    "submitting": ("api", "reconciler", "postgres", "s3", "head"),
    "scheduling": ("reconciler", "driver", "worker", "raylet", "head"),
    "training": (
        "driver",
        "worker",
        "memory",
        "raylet",
        "head",
        "api",
        "reconciler",
        "replica",
        "postgres",
        "s3",
    ),
    "checkpointing": ("worker", "driver", "memory", "s3", "head"),
    "evaluating": ("head", "driver", "worker", "raylet", "s3"),
    "committing": ("driver", "worker", "memory", "s3", "postgres"),
    "publishing": ("reconciler", "api", "postgres", "s3", "driver"),
    "serving": ("replica", "api", "head", "postgres"),
}
PER_RUN = 5
QUICK = (
    ("api/queued", "driver/scheduling", "worker/training", "reconciler/publishing"),
    ("reconciler/submitting", "memory/training", "worker/checkpointing", "postgres/committing"),
    ("driver/training", "s3/evaluating"),
)
"""Ten kills spread over three runs."""
STOP_S = {
    "api": 15.0,
    "reconciler": 20.0,  # four leases
    "driver": 30.0,
    "worker": 45.0,  # three times what a silent worker is given
    "memory": 30.0,
    "raylet": 40.0,  # twice what a silent node is given
    "head": 30.0,
    "replica": 90.0,  # Serve gives a replica 60 s
    "postgres": 20.0,
    "s3": 30.0,
}
"""How long each part is stopped: longer than whatever waits for it."""
STOP_RUNS = (
    ("api", "memory", "reconciler"),
    ("s3", "driver", "postgres"),
    ("worker", "replica"),
    ("raylet",),
    ("head",),
)


@dataclass(frozen=True)
class Case:
    """One strike: a part, in a phase of a task."""

    part: str
    phase: str
    task: int = 0
    action: str = "kill"
    """kill (SIGKILL), stop (SIGSTOP, then SIGCONT) or cut (its link loses everything)."""

    @property
    def id(self) -> str:
        """Name in results: part/phase, stop-part/phase or cut-part/phase."""
        return f"{self.part}/{self.phase}" if self.action == "kill" else f"{self.action}-{self.part}/{self.phase}"


def all_runs() -> list[tuple[Case, ...]]:
    """Return every case on one machine, as runs; a run of the phase serving has no job."""
    left = {phase: list(parts) for phase, parts in PAIRS.items()}
    serving = left.pop("serving")
    runs: list[tuple[Case, ...]] = []
    while any(left.values()):
        runs.append(_next_run(left, len(runs)))
    runs += [tuple(_stop(part, place) for place, part in enumerate(parts)) for parts in STOP_RUNS]
    return [*runs, *((Case(part, "serving"),) for part in serving)]


def quick_runs() -> list[tuple[Case, ...]]:
    """Return ten kills spread over three runs."""
    return [tuple(_place(name, run) for name in names) for run, names in enumerate(QUICK)]


def _next_run(left: dict[str, list[str]], number: int) -> tuple[Case, ...]:
    """Take at most PER_RUN cases, one per moment, in the order of the job."""
    run: list[Case] = []
    for phase, task in _moments(number):
        if not left[phase] or len(run) == PER_RUN:
            continue
        if sum(case.part in ("driver", "head") for case in run) == 2 and left[phase][0] in ("driver", "head"):
            continue  # attempts are counted between two commits
        run.append(Case(left[phase].pop(0), phase, task))
    return tuple(run)


def _moments(number: int) -> list[tuple[str, int]]:
    """Return the moments of a run in the job's order.

    A run that commits task 0 under fire publishes task 1 so, or the other way round: what is held in publishing
    is what would show the recovery from committing.
    """
    early = [("queued", 0), ("submitting", 0), ("scheduling", 0)][number % 3 :]
    late, other = ("committing", "publishing") if number % 2 else ("publishing", "committing")
    middle = ("training", "checkpointing", "evaluating")
    return [*early, *((phase, 0) for phase in (*middle, late)), *((phase, 1) for phase in (*middle, other))]


def _place(name: str, number: int) -> Case:
    part, phase = name.split("/")
    task = 0 if PHASES.index(phase) < PHASES.index("training") else 1
    if phase == "training" or (phase == "checkpointing" and number == 1):
        task = 0
    return Case(part, phase, task)


def _stop(part: str, place: int) -> Case:
    """Stop a part while the job trains; the later ones of a run while it evaluates or trains its second task."""
    phase, task = (("training", 0), ("evaluating", 0), ("training", 1))[place]
    return Case(part, phase, task, action="stop")
