"""Bootstrap intervals against all resamples of a few rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation import Evaluation, RowScore, interval, matrix_intervals, matrix_scalars
from clcore.evaluation.bootstrap import inverse_perplexity

MANY = 40_000


def quantiles(values: list[float], level: float) -> tuple[float, float]:
    """Return the quantiles of a distribution in which all values are equally likely."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


@pytest.mark.parametrize("rows", [[0.0, 0.5, 1.0], [0.1, 0.2, 0.9, 0.4]])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_the_interval_of_a_mean_is_that_of_all_resamples(rows: list[float], level: float) -> None:
    means = [sum(sample) / len(rows) for sample in itertools.product(rows, repeat=len(rows))]
    found = interval(rows, level=level, num_samples=MANY)
    assert found == pytest.approx(quantiles(means, level), abs=0.03)
    assert found[1] - found[0] > 0.1


def test_the_interval_of_a_perplexity_resamples_rows_and_not_their_ratios() -> None:
    rows = [(2.0, 2), (18.0, 6), (1.0, 4)]
    every = [
        math.exp(-sum(nll for nll, _ in sample) / sum(n for _, n in sample))
        for sample in itertools.product(rows, repeat=3)
    ]
    found = interval(np.array(rows), inverse_perplexity, level=0.8, num_samples=MANY)
    assert found == pytest.approx(quantiles(every, 0.8), abs=0.02)
    evaluation = Evaluation("perplexity", tuple(RowScore(i, 0.0, "", "", *row) for i, row in enumerate(rows)))
    assert evaluation.interval(0.8, MANY) == found


def test_intervals_of_a_matrix_resample_a_tasks_rows_together_over_all_its_scores() -> None:
    scores = {
        (0, 0): [1.0, 1.0, 0.0],
        (1, 0): [0.0, 1.0, 0.0],
        (0, 1): [0.0, 0.0, 1.0],
        (1, 1): [1.0, 0.5, 1.0],
    }
    base = {0: [0.0, 0.0, 0.0], 1: [0.0, 0.0, 0.5]}
    every: dict[str, list[float]] = {}
    for first, second in itertools.product(itertools.product(range(3), repeat=3), repeat=2):
        chosen = {0: list(first), 1: list(second)}

        def mean(rows: list[float], j: int, chosen: dict[int, list[int]] = chosen) -> float:
            return sum(rows[r] for r in chosen[j]) / 3

        matrix = [[mean(scores[i, j], j) for j in (0, 1)] for i in (0, 1)]
        for name, value in matrix_scalars(matrix, [mean(base[j], j) for j in (0, 1)]).items():
            assert value is not None
            every.setdefault(name, []).append(value)
    found = matrix_intervals(scores, base, level=0.8, num_samples=20_000)
    assert set(found) == set(every)
    for name, values in every.items():
        assert found[name] == pytest.approx(quantiles(values, 0.8), abs=0.03), name
    # Only row 0 of task 0 was forgotten: forgetting is its share of the resample, 0 to 1. Resampling before
    # and after apart would reach below 0.
    forgetting = matrix_intervals(scores, base, level=0.999, num_samples=MANY)["forgetting"]
    assert forgetting == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    rows = list(np.random.default_rng(0).random(50))
    assert interval(rows, seed=3) == interval(rows, seed=3)
    assert interval(rows, seed=3) != interval(rows, seed=4)
    scores = {(0, 0): rows}
    assert matrix_intervals(scores, seed=3) == matrix_intervals(scores, seed=3)
    assert matrix_intervals(scores, seed=3) != matrix_intervals(scores, seed=4)


def test_drawing_in_parts_draws_the_same_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = [0.0, 1.0, 1.0], []

    def counting(samples: np.ndarray) -> np.ndarray:
        seen.append(samples.shape)
        return samples.mean(axis=1)

    monkeypatch.setattr("clcore.evaluation.bootstrap._AT_ONCE", 30)
    interval(rows, counting, num_samples=25)
    assert seen == [(10, 3), (10, 3), (5, 3)]


def test_with_fewer_than_two_rows_or_a_missing_score_there_is_no_interval() -> None:
    assert interval([]) is None
    assert interval([0.5]) is None
    assert interval([0.5, 0.5]) == (0.5, 0.5)
    assert Evaluation("exact_match", (RowScore(0, 1.0, "", ""),)).interval() is None
    assert set(matrix_intervals({(0, 0): [1.0]}).values()) == {None}
    one_task = matrix_intervals({(0, 0): [1.0, 0.0, 1.0]})
    assert one_task["average_accuracy"] is not None
    assert [one_task[name] for name in ("forgetting", "bwt", "fwt")] == [None] * 3
    hole = matrix_intervals({(0, 0): [1.0, 0.0], (1, 0): [0.0, 0.0], (0, 1): [0.0, 0.0]})
    assert hole["average_accuracy"] is None
    assert hole["forgetting"] is not None


def test_numbers_out_of_range_and_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"level must be in \(0, 1\), got 95"):
        interval([0.0, 1.0], level=95)
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        matrix_intervals({(0, 0): [0.0, 1.0]}, num_samples=0)
    with pytest.raises(DataError, match=r"task 0 was scored on different numbers of rows: \[2, 3\]"):
        matrix_intervals({(0, 0): [0.0, 1.0], (1, 0): [0.0, 1.0, 1.0]})
    with pytest.raises(DataError, match="no row scores"):
        matrix_intervals({})
