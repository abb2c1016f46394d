"""The reconciler against everything at once: hypothesis looks for a story in which a promise breaks.

Real database, real storage, two real reconcilers; the cluster and time belong to the story. More and other
stories: python -m pytest tests/service/test_reconciler_model.py --hypothesis-profile=long
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError

from service.db import tables
from service.db.session import Sessions, open_database
from service.db.tables import Attempt, Dataset, Job, Run
from service.errors import Conflict
from service.jobs import repository
from service.jobs.leases import LeaseLost
from service.jobs.runner import RunnerUnreachable
from service.jobs.states import FINAL_RUN_STATES, AttemptState, RunState
from service.planner import KnownDataset, plan_tasks
from service.reconciler import Reconciler
from service.settings import Settings
from service.specs import JobSpec, PlannedDataset, TaskSpec
from tests.service.lying_runner import Clock, Fault, LyingRunner, RayJob, WatchedStorage
from tests.service.model_checks import Checks

ROWS = KnownDataset(PlannedDataset(id="ds_1", path="datasets/ds_1", sha256="0", num_rows=8), "completion")
VERBS = {
    "pause": repository.pause_job,
    "resume": repository.resume_job,
    "cancel": repository.cancel_job,
    "retry": repository.retry_job,
}
PICK = st.integers(0, 7)
WHO = st.sampled_from("AB")
FAILURES = ["user_error", "oom", "no_capacity", "worker_lost", "storage_error"]
TROUBLES = [
    "late requests arrive",
    "network cut",
    "network back",
    "cluster lost, drivers die",
    "cluster lost, drivers live",
    "upgrade",
    "time passes",
    "job spoilt",
]
ENDS = {*FINAL_RUN_STATES, RunState.PAUSED}
ItemT = TypeVar("ItemT")


class Killed(BaseException):
    """The reconciler's process ends here, without a word."""


