"""A Ray cluster on paper, and a Jobs API before it that lies, delays, forgets and answers 500.

The cluster's drivers write what real ones write, one object a step, and obey desired.json as real ones do;
a deaf one does not look any more, as if it had been frozen, and goes on as a zombie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from typing import Any

from service.adapters.storage import Storage, desired_key, events_key, plan_key, task_key
from service.jobs.runner import RayJobState, RunnerRefused, RunnerUnreachable
from service.specs import RunPlan
from service.workers.events import EventWriter
from service.workers.progress import Progress, find_progress
from tests.service.control import write_outcome, write_task

MAX_WORKER_FAILURES = 3
Interrupt = Callable[[str], None]
"""Called with the part's name before and after each of its operations."""


class Clock:
    """Stands where service.db.tables has its `datetime`: time that only the test moves.

    Every look at it costs a millisecond, so that no two rows are of the same age.
    """

    def __init__(self) -> None:
        self._now = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self, _zone: tzinfo) -> datetime:
        """Return the time."""
        self.wait(0.001)
        return self._now

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self._now += timedelta(seconds=seconds)


class WatchedStorage(Storage):
    """A storage whose operations can be interrupted before and after."""

    interrupt: Interrupt

    def exists(self, key: str) -> bool:
        """See Storage."""
        return self._watch(super().exists, key)

    def read_bytes(self, key: str) -> bytes:
        """See Storage."""
        return self._watch(super().read_bytes, key)

    def write_bytes(self, key: str, data: bytes) -> None:
        """See Storage."""
        self._watch(super().write_bytes, key, data)

    def names(self, key: str) -> list[str]:
        """See Storage."""
        return self._watch(super().names, key)

    def delete(self, key: str) -> None:
        """See Storage."""
        self._watch(super().delete, key)

    def _watch(self, operation: Callable[..., Any], *values: Any) -> Any:
        self.interrupt("storage")
        try:
            return operation(*values)
        finally:
            self.interrupt("storage")


# ------------------------------------------------------------------------------------------------ the cluster


@dataclass(eq=False)
class Driver:
    """One attempt's processes: the driver and, as far as storage shows, its workers."""

    storage: Storage
    run_id: str
    attempt: int
    is_deaf: bool = False
    """Does not look at desired.json again."""
    is_alive: bool = True
    num_worker_failures: int = 0
    _steps: Iterator[None] | None = None
    _since: Progress | None = None
    """What the driver found when it began."""

    def work(self) -> None:
        """Go one step on: write one object, or end with an outcome. Ends by is_alive = False."""
        if self._steps is None or not self.is_deaf:
            said = self._is_told()
            if said is not None:
                self.end(said)
                return
        if self._steps is None:
            self._steps = self._train()
        if next(self._steps, "done") == "done":
            self.end("succeeded")

    def end(self, state: str, reason: str | None = None) -> None:
        """Write the outcome and exit with 0."""
        write_outcome(self.storage, self.run_id, self.attempt, state, reason)
        self.is_alive = False

    def lose_worker(self) -> None:
        """A worker dies: Ray starts the workers anew, until it has had enough and the driver dies too."""
        self.num_worker_failures += 1
        if self.num_worker_failures > MAX_WORKER_FAILURES:
            self.is_alive = False
        elif self._steps is not None:
            half = f"{events_key(self.run_id, self.attempt)}/{99:012d}.jsonl.0a.tmp"
            self.storage.write_bytes(half, b'{"seq": 99, "ti')
            self._steps = self._train()

    def _is_told(self) -> str | None:
        """What desired.json says to this attempt: how to stop, or None to go on."""
        desired = self.storage.read_json(desired_key(self.run_id))
        if desired["attempt"] > self.attempt:
            return "superseded"
        return None if desired["state"] == "running" else str(desired["state"])

    def _train(self) -> Iterator[None]:
        plan = RunPlan.model_validate(self.storage.read_json(plan_key(self.run_id)))
        progress = find_progress(self.storage, plan, self.attempt, self._since)
        self._since = self._since or progress
        events = EventWriter(self.storage, self.run_id, self.attempt)
        events.emit("run.started")
        yield
        parent = progress.task_dir
        for task in plan.tasks[progress.num_done :]:
            said = {"task": task.name, "task_index": task.index}
            events.emit("task.started", **said)
            yield
            for step in (1, 2):
                events.emit("step", step=step, num_steps=2, loss=0.5, **said)
                yield
            events.emit("task.trained", **said)
            yield
            folder = task_key(self.run_id, self.attempt, task.index)
            self.storage.write_bytes(f"{folder}/adapter/adapter_model.safetensors", b"half of it")
            yield
            parent = write_task(self.storage, self.run_id, self.attempt, task.index, parent_dir=parent)
            yield


