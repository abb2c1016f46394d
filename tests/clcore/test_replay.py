"""Experience replay: which rows are kept, for how long, and how tasks share the buffer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clcore.engine.memory import InProcessMemory
from clcore.engine.params import Params
from clcore.engine.tasks import Example
from clcore.strategies.replay_experience import ExperienceReplay, keep_rows, reservoir, task_quotas
from tests.clcore.replay_rows import refs, row
from tests.clcore.tiny import new_session, tiny_dataset, tiny_llama

# ---------------------------------------------------------------------------------------------- the reservoir


def test_every_row_of_two_tasks_is_kept_equally_often() -> None:
    num_rows, capacity, num_seeds = 20, 5, 2000
    names = [f"set:{i}" for i in range(num_rows)]
    counts: Counter[str] = Counter()
    for seed in range(num_seeds):
        first = reservoir(dict.fromkeys(names[:12]), capacity, seed)
        counts.update(reservoir(dict.fromkeys([*first, *names[12:]]), capacity, seed))
    # Draws of 5 from 20 without replacement: sum (c - e)^2 / (e (1 - p)) * (n - 1) / n is chi-square with 19
    # degrees of freedom; 43.8 is its 99.9 % quantile.
    share = capacity / num_rows
    expected = num_seeds * share
    statistic = sum((counts[name] - expected) ** 2 for name in names) / (expected * (1 - share))
    assert statistic * (num_rows - 1) / num_rows < 43.8
    assert sum(counts.values()) == num_seeds * capacity


def test_the_sample_depends_neither_on_order_nor_on_how_often_a_row_is_offered() -> None:
    names = [f"set:{i}" for i in range(50)]
    whole = reservoir(dict.fromkeys(names), 7, seed=3)
    assert reservoir(dict.fromkeys(reversed(names)), 7, seed=3) == whole
    kept: list[str] = []
    for start in (0, 30, 10, 40, 0, 20):
        kept = reservoir(dict.fromkeys([*names[start : start + 10], *kept]), 7, seed=3)
    assert kept == whole
    assert reservoir(dict.fromkeys(names), 7, seed=4) != whole


def test_the_buffer_never_exceeds_its_capacity_and_counts_what_it_saw() -> None:
    model = tiny_llama()
    replay = ExperienceReplay(model, buffer_size=6)
    for task in ("t0", "t1", "t0"):  # t0 again: nothing is counted twice
        replay.before_training(task)
        replay.after_training(task, tiny_dataset(task, 10))
    statistics = replay.get_buffer_statistics()
    assert statistics["size"] == statistics["capacity"] == 6
    assert statistics["seen"] == 20
    assert set(statistics["per_task"]) <= {"t0", "t1"}
    assert sum(statistics["per_task"].values()) == 6


def test_a_buffer_larger_than_all_tasks_keeps_everything() -> None:
    replay = ExperienceReplay(tiny_llama(), buffer_size=100)
    replay.after_training("t0", tiny_dataset("t0", 10))
    replay.after_training("t1", tiny_dataset("t1", 4))
    assert replay.get_buffer_statistics()["per_task"] == {"t0": 10, "t1": 4}


# ------------------------------------------------------------------------------------ shares of the buffer


def test_quotas_are_even_the_oldest_get_what_is_left_and_small_tasks_leave_room() -> None:
    assert task_quotas({"a": 9, "b": 9, "c": 9}, 9) == {"a": 3, "b": 3, "c": 3}
    assert task_quotas({"a": 9, "b": 9, "c": 9}, 8) == {"a": 3, "b": 3, "c": 2}
    assert task_quotas({"a": 9, "b": 1, "c": 9}, 8) == {"a": 4, "b": 1, "c": 3}
    assert task_quotas({"a": 2, "b": 1}, 8) == {"a": 2, "b": 1}
    assert task_quotas({"a": 9, "b": 9, "c": 9}, 2) == {"a": 1, "b": 1, "c": 0}
    assert task_quotas({}, 8) == {}


def test_quotas_fill_the_buffer_fairly_and_a_new_task_raises_nobodys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = {f"t{i}": int(n) for i, n in enumerate(rng.integers(0, 30, rng.integers(1, 8)))}
        capacity = int(rng.integers(1, 60))
        quotas = task_quotas(sizes, capacity)
        assert sum(quotas.values()) == min(capacity, sum(sizes.values()))
        assert all(quotas[task] <= size for task, size in sizes.items())
        for less, more in itertools.permutations(sizes, 2):
            if quotas[less] < quotas[more]:  # it has no more rows, or only the odd row's difference
                assert quotas[less] == sizes[less] or quotas[more] - quotas[less] == 1
        wider = task_quotas({**sizes, "new": int(rng.integers(0, 30))}, capacity)
        assert all(wider[task] <= quota for task, quota in quotas.items())


def test_a_small_task_keeps_its_even_share_unless_the_plain_reservoir_is_asked_for() -> None:
    shares = {}
    for task_balanced in (True, False):
        replay = ExperienceReplay(tiny_llama(), buffer_size=20, task_balanced=task_balanced)
        replay.after_training("t0", [row(f"t0:{i}", 4) for i in range(190)])
        replay.after_training("t1", [row(f"t1:{i}", 4) for i in range(10)])
        shares[task_balanced] = replay.get_buffer_statistics()["per_task"]
    assert shares[True] == {"t0": 10, "t1": 10}
    assert shares[False]["t0"] >= 15


def test_within_a_task_every_row_is_kept_equally_often() -> None:
    num_seeds, first, second = 2000, [f"a:{i}" for i in range(20)], [f"b:{i}" for i in range(10)]
    counts: Counter[str] = Counter()
    for seed in range(num_seeds):
        early = keep_rows(dict.fromkeys(first, "a"), ["a"], 10, seed, balanced=True)
        task_of = {**dict.fromkeys(early, "a"), **dict.fromkeys(second, "b")}
        counts.update(keep_rows(task_of, ["a", "b"], 10, seed, balanced=True))
    for names, quantile in ((first, 43.8), (second, 27.9)):  # 99.9 % of chi-square with 19 and 9
        expected, n = num_seeds * 5 / len(names), len(names)
        statistic = sum((counts[name] - expected) ** 2 for name in names) / (expected * (1 - 5 / n))
        assert statistic * (n - 1) / n < quantile
        assert sum(counts[name] for name in names) == num_seeds * 5


def test_a_row_that_was_given_up_never_comes_back_and_the_order_of_tasks_survives_a_snapshot(
    tmp_path: Path,
) -> None:
    rows = {f"t{t}:{i}": row(f"t{t}:{i}", 4) for t in range(12) for i in range(3 + t % 5)}
    capacity = 22  # two rows of each of 11 tasks; the twelfth takes one of the newest, t10
    session = new_session()
    kept: set[str] = set()
    for t in range(12):
        model = tiny_llama()
        replay = ExperienceReplay(model, buffer_size=capacity)
        replay.bind(model, Params.of(model), session)
        replay.after_training(f"t{t}", [e for ref, e in rows.items() if ref.startswith(f"t{t}:")])
        session.commit()
        now = set(session.read("experience_replay")["refs"])
        assert now <= kept | {ref for ref in rows if ref.startswith(f"t{t}:")}
        assert len(now) == min(capacity, sum(3 + i % 5 for i in range(t + 1)))
        kept = now
        session.store.snapshot(session.version, tmp_path)
        store = InProcessMemory(load_row=rows.__getitem__)
        session = new_session(store=store, version=store.restore(tmp_path), op_id=f"run/t{t + 1}")
    counts = Counter(ref.partition(":")[0] for ref in kept)
    assert counts == {f"t{t}": 2 if t < 10 else 1 for t in range(12)}


class RefuseOdd:
    """A quality control that keeps even rows and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def filter_examples(self, examples: Iterable[Example]) -> list[Example]:
        examples = list(examples)
        self.asked += refs(examples)
        return [example for example in examples if int(example["ref"].split(":")[1]) % 2 == 0]


