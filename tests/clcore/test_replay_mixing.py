"""Experience replay: which rows come back, and how many tokens they bring, in fit_task and alone."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from clcore.engine.errors import ConfigError, DataError, StrategyError
from clcore.engine.params import Params
from clcore.strategies.replay_base import MixedDataset, ReplayStrategy
from clcore.strategies.replay_experience import ExperienceReplay
from tests.clcore.replay_rows import bound_after, refs, row, tokens
from tests.clcore.tiny import new_session, tiny_dataset, tiny_llama

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