class World(RuleBasedStateMachine):
    """A control plane, its two reconcilers, its cluster, and what may happen to them."""

    def __init__(self, empty_database: Path) -> None:
        super().__init__()
        self.num_operations = 0
        self.planned: tuple[int, Callable[[str], None]] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="clpeft-model-"))
        self.patch = pytest.MonkeyPatch()
        self.clock = Clock()
        self.patch.setattr(tables, "datetime", self.clock)
        shutil.copy(empty_database, self.folder / "clpeft.db")
        self.settings = Settings(home=self.folder, max_attempts=3, stop_grace_s=20.0)
        # All in this story share one thread, but stand for processes, so they do not queue as threads do.
        self.sessions = Sessions(open_database(self.settings.database_url).engine, turn=nullcontext())
        event.listen(self.sessions.engine, "engine_connect", lambda _: self.interrupt("database"))
        self.storage = WatchedStorage(self.settings.storage_url)
        self.storage.interrupt = self.interrupt
        self.runner = LyingRunner(self.storage, self.interrupt)
        self.reconcilers = {who: self.new_reconciler() for who in "AB"}
        self.num_jobs = 0
        self.spoilt: set[str] = set()
        self.log = _ErrorLog()
        logging.getLogger("service").addHandler(self.log)

    @initialize(max_runs=st.integers(1, 3))
    def start(self, max_runs: int) -> None:
        """Choose how many runs may be at work."""
        object.__setattr__(self.settings, "max_concurrent_runs", max_runs)
        self.checks = Checks(self.sessions, self.storage, self.runner, max_runs)
        self.submit(num_tasks=2, owner="ann", priority=0, deadline_s=None, max_attempts=None)

    def new_reconciler(self) -> Reconciler:
        """Start a reconciler's process."""
        return Reconciler(self.settings, sessions=self.sessions, storage=self.storage, runner=self.runner)

    # -------------------------------------------------------------------------------------------------- users

    @rule(
        num_tasks=st.integers(1, 3),
        owner=st.sampled_from(["ann", "bob"]),
        priority=st.integers(-1, 1),
        deadline_s=st.sampled_from([None, None, 30.0, 300.0]),
        max_attempts=st.sampled_from([None, 1, 2]),
    )
    def submit(
        self, num_tasks: int, owner: str, priority: int, deadline_s: float | None, max_attempts: int | None
    ) -> None:
        """Submit a job."""
        self.num_jobs += 1
        tasks = [TaskSpec(name=f"t{i}", dataset="ds_1") for i in range(num_tasks)]
        spec = JobSpec.model_validate(
            {
                "name": f"job{self.num_jobs}",
                "base_model": {"id": "tiny"},
                "tasks": tasks,
                "priority": priority,
                "limits": {"deadline_s": deadline_s, "max_attempts": max_attempts},
            }
        )
        planned = plan_tasks(tasks, training=spec.training, datasets={"ds_1": ROWS})
        with self.sessions.write() as session:
            repository.create_job(session, spec, planned, base_model_path="/m", owner=owner)

    @rule(pick=PICK, num_tasks=st.integers(1, 2))
    def append(self, pick: int, num_tasks: int) -> None:
        """Append tasks to a job."""
        if (job_id := self.pick_job(pick)) is None:
            return
        with self.sessions.write() as session:
            job = repository.lock_job(session, job_id)
            first = job.num_tasks
            tasks = [TaskSpec(name=f"t{first + i}", dataset="ds_1") for i in range(num_tasks)]
            training = JobSpec.model_validate(job.spec).training
            planned = plan_tasks(tasks, training=training, datasets={"ds_1": ROWS}, first_index=first)
            try:
                repository.append_tasks(session, job, tasks, planned)
            except Conflict:
                assert job.state in ("failed", "cancelled", "cancelling")

    @rule(pick=PICK, verb=st.sampled_from(sorted(VERBS)))
    def ask(self, pick: int, verb: str) -> None:
        """A user pauses, resumes, cancels or retries a job."""
        if (job_id := self.pick_job(pick)) is None:
            return
        try:
            with self.sessions.write() as session:
                VERBS[verb](session, repository.lock_job(session, job_id))
        except Conflict:
            pass

    # -------------------------------------------------------------------------------------------- reconcilers

    @rule(who=WHO, wait_s=st.sampled_from([0.0, 1.0, 3.0, 10.0, 70.0]))
    def tick(self, who: str, wait_s: float) -> None:
        """A reconciler looks at everything."""
        self.clock.wait(wait_s)
        if self.reconcilers[who].tick():
            self.checks.check_after_tick()

    @rule(who=WHO, num_rounds=st.integers(1, 6))
    def go_on(self, who: str, num_rounds: int) -> None:
        """For a while nothing special happens."""
        for _ in range(num_rounds):
            self.tick(who, 1.0)
            for job in self.runner.all_jobs():
                job.work()

    @rule(
        who=WHO,
        after=st.integers(0, 40),
        what=st.sampled_from(["kill", "freeze", "part away", "ask", "work", "lose cluster"]),
        pick=PICK,
        verb=st.sampled_from(sorted(VERBS)),
    )
    def interrupted_tick(self, who: str, after: int, what: str, pick: int, verb: str) -> None:
        """In the middle of a reconciler's look something happens, or the reconciler ends."""

        def happen(part: str) -> None:
            if what == "kill":
                raise Killed
            if what == "part away":
                raise _away(part)
            if what == "freeze":
                self.clock.wait(2 * self.settings.lease_s)
                self.reconcilers["B" if who == "A" else "A"].tick()
            elif what == "ask":
                self.ask(pick, verb)
            elif what == "lose cluster":
                self.runner.lose_cluster(kills=bool(pick % 2))
            else:
                self.work(pick, 3)

        self.clock.wait(1)
        self.planned = (self.num_operations + after, happen)
        try:
            self.reconcilers[who].tick()
        except Killed:
            self.reconcilers[who] = self.new_reconciler()
        except LeaseLost:
            assert what == "freeze"
        except OperationalError:
            assert what == "part away"
        finally:
            self.planned = None

    def interrupt(self, part: str) -> None:
        """Called around every operation on storage, Jobs API and database."""
        self.num_operations += 1
        if self.planned is not None and self.num_operations > self.planned[0]:
            happen, self.planned = self.planned[1], None
            happen(part)

    # -------------------------------------------------------------------------------------------- the cluster

    @rule(pick=PICK, num_steps=st.integers(1, 12))
    def work(self, pick: int, num_steps: int) -> None:
        """Workers go on."""
        for _ in range(num_steps):
            if (job := self.pick_ray_job(pick)) is not None:
                job.work()

    @rule(
        pick=PICK,
        what=st.sampled_from(["deaf", "fails", "loses worker", "dies", "given up", "shown as it was"]),
        reason=st.sampled_from(FAILURES),
    )
    def break_attempt(self, pick: int, what: str, reason: str) -> None:
        """Something happens to an attempt."""
        job = self.pick_ray_job(pick)
        if job is None or (job.is_pending and what != "shown as it was"):
            return
        match what:
            case "deaf":
                job.driver.is_deaf = True
            case "fails":
                job.fail(reason)
            case "loses worker":
                job.lose_worker()
            case "dies":
                job.die()
            case "given up":
                job.give_up()
            case "shown as it was":
                job.shown = job.state

    @rule(trouble=st.sampled_from([*Fault, *TROUBLES]), pick=PICK, who=WHO)
    def trouble(self, trouble: str, pick: int, who: str) -> None:
        """The next submission goes wrong, or something else does."""
        match trouble:
            case Fault():
                self.runner.faults.append(trouble)
            case "late requests arrive":
                self.runner.deliver_late()
            case "network cut" | "network back":
                self.runner.is_reachable = trouble == "network back"
            case "cluster lost, drivers die" | "cluster lost, drivers live":
                self.runner.lose_cluster(kills=trouble == "cluster lost, drivers die")
            case "upgrade":  # a reconciler ends as it should and starts anew
                self.reconcilers[who].stop()
                self.reconcilers[who].run()
                self.reconcilers[who] = self.new_reconciler()
            case "time passes":
                self.clock.wait(4000)
            case "job spoilt":
                self.spoil(pick)

    # ----------------------------------------------------------------------------------------------- promises

    @invariant()
    def promises_hold(self) -> None:
        """Check the database."""
        if hasattr(self, "checks"):
            self.checks.check()
        assert self.log.errors == []

    def teardown(self) -> None:
        """Everything becomes honest: whatever was going on comes to its end. Then clean up."""
        try:
            if hasattr(self, "checks"):
                self.all_ends_well()
        finally:
            logging.getLogger("service").removeHandler(self.log)
            self.sessions.close()
            self.patch.undo()
            shutil.rmtree(self.folder)

    def all_ends_well(self) -> None:
        """A bounded number of ticks of an honest world ends every job that is not paused."""
        self.runner.become_honest()
        with self.sessions.read() as session:
            num_runs = len(session.scalars(select(Run)).all())
            before = {(row.run_id, row.number) for row in session.scalars(select(Attempt))}
        for _ in range(6 + 5 * num_runs):
            self.tick("A", 65.0)
            for job in self.runner.all_jobs():
                while job.can_work:
                    job.work()
            self.promises_hold()
            with self.sessions.read() as session:
                going_on = [job for job in session.scalars(select(Job)) if job.state not in ENDS]
            if not going_on:
                break
        assert going_on == [], [f"{job.name} is {job.state}: {job.message}" for job in going_on]
        with self.sessions.read() as session:
            for attempt in session.scalars(select(Attempt)):
                if (attempt.run_id, attempt.number) in before:
                    continue
                job_id = session.get_one(Run, attempt.run_id).job_id
                good = {AttemptState.SUCCEEDED, AttemptState.CANCELLED, AttemptState.PAUSED}
                assert job_id in self.spoilt or attempt.state in good, f"{attempt.state}: {attempt.message}"

    def spoil(self, pick: int) -> None:
        """A job turns out to be one that can never be committed, as an older release let pass."""
        if (job_id := self.pick_job(pick)) is None:
            return
        with self.sessions.write() as session:
            job = repository.lock_job(session, job_id)
            job.spec = {**job.spec, "promotion": {"alias": "v7"}}
        self.spoilt.add(job_id)

    def pick_job(self, pick: int) -> str | None:
        """Choose a job of the database."""
        with self.sessions.read() as session:
            return _pick(session.scalars(select(Job.id).order_by(Job.created_at)).all(), pick)

    def pick_ray_job(self, pick: int) -> RayJob | None:
        """Choose a job of the cluster that can still work."""
        return _pick(self.runner.all_jobs(), pick)


class _ErrorLog(logging.Handler):
    """Keeps what is logged as an error: nothing in these stories is one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.errors.append(f"{record.getMessage()} {record.exc_info}")


def _pick(items: Sequence[ItemT], pick: int) -> ItemT | None:
    return items[pick % len(items)] if items else None


def _away(part: str) -> Exception:
    match part:
        case "storage":
            return OSError("the store does not answer")
        case "runner":
            return RunnerUnreachable("nothing answers")
    return OperationalError("BEGIN", None, Exception("the database does not answer"))


def test_no_story_breaks_a_promise_of_the_reconciler(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    opened = open_database(f"sqlite:///{path}")
    with opened.write() as session:
        session.add(
            Dataset(
                id="ds_1", name="rows", format="completion", num_rows=8, bytes=1, sha256="0", statistics={}
            )
        )
    opened.close()
    run_state_machine_as_test(lambda: World(path), settings=settings())