def test_quality_control_judges_new_rows_in_their_order_at_most_twice_the_buffer() -> None:
    quality: Any = RefuseOdd()
    replay = ExperienceReplay(tiny_llama(), buffer_size=10, quality=quality)
    replay.after_training("t0", [row(f"t0:{i}", 4) for i in range(16)])
    assert quality.asked == [f"t0:{i}" for i in range(16)]
    assert replay.get_buffer_statistics()["per_task"] == {"t0": 8}
    assert replay.metrics()["refused_rows"] == 8
    quality.asked.clear()
    replay.after_training("t1", [row(f"t1:{i}", 4) for i in range(100)])
    assert len(quality.asked) == 20
    assert all(ref.startswith("t1:") for ref in quality.asked)  # what is stored is not judged again
    stored = replay.memory.read("experience_replay")["refs"]
    assert all(int(ref.split(":")[1]) % 2 == 0 for ref in stored)
    quality.asked.clear()
    replay.after_training("t0", [row(f"t0:{i}", 4) for i in range(16)])
    assert set(quality.asked) == {f"t0:{i}" for i in range(16)} - set(stored)


def test_the_quality_filter_of_a_job_drops_repeats_and_takes_rows_of_any_length() -> None:
    rng = np.random.default_rng(0)
    rows: list[Example] = []
    for i, length in enumerate([5, 40, 1200, 40]):
        ids = torch.tensor(rng.integers(3, 5000, length))
        rows.append({"input_ids": ids, "labels": ids.clone(), "ref": f"t0:{i}"})
    rows.append({**rows[1], "ref": "t0:4"})
    replay = ExperienceReplay(tiny_llama(), quality_filter=True)
    replay.after_training("t0", rows)
    assert sorted(replay.memory.read("experience_replay")["refs"]) == [f"t0:{i}" for i in range(4)]
    assert ExperienceReplay(tiny_llama()).quality is None
