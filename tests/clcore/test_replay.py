"""Experience replay: which rows are kept, which come back, and how many tokens they bring."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from clcore.engine.errors import ConfigError, DataError, StrategyError
from clcore.engine.memory import InProcessMemory, MemorySession
from clcore.engine.params import Params
from clcore.engine.tasks import Example
from clcore.strategies.replay_base import MixedDataset, ReplayStrategy
from clcore.strategies.replay_experience import ExperienceReplay, keep_rows, reservoir, task_quotas
from tests.clcore.tiny import new_session, tiny_dataset, tiny_llama


def row(ref: str, length: int) -> Example:
    ids = torch.arange(3, 3 + length)
    return {"input_ids": ids, "labels": ids.clone(), "ref": ref}


def tokens(examples: Any) -> int:
    return sum(len(example["input_ids"]) for example in examples)


def refs(examples: Any) -> list[str]:
    return [example["ref"] for example in examples]


def bound_after(
    stored: list[Example], session: MemorySession | None = None, **params: Any
) -> ExperienceReplay:
    """Return a strategy inside the engine whose earlier task had the stored rows."""
    model = tiny_llama()
    session = session or new_session()
    strategy = ExperienceReplay(model, **params)
    strategy.bind(model, Params.of(model), session)
    strategy.after_training("old", stored)
    session.commit()
    strategy = ExperienceReplay(model, **params)
    strategy.bind(model, Params.of(model), session.next_task(op_id="next"))
    strategy.before_training("new")
    return strategy


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


# ------------------------------------------------------------------------------------------ mixing into steps


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("longest", [6, 60], ids=["short_rows", "rows_longer_than_the_share"])
def test_over_200_steps_the_share_of_replayed_tokens_is_the_ratio_within_1_percent(
    ratio: float, longest: int
) -> None:
    lengths = np.random.default_rng(0).integers(3, longest, 50)
    replay = bound_after(
        [row(f"old:{i}", int(n)) for i, n in enumerate(lengths)], replay_ratio=ratio, replay_frequency=1
    )
    new = [row(f"new:{i}", 3 + i % 9) for i in range(40)]
    total = replayed = 0
    for step in range(200):
        batch = new[step % 33 : step % 33 + 7]
        mixed = replay.mix_batch(batch, step=step)
        assert refs(mixed)[:7] == refs(batch)
        assert all(ref.startswith("old:") for ref in refs(mixed)[7:])
        total, replayed = total + tokens(mixed), replayed + tokens(mixed) - tokens(batch)
    assert replayed / total == pytest.approx(ratio, rel=0.01)


def test_only_every_nth_step_is_mixed_and_there_the_ratio_holds() -> None:
    replay = bound_after([row(f"old:{i}", 4) for i in range(20)], replay_ratio=0.5, replay_frequency=3)
    batch = [row("new:0", 8)]
    added = [tokens(replay.mix_batch(batch, step=step)) - 8 for step in range(9)]
    assert added == [8, 0, 0, 8, 0, 0, 8, 0, 0]


def test_a_ratio_of_0_or_an_empty_buffer_leaves_the_batch_alone() -> None:
    batch = [row("new:0", 8)]
    assert (
        bound_after([row("old:0", 4)], replay_ratio=0.0, replay_frequency=1).mix_batch(batch, step=0) is batch
    )
    model = tiny_llama()
    first_task = ExperienceReplay(model, replay_frequency=1)
    first_task.bind(model, Params.of(model), new_session())
    first_task.before_training("t0")
    assert first_task.mix_batch(batch, step=0) is batch


def test_a_draw_brings_each_stored_row_once_before_any_comes_again() -> None:
    replay = bound_after([row(f"old:{i}", 4) for i in range(6)], replay_ratio=0.5, replay_frequency=1)
    drawn = refs(replay.mix_batch([row("new:0", 4 * 12)], step=0)[1:])
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [f"old:{i}" for i in range(6)]


def test_every_order_of_a_draw_is_equally_likely() -> None:
    replay = bound_after([row(f"old:{i}", 4) for i in range(3)])
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        counts[tuple(itertools.islice(replay.draw(np.random.default_rng(seed)), 3))] += 1
    assert len(counts) == 6
    # Chi-square with 5 degrees of freedom; 20.5 is its 99.9 % quantile.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5


def test_mixing_depends_on_seed_task_and_step() -> None:
    stored, batch = [row(f"old:{i}", 4) for i in range(30)], [row("new:0", 40)]

    def drawn(step: int = 0, task: str = "new", seed: int = 0) -> list[str]:
        replay = bound_after(stored, new_session(seed=seed), replay_ratio=0.5, replay_frequency=1)
        replay.before_training(task)
        return refs(replay.mix_batch(batch, step=step))

    assert drawn() == drawn()
    assert len({tuple(drawn()), tuple(drawn(step=1)), tuple(drawn(task="other")), tuple(drawn(seed=1))}) == 4


def test_the_owed_tokens_survive_a_state_round_trip_and_end_with_the_task() -> None:
    stored, batch = [row(f"old:{i}", 7) for i in range(30)], [row("new:0", 5)]
    first = bound_after(stored, replay_ratio=0.3, replay_frequency=1)
    second = bound_after(stored, replay_ratio=0.3, replay_frequency=1)
    for step in range(5):
        first.mix_batch(batch, step=step)
    second.load_state_dict(first.state_dict())
    assert first.state_dict()["owed_tokens"] != 0
    for step in range(5, 15):
        assert refs(first.mix_batch(batch, step=step)) == refs(second.mix_batch(batch, step=step))
    first.after_training("new", [row("new:0", 5)])
    assert first.state_dict()["owed_tokens"] == 0


# ------------------------------------------------------------------------------------------ alone, importance


def test_alone_the_next_task_gets_a_mixed_data_set_and_replayed_rows_are_not_offered_again() -> None:
    replay = ExperienceReplay(tiny_llama(), replay_ratio=0.25, replay_frequency=1)
    first, second = tiny_dataset("t0", 40), tiny_dataset("t1", 40, shift=3)
    assert replay.before_training("t0", first) is first
    replay.after_training("t0", first)
    mixed = replay.before_training("t1", second)
    assert refs(mixed)[:40] == refs(second)
    assert all(ref.startswith("t0:") for ref in refs(mixed)[40:])
    assert tokens(mixed.replay_examples) / tokens(mixed) == pytest.approx(0.25, abs=0.02)
    replay.after_training("t1", mixed)
    assert replay.get_buffer_statistics()["per_task"] == {"t0": 40, "t1": 40}
    assert replay.get_buffer_statistics()["seen"] == 80


def test_alone_a_rarer_replay_has_the_odds_of_its_steps() -> None:
    """0.5 on every 4th step: as many old tokens as new ones there, so a quarter of the new ones in all."""
    replay = ExperienceReplay(tiny_llama(), replay_ratio=0.5, replay_frequency=4)
    replay.before_training("t0", tiny_dataset("t0", 40))
    replay.after_training("t0", tiny_dataset("t0", 40))
    second = tiny_dataset("t1", 40, shift=3)
    mixed = replay.before_training("t1", second)
    assert tokens(mixed.replay_examples) / tokens(second) == pytest.approx(0.25, abs=0.02)


def test_a_mixed_data_set_behaves_as_one_data_set() -> None:
    mixed = MixedDataset([row("a", 2), row("b", 2)], [row("c", 2)])
    assert refs(mixed) == ["a", "b", "c"]
    assert mixed[-1]["ref"] == "c"
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"index {index} of a data set with 3 rows"):
            mixed[index]
    loader = DataLoader(mixed, batch_size=3, shuffle=True, collate_fn=refs)
    assert sorted(next(iter(loader))) == ["a", "b", "c"]


def test_a_replay_batch_is_padded_and_each_call_draws_anew() -> None:
    replay = ExperienceReplay(tiny_llama())
    with pytest.raises(StrategyError, match="nothing is stored yet"):
        replay.get_replay_batch(2)
    replay.after_training("t0", tiny_dataset("t0", 30))
    first = replay.get_replay_batch(5)
    assert first["input_ids"].shape == first["labels"].shape == first["attention_mask"].shape
    assert first["input_ids"].shape[0] == 5
    again = ExperienceReplay(tiny_llama())
    again.after_training("t0", tiny_dataset("t0", 30))
    again.load_state_dict(replay.state_dict())
    second, also_second = replay.get_replay_batch(5), again.get_replay_batch(5)
    assert second["input_ids"].tolist() == also_second["input_ids"].tolist()
    assert second["input_ids"].tolist() != first["input_ids"].tolist()


def test_importance_draws_follow_the_scores() -> None:
    replay = ExperienceReplay(tiny_llama(), sampling_strategy="importance")
    replay.after_training("t0", [row(f"t0:{i}", 4) for i in range(3)])
    replay.update_importance_scores("t0", [0, 1, 2], [1.0, 2.0, 7.0])
    replay.before_training("t1")
    draws, rng = replay.draw(np.random.default_rng(0)), Counter[str]()
    rng.update(replay.stored[next(draws)]["ref"] for _ in range(4000))
    for ref, share in (("t0:0", 0.1), ("t0:1", 0.2), ("t0:2", 0.7)):
        assert rng[ref] / 4000 == pytest.approx(share, abs=0.03)  # 4 standard deviations of the widest


def test_scores_survive_a_state_round_trip() -> None:
    replay, other = (ExperienceReplay(tiny_llama(), sampling_strategy="importance") for _ in range(2))
    replay.update_importance_scores("t0", [3], [2.5])
    other.load_state_dict(replay.state_dict())
    assert other.state_dict() == replay.state_dict()
    assert other.state_dict()["scores"] == {"t0:3": 2.5}


def test_bad_scores_and_parameters_are_refused_with_their_value() -> None:
    model = tiny_llama()
    replay = ExperienceReplay(model)
    with pytest.raises(DataError, match="2 indices and 1 scores"):
        replay.update_importance_scores("t0", [0, 1], [1.0])
    for score in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(DataError, match=f"positive and finite, got {score}"):
            replay.update_importance_scores("t0", [0], [score])
    for params, said in [
        ({"replay_ratio": 1.0}, r"replay_ratio must be in \[0, 1\), got 1.0"),
        ({"replay_ratio": float("nan")}, "replay_ratio .* got nan"),
        ({"replay_frequency": 0}, "replay_frequency must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"sampling_strategy": "best"}, "one of uniform, importance, got 'best'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            ExperienceReplay(model, **params)


def test_ending_a_task_without_its_rows_is_refused_and_the_base_class_stores_nothing() -> None:
    with pytest.raises(DataError, match=r"train_dataset in after_training\('t0'\)"):
        ExperienceReplay(tiny_llama()).after_training("t0")
    with pytest.raises(StrategyError, match="does not say which rows it stores"):
        ReplayStrategy(tiny_llama()).before_training("t0")
