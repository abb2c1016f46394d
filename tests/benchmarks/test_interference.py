"""The interference benchmark: its statistics by hand, and a run on tiny tasks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.interference import (
    CANDIDATES,
    Plan,
    Task,
    rank_correlation,
    run_pairs,
    summarise,
    targets_of,
    with_baselines,
)
from clcore.engine.loop import TrainConfig
from tests.clcore.tiny import tiny_learner, tiny_stream


def test_baselines_are_means_over_the_other_pairs_of_the_same_task() -> None:
    observed = {
        ("a", "b"): 1.0,
        ("a", "c"): 2.0,
        ("b", "a"): 3.0,
        ("b", "c"): 4.0,
        ("c", "a"): 5.0,
        ("c", "b"): 9.0,
    }
    pairs = with_baselines([{"old": o, "new": n, "observed": x} for (o, n), x in observed.items()])
    assert [pair["old_task_mean"] for pair in pairs] == [2, 1, 4, 3, 9, 5]
    assert [pair["new_task_mean"] for pair in pairs] == [9, 4, 5, 2, 3, 1]


def test_rank_correlation_worked_out_by_hand() -> None:
    # Differences of ranks 1, 1, 0, 0: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([1, 2, 3, 4], [20, 10, 30, 40]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def made_pairs(quality: float) -> list[dict[str, Any]]:
    """Return 12 pairs whose prediction is the observed value (1) or its opposite (-1)."""
    names = [(o, n) for o in "abcd" for n in "abcd" if o != n]
    values = [3.0, 11.0, 7.0, 1.0, 9.0, 5.0, 12.0, 2.0, 8.0, 6.0, 10.0, 4.0]
    pairs = [{"old": o, "new": n, "observed": x} for (o, n), x in zip(names, values, strict=True)]
    return with_baselines([{**p, **dict.fromkeys(CANDIDATES, quality * p["observed"])} for p in pairs])


def test_a_perfect_predictor_meets_every_target_and_one_that_is_worse_than_the_means_none() -> None:
    good = summarise(made_pairs(1.0), draws=200)
    ours = good[0]
    assert (ours["predictor"], ours["spearman"]) == ("predicted", pytest.approx(1.0))
    assert ours["p"] == pytest.approx(1 / 201)
    assert ours["minus_baseline"] == pytest.approx(1 - max(row["spearman"] for row in good[-2:]))
    assert [entry["ok"] for entry in targets_of(good)] == [True] * 3
    bad = summarise(made_pairs(-1.0), draws=200)
    assert bad[0]["spearman"] == pytest.approx(-1.0)
    assert not any(entry["ok"] for entry in targets_of(bad))


def test_a_run_observes_every_ordered_pair_from_the_same_start() -> None:
    tasks = [Task(f"t{i}", rows, rows) for i, (_, rows) in enumerate(tiny_stream(2))]
    plan = Plan(steps=8, trial_steps=2, stored_rows=4, batch_size=8)
    config = TrainConfig(num_steps=8, learning_rate=1e-2)
    pairs = run_pairs(tiny_learner(), tasks, plan, config)
    assert [(pair["old"], pair["new"]) for pair in pairs] == [("t0", "t1"), ("t1", "t0")]
    alone = run_pairs(tiny_learner(), tasks[::-1], plan, config)
    assert alone[0]["loss_before"] == pairs[1]["loss_before"]  # what came first leaves nothing behind
    assert alone[0]["observed"] == pairs[1]["observed"]
    assert alone[0]["predicted"] == pairs[1]["predicted"] != pairs[0]["predicted"]