@dataclass(eq=False)
class RayJob:
    """A job as the head knows it."""

    driver: Driver
    is_pending: bool = True
    final: RayJobState | None = None
    shown: RayJobState | None = None
    """What the API shows although it is not so any more."""

    @property
    def state(self) -> RayJobState:
        """The truth, as far as Ray knows it."""
        if self.final is not None:
            return self.final
        return RayJobState.PENDING if self.is_pending else RayJobState.RUNNING

    @property
    def can_work(self) -> bool:
        """Is there a process, or could there be one?"""
        return self.driver.is_alive

    def work(self) -> None:
        """Start the driver if it waits for resources, or let it go one step on."""
        if self.is_pending:
            self.is_pending = False
        elif self.driver.is_alive:
            self.driver.work()
            if not self.driver.is_alive:
                self.final = self.final or RayJobState.SUCCEEDED

    def die(self) -> None:
        """The driver's process ends without an outcome."""
        self.driver.is_alive = False
        self.final = self.final or RayJobState.FAILED

    def give_up(self) -> None:
        """Ray takes the driver for dead, which lives."""
        self.is_pending = False
        self.final = self.final or RayJobState.FAILED

    def fail(self, reason: str) -> None:
        """The workers meet an error and say so."""
        self.driver.end("failed", reason)
        self.final = self.final or RayJobState.SUCCEEDED

    def lose_worker(self) -> None:
        """A worker dies."""
        self.driver.lose_worker()
        if not self.driver.is_alive:
            self.die()


class Fault(StrEnum):
    """What goes wrong with the next request that starts or stops a job."""

    ANSWER_LOST = "the request arrives, the answer does not"
    REQUEST_LOST = "nothing arrives"
    LATE = "the sender gives up, the request arrives later"
    ERROR_500 = "the head answers 500"
    REFUSED = "the head refuses the job"


@dataclass
class LyingRunner:
    """A Jobs API and the cluster behind it."""

    storage: Storage
    interrupt: Interrupt
    jobs: dict[str, RayJob] = field(default_factory=dict)
    """What the head knows."""
    forgotten: list[RayJob] = field(default_factory=list)
    """Jobs whose head is gone; their processes may live on."""
    faults: list[Fault] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    started: dict[str, int] = field(default_factory=dict)
    """Run -> its newest attempt that the cluster ever took."""
    is_reachable: bool = True

    def submit(self, submission_id: str, entrypoint: str, env: Mapping[str, str]) -> None:
        """Start a job; see JobRunner."""
        assert submission_id in _submission_of(entrypoint)
        assert "CLPEFT_STORAGE_URL" in env
        self._reach()
        fault = self.faults.pop(0) if self.faults else None
        if fault == Fault.REFUSED and submission_id not in self.jobs:
            raise RunnerRefused("no such runtime environment")
        if fault == Fault.LATE:
            self.late.append(submission_id)
        if fault in (None, Fault.ANSWER_LOST, Fault.REFUSED):
            self._accept(submission_id)
        self.interrupt("runner")
        if fault not in (None, Fault.REFUSED):
            raise RunnerUnreachable(str(fault))

    def state(self, submission_id: str) -> RayJobState | None:
        """Return what the API shows; None only when the head really does not know the id."""
        self._reach()
        job = self.jobs.get(submission_id)
        found = None if job is None else job.shown or job.state
        self.interrupt("runner")
        return found

    def stop(self, submission_id: str) -> None:
        """End a job's processes. A job that waits for resources cannot be stopped."""
        self._reach()
        job = self.jobs.get(submission_id)
        if job is not None and not job.is_pending and job.final is None:
            job.driver.is_alive, job.final = False, RayJobState.STOPPED
        self.interrupt("runner")

    def logs(self, submission_id: str) -> str | None:
        """Return nothing."""
        raise NotImplementedError(submission_id)

    def check(self) -> None:
        """Return when the API answers."""
        self._reach()

    # ---------------------------------------------------------------------------------------- what may happen

    def all_jobs(self) -> list[RayJob]:
        """Return every job with a process that works or may start, also those that Ray forgot."""
        return [job for job in [*self.jobs.values(), *self.forgotten] if job.can_work]

    def deliver_late(self) -> None:
        """Requests that their sender gave up long ago arrive."""
        late, self.late = self.late, []
        for submission_id in late:
            self._accept(submission_id)

    def lose_cluster(self, *, kills: bool) -> None:
        """The head starts anew and knows nothing; drivers that ran may live on, those that waited do not."""
        for job in self.jobs.values():
            if kills or job.is_pending:
                job.driver.is_alive = False
        self.forgotten += [job for job in self.jobs.values() if job.can_work]
        self.jobs, self.late = {}, []

    def become_honest(self) -> None:
        """From now on everything that is asked happens, and everything that is said is true."""
        self.is_reachable = True
        self.faults.clear()
        self.deliver_late()
        for job in self.jobs.values():
            job.shown = None

    def _reach(self) -> None:
        self.interrupt("runner")
        if not self.is_reachable:
            raise RunnerUnreachable("nothing answers")

    def _accept(self, submission_id: str) -> None:
        if submission_id in self.jobs:  # taken already, however often it is sent
            return
        run_id, _, attempt = submission_id.rpartition("-a")
        # A head that starts anew takes the drivers with it that it was told about only a moment ago.
        for job in self.forgotten:
            if (job.driver.run_id, job.driver.attempt) == (run_id, int(attempt)):
                job.driver.is_alive = False
        self.jobs[submission_id] = RayJob(Driver(self.storage, run_id, int(attempt)))
        self.started[run_id] = max(self.started.get(run_id, 0), int(attempt))


def _submission_of(entrypoint: str) -> str:
    words = entrypoint.split()
    return f"{words[words.index('--run') + 1]}-a{words[words.index('--attempt') + 1]}"
