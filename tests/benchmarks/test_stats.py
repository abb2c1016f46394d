"""The statistics of the benchmarks."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.stats import median_of_ratios, paired_bootstrap


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    ratio = median_of_ratios([(1.0, 1.1), (10.0, 30.0), (100.0, 110.0)])
    assert ratio.median == pytest.approx(1.1)  # the ratio of medians is 3
    assert (ratio.q25, ratio.q75) == pytest.approx((1.1, 2.05))
    assert ratio.num_pairs == 3


@pytest.mark.parametrize("pairs", [[], [(0.0, 1.0)], [(1.0, 1.0), (-1.0, 1.0)]])
def test_pairs_without_a_ratio_are_refused(pairs: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=r"no pairs|positive"):
        median_of_ratios(pairs)


def test_the_interval_is_that_of_the_differences_row_by_row() -> None:
    rng = np.random.default_rng(1)
    theirs = rng.integers(2, size=200)
    ours = theirs.copy()
    ours[:20] = 1 - ours[:20]
    found = paired_bootstrap([ours.tolist()], [theirs.tolist()])
    difference = (ours - theirs).astype(float)
    half = 1.96 * difference.std() / np.sqrt(200)  # 0.04; two independent samples would give 0.10
    assert found.mean == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.01)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.01)


def test_rows_are_resampled_within_their_task_and_tasks_count_the_same() -> None:
    # 1 on each of 2 rows, 0 on each of 8: 0.5 macro, and no draw can give anything else.
    found = paired_bootstrap([[1, 1], [0] * 8], [[0, 0], [0] * 8])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_tasks_are_resampled_independently_of_each_other() -> None:
    rows = [1, 0] * 50
    one = paired_bootstrap([rows], [[0] * 100])
    two = paired_bootstrap([rows, rows], [[0] * 100] * 2)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(0.5**0.5, abs=0.06)


def test_the_sign_is_ours_minus_theirs() -> None:
    found = paired_bootstrap([[0, 0, 0]], [[1, 1, 1]])
    assert (found.mean, found.low, found.high) == (-1.0, -1.0, -1.0)


def test_draws_depend_on_the_seed_alone() -> None:
    rows = [[1, 0, 0, 1, 1, 0, 1]], [[0, 0, 1, 1, 0, 0, 1]]
    assert paired_bootstrap(*rows) == paired_bootstrap(*rows)
    ends = {paired_bootstrap(*rows, draws=20, seed=seed).low for seed in range(20)}
    assert len(ends) > 1


@pytest.mark.parametrize(("ours", "theirs"), [([[1]], [[1, 0]]), ([[1]], [[1], [1]]), ([], []), ([[]], [[]])])
def test_sides_without_the_same_rows_are_refused(ours: list[list[int]], theirs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(ours, theirs)
