"""Which part is struck in which phase, and how cases share runs.

A pair is listed where the part is alive and has a hand in the phase. Cases of one run strike one after
another, each after the one before has recovered. When the run's end is wrong, each of its cases is played
again alone, so that each has a verdict of its own.
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
    "publishing": ("driver", "reconciler", "api", "postgres", "s3"),
    "serving": ("replica", "api", "head", "postgres"),
}
PER_RUN = 5
NUM_TASKS = 2
ENDING = ("driver", "head")
"""Parts whose end ends an attempt; a run has five attempts until it commits a task."""
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
        return (
            f"{self.part}/{self.phase}"
            if self.action == "kill"
            else f"{self.action}-{self.part}/{self.phase}"
        )


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
    for phase, task in _moments(left, number):
        if not left[phase] or len(run) == PER_RUN:
            continue
        if sum(case.part in ENDING for case in run) == 2 and left[phase][0] in ENDING:
            continue
        run.append(Case(left[phase].pop(0), phase, task))
    return tuple(run)


def _moments(left: dict[str, list[str]], number: int) -> list[tuple[str, int]]:
    """Return the moments of a run in the job's order.

    A task is struck in committing or in publishing: what is held in publishing would show the recovery from
    committing.
    """
    moments = [(phase, 0) for phase in ("queued", "submitting", "scheduling")[number % 3 :]]
    ends = ["committing"] * len(left["committing"]) + ["publishing"] * len(left["publishing"])
    for task in range(NUM_TASKS):
        moments += [(phase, task) for phase in ("training", "checkpointing", "evaluating")]
        if ends:  # the one of which more is left
            moments.append((max(set(ends), key=ends.count), task))
            ends.remove(moments[-1][0])
    return moments


def _place(name: str, number: int) -> Case:
    part, phase = name.split("/")
    task = 0 if PHASES.index(phase) < PHASES.index("training") else 1
    if phase == "training" or (phase == "checkpointing" and number == 1):
        task = 0
    return Case(part, phase, task)


def _stop(part: str, place: int) -> Case:
    """Stop a part while the job trains; later ones of a run while it evaluates or trains its second task."""
    phase, task = (("training", 0), ("evaluating", 0), ("training", 1))[place]
    return Case(part, phase, task, action="stop")
