"""Confidence intervals by the percentile bootstrap over rows. S resamples, N rows, T tasks.

The intervals cover the choice of rows that were scored: not the training rows, seed or order of tasks.
Source: Efron 1979.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.scalars import matrix_scalars

Statistic = Callable[[np.ndarray], np.ndarray]
"""Samples (S, N) or (S, N, K) -> one number per sample, (S,)."""

Interval = tuple[float, float]

_AT_ONCE = 1_000_000
"""Rows that are drawn at once, over all samples."""


def mean(samples: np.ndarray) -> np.ndarray:
    """Return the mean of each sample, (S, N) -> (S,)."""
    means: np.ndarray = samples.mean(axis=1)
    return means


def inverse_perplexity(samples: np.ndarray) -> np.ndarray:
    """Return 1/perplexity of samples (S, N, 2) of (nll, tokens), (S,)."""
    totals = samples.sum(axis=1)
    inverse: np.ndarray = np.exp(-totals[:, 0] / totals[:, 1])
    return inverse


def interval(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic = mean,
    *,
    level: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """Return the interval that holds the statistic of resampled rows with probability level.

    values: (N,), or (N, K) where a row puts several numbers into the statistic. Its ends are the
    (1 - level) / 2 and (1 + level) / 2 quantiles over num_samples resamples of N rows with replacement; the
    same seed gives the same interval. None with fewer than two rows.
    Raises ConfigError for a level outside (0, 1) or num_samples < 1.
    """
    _check(level, num_samples)
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return None
    rng = np.random.default_rng(seed)
    return _percentiles(_replicates(array, statistic, rng, num_samples), level)


def matrix_intervals(
    row_scores: Mapping[tuple[int, int], Any],
    base_scores: Mapping[int, Any] | None = None,
    *,
    statistic: Statistic = mean,
    level: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Return the interval of every scalar of matrix_scalars, by its name.

    row_scores[i, j]: scores of the rows of task j after training task i, in the same order of rows for every
    i; (N,) or (N, K) for the statistic. base_scores[j]: the same of the untrained model, for fwt. Each
    resample draws the rows of a task once for the whole column: the same rows were scored after every task.
    None for a scalar that is undefined or lacks a score, and for all if a task has fewer than two rows.
    Raises DataError for no scores or a task that was scored on different numbers of rows.
    """
    _check(level, num_samples)
    if not row_scores:
        raise DataError("no row scores")
    num_trained = 1 + max(i for i, _ in row_scores)
    columns: dict[int, dict[int | str, np.ndarray]] = {}
    for (i, j), scores in row_scores.items():
        columns.setdefault(j, {})[i] = np.asarray(scores, dtype=float)
    for j, scores in (base_scores or {}).items():
        columns.setdefault(j, {})["base"] = np.asarray(scores, dtype=float)
    counts = {j: {len(scores) for scores in column.values()} for j, column in columns.items()}
    for j, of_task in counts.items():
        if len(of_task) != 1:
            raise DataError(f"task {j} was scored on different numbers of rows: {sorted(of_task)}")
    if any(min(of_task) < 2 for of_task in counts.values()):
        return dict.fromkeys(matrix_scalars([], []))
    samples = {
        j: {  # equal seeds draw equal rows for every entry of a column
            i: _replicates(scores, statistic, np.random.default_rng([seed, j]), num_samples)
            for i, scores in column.items()
        }
        for j, column in columns.items()
    }
    num_tasks = 1 + max(columns)
    found: dict[str, list[float | None]] = {}
    for s in range(num_samples):
        matrix = [[_at(samples, i, j, s) for j in range(num_tasks)] for i in range(num_trained)]
        base = [_at(samples, "base", j, s) for j in range(num_tasks)]
        for name, value in matrix_scalars(matrix, base).items():
            found.setdefault(name, []).append(value)
    return {
        name: None if None in values else _percentiles(np.array(values, dtype=float), level)
        for name, values in found.items()
    }


def _at(samples: Mapping[int, Mapping[int | str, np.ndarray]], i: int | str, j: int, s: int) -> float | None:
    column = samples.get(j, {})
    return float(column[i][s]) if i in column else None


def _replicates(
    array: np.ndarray, statistic: Statistic, rng: np.random.Generator, num_samples: int
) -> np.ndarray:
    """Return the statistic of num_samples resamples, (S,)."""
    at_once = max(1, _AT_ONCE // len(array))
    parts = []
    for start in range(0, num_samples, at_once):
        count = min(at_once, num_samples - start)
        parts.append(statistic(array[rng.integers(len(array), size=(count, len(array)))]))
    return np.concatenate(parts)


def _percentiles(replicates: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check(level: float, num_samples: int) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must be in (0, 1), got {level}")
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
