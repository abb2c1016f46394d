"""What was learnt and what was forgotten, from the accuracy matrix.

a[i][j] is the score on task j after training task i, T tasks, b[j] the untrained model's score; scores are in
0..1. Signs: forgetting > 0 means worse, BWT < 0 means worse. Averages are macro (every task counts the same)
unless num_rows gives each task a weight: then they are micro (every row counts the same).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from clcore.engine.errors import DataError

Row = Sequence[float | None]
Matrix = Sequence[Row]
Weights = Sequence[float] | None


def average_accuracy(matrix: Matrix, num_rows: Weights = None) -> float | None:
    """Mean over tasks j of a[T][j]; None if a score is missing."""
    return _mean(list(matrix[-1][: len(matrix)]), num_rows) if matrix else None


def learning_accuracy(matrix: Matrix, num_rows: Weights = None) -> float | None:
    """Mean over tasks j of a[j][j]: how well each task was learnt when it was trained."""
    return _mean([row[j] for j, row in enumerate(matrix)], num_rows)


def backward_transfer(matrix: Matrix, num_rows: Weights = None) -> float | None:
    """Mean over j < T of a[T][j] - a[j][j]; None with one task. Negative: training later tasks hurt."""
    return _mean([_minus(matrix[-1][j], matrix[j][j]) for j in range(len(matrix) - 1)], num_rows)


def forgetting(matrix: Matrix, num_rows: Weights = None) -> float | None:
    """Mean over j < T of max_{i<T} a[i][j] - a[T][j]; None with one task. Positive: worse than its best."""
    return _mean(task_forgetting(matrix), num_rows)


def task_forgetting(matrix: Matrix) -> list[float | None]:
    """Return max_{i<T} a[i][j] - a[T][j] for each j < T; None where a score is missing."""
    drops = []
    for j in range(len(matrix) - 1):
        best = [row[j] for row in matrix[:-1] if row[j] is not None]
        drops.append(_minus(max(x for x in best if x is not None), matrix[-1][j]) if best else None)
    return drops


def forward_transfer(matrix: Matrix, base: Row, num_rows: Weights = None) -> float | None:
    """Mean over j > 1 of a[j-1][j] - b[j]; None with one task. Positive: earlier tasks helped."""
    gains = [_minus(matrix[j - 1][j], base[j]) for j in range(1, len(matrix))]
    return _mean(gains, None if num_rows is None else num_rows[1:])


def matrix_scalars(matrix: Matrix, base: Row, num_rows: Weights = None) -> dict[str, float | None]:
    """Return every scalar of a T x T matrix; what a longer row says about later tasks is left out.

    Scalars that are undefined (one task) or lack a score are None, never 0. num_rows: evaluation rows per
    task; with them the micro averages come too, under the same names after "micro_".
    Raises DataError for fewer numbers of rows than tasks, or one that is not positive.
    """
    if num_rows is not None:
        num_rows = num_rows[: len(matrix)]
        if len(num_rows) < len(matrix) or not all(0 < n < math.inf for n in num_rows):
            raise DataError(f"num_rows must be positive for {len(matrix)} tasks, got {list(num_rows)}")

    def scalars(weights: Weights) -> dict[str, float | None]:
        return {
            "average_accuracy": average_accuracy(matrix, weights),
            "learning_accuracy": learning_accuracy(matrix, weights),
            "forgetting": forgetting(matrix, weights),
            "bwt": backward_transfer(matrix, weights),
            "fwt": forward_transfer(matrix, base, weights),
        }

    found = scalars(None)
    if num_rows is not None:
        found |= {f"micro_{name}": value for name, value in scalars(num_rows).items()}
    return found


def _mean(values: Row, weights: Weights = None) -> float | None:
    """Average values; weights beyond their number do not count. None without values or with a None."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    used = [1.0] * len(known) if weights is None else list(weights[: len(known)])
    return sum(w * value for w, value in zip(used, known, strict=True)) / sum(used)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
