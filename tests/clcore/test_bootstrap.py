"""Bootstrap intervals against every possible resample of a few rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.bootstrap import interval, inverse_perplexity, matrix_intervals
from clcore.evaluation.scalars import matrix_scalars


def resamples(num_rows: int) -> list[list[int]]:
    """All equally likely draws with replacement."""
    return [list(draw) for draw in itertools.product(range(num_rows), repeat=num_rows)]


def test_the_interval_of_a_mean_is_that_over_all_resamples() -> None:
    values = np.array([0.0, 0.1, 0.5, 1.0])
    means = [values[draw].mean() for draw in resamples(4)]  # 256 of them
    expected = np.quantile(means, [0.1, 0.9])
    found = interval(values, level=0.8, num_samples=40_000)
    assert found == pytest.approx(tuple(expected), abs=0.026)  # the grid of means is 0.025 wide


def test_perplexity_resamples_nll_and_tokens_of_a_row_together() -> None:
    pairs = np.array([[1.0, 10.0], [8.0, 4.0], [3.0, 3.0]])
    scores = [np.exp(-pairs[draw][:, 0].sum() / pairs[draw][:, 1].sum()) for draw in resamples(3)]
    expected = np.quantile(scores, [0.2, 0.8])
    found = interval(pairs, inverse_perplexity, level=0.6, num_samples=40_000)
    assert found == pytest.approx(tuple(expected), abs=1e-6)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).random(50)
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


def test_equal_rows_leave_no_doubt_and_one_row_gives_no_interval() -> None:
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert interval([0.5]) is None
    assert interval([]) is None


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"level must be in \(0, 1\), got 95"):
        interval([0, 1], level=95)
    with pytest.raises(ConfigError, match="num_samples must be at least 1, got 0"):
        interval([0, 1], num_samples=0)


def test_scalars_of_a_matrix_resample_a_tasks_rows_for_all_of_its_column() -> None:
    first = {0: [1, 1, 0], 1: [1, 0, 0]}  # task 0 after tasks 0 and 1
    second = {0: [0, 0, 1], 1: [1, 1, 1]}
    base = {0: [0, 0, 0], 1: [0, 1, 0]}
    scores = {(i, 0): first[i] for i in (0, 1)} | {(i, 1): second[i] for i in (0, 1)}

    def mean(values: list[int], draw: list[int]) -> float:
        return sum(values[row] for row in draw) / len(draw)

    expected: dict[str, list[float]] = {}
    for a, b in itertools.product(resamples(3), repeat=2):  # 27 draws of each task's rows
        matrix = [[mean(first[i], a), mean(second[i], b)] for i in (0, 1)]
        scalars = matrix_scalars(matrix, [mean(base[0], a), mean(base[1], b)])
        for name, value in scalars.items():
            assert value is not None
            expected.setdefault(name, []).append(value)
    found = matrix_intervals(scores, base, level=0.6, num_samples=20_000)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(tuple(np.quantile(values, [0.2, 0.8])), abs=1e-9), name


def test_forgetting_of_rows_that_did_not_change_is_certain() -> None:
    rows = [1, 0, 1, 0, 1]
    scores = {(0, 0): rows, (1, 0): rows, (0, 1): rows, (1, 1): rows}
    assert matrix_intervals(scores)["forgetting"] == (0.0, 0.0)  # columns drawn apart would say otherwise


def test_what_is_undefined_or_missing_has_no_interval() -> None:
    one = matrix_intervals({(0, 0): [1, 0, 1]}, {0: [0, 0, 0]})
    assert one["forgetting"] is one["bwt"] is one["fwt"] is None
    assert one["average_accuracy"] is not None
    without_base = matrix_intervals({(i, j): [1, 0, 1] for i in (0, 1) for j in (0, 1)})
    assert without_base["fwt"] is None
    assert without_base["bwt"] == (0.0, 0.0)
    assert set(matrix_intervals({(0, 0): [1]}).values()) == {None}


def test_a_task_scored_on_different_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"task 0 was scored on different numbers of rows: \[2, 3\]"):
        matrix_intervals({(0, 0): [1, 0, 1], (1, 0): [1, 0]})
    with pytest.raises(DataError, match="no row scores"):
        matrix_intervals({})
