"""Which waiting runs take the free places."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from service.jobs.queue import WaitingRun, choose

START = datetime(2030, 1, 1, tzinfo=UTC)


def run(name: str, owner: str = "ann", *, priority: int = 0, has_started: bool = False) -> WaitingRun:
    """A waiting run; the last character of its name is its place in time."""
    created_at = START + timedelta(minutes=int(name[-1]))
    return WaitingRun(
        run_id=name, owner=owner, priority=priority, has_started=has_started, created_at=created_at
    )


def chosen(
    *waiting: WaitingRun, num_free: int = 1, **known: dict[str, int] | dict[str, datetime]
) -> list[str]:
    """Choose with nobody at work and nobody who ever started anything, unless it is said."""
    return choose(waiting, num_free=num_free, **{"at_work": {}, "last_started": {}, **known})  # type: ignore[arg-type]


def test_the_oldest_run_goes_first() -> None:
    assert chosen(run("r2"), run("r1"), run("r3"), num_free=2) == ["r1", "r2"]


def test_a_higher_priority_goes_before_an_older_run_of_the_same_owner() -> None:
    assert chosen(run("r1"), run("r2", priority=1), run("r3", priority=-1), num_free=3) == ["r2", "r1", "r3"]


def test_a_priority_does_not_push_another_owner_aside() -> None:
    waiting = [
        run("r1", "ann", priority=100),
        run("r2", "ann", priority=100),
        run("r3", "bob", priority=-100),
    ]
    assert chosen(*waiting, num_free=2) == ["r1", "r3"]


def test_a_run_that_lost_its_place_goes_before_its_owners_other_runs() -> None:
    assert chosen(run("r1", priority=5), run("r2", has_started=True)) == ["r2"]


def test_a_place_goes_to_the_owner_with_the_fewest_runs_at_work() -> None:
    waiting = [run("r1", "ann"), run("r2", "bob")]
    assert chosen(*waiting, at_work={"ann": 2, "bob": 1}) == ["r2"]
    assert chosen(*waiting, at_work={"ann": 2, "bob": 3}) == ["r1"]


def test_among_equal_owners_the_one_who_waited_longest_since_a_start_goes_first() -> None:
    waiting = [run("r1", "ann"), run("r2", "bob"), run("r3", "eve")]
    started = {"ann": START + timedelta(hours=2), "bob": START + timedelta(hours=1)}
    assert chosen(*waiting, num_free=3, last_started=started) == ["r3", "r2", "r1"]


def test_owners_take_turns_although_one_of_them_came_first_with_many() -> None:
    waiting = [run(f"a{i}", "ann") for i in range(4)] + [run("b8", "bob"), run("b9", "bob")]
    assert chosen(*waiting, num_free=5) == ["a0", "b8", "a1", "b9", "a2"]


def test_no_place_and_no_run_choose_nothing() -> None:
    assert chosen(run("r1"), num_free=0) == []
    assert chosen(num_free=3) == []


RUNS = st.lists(
    st.builds(
        WaitingRun,
        run_id=st.uuids().map(str),
        owner=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        has_started=st.booleans(),
        created_at=st.integers(0, 9).map(lambda minute: START + timedelta(minutes=minute)),
    ),
    max_size=12,
    unique_by=lambda waiting: waiting.run_id,
)


@given(
    waiting=RUNS,
    num_free=st.integers(0, 14),
    at_work=st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)),
)
def test_places_are_filled_and_differ_by_one_between_owners_who_still_wait(
    waiting: list[WaitingRun], num_free: int, at_work: dict[str, int]
) -> None:
    started = chosen(*waiting, num_free=num_free, at_work=at_work)
    assert len(started) == len(set(started)) == min(num_free, len(waiting))
    owner_of = {each.run_id: each.owner for each in waiting}
    gained = Counter(owner_of[run_id] for run_id in started)
    busy = Counter(at_work) + gained
    still_waiting = {each.owner for each in waiting if each.run_id not in started}
    for owner in still_waiting:  # nobody who got a place now has two more than somebody who waits
        assert all(busy[other] <= busy[owner] + 1 for other in gained)


@given(waiting=RUNS, num_free=st.integers(0, 14), seed=st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_the_rows(
    waiting: list[WaitingRun], num_free: int, seed: object
) -> None:
    shuffled = list(waiting)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(*shuffled, num_free=num_free) == chosen(*waiting, num_free=num_free)
