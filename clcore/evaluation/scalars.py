"""What was learnt and what was forgotten, from the accuracy matrix.

a[i][j] is the score on task j after training task i, T tasks, b[j] the untrained model's score; scores are in
0..1 and averages are macro (every task counts the same). Signs: forgetting > 0 means worse, BWT < 0 means
worse.
"""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[float | None]
Matrix = Sequence[Row]


def average_accuracy(matrix: Matrix) -> float | None:
    """Mean over tasks j of a[T][j]; None if a score is missing."""
    return _mean(list(matrix[-1][: len(matrix)])) if matrix else None


def learning_accuracy(matrix: Matrix) -> float | None:
    """Mean over tasks j of a[j][j]: how well each task was learnt when it was trained."""
    return _mean([row[j] for j, row in enumerate(matrix)])


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over j < T of a[T][j] - a[j][j]; None with one task. Negative: training later tasks hurt."""
    return _mean([_minus(matrix[-1][j], matrix[j][j]) for j in range(len(matrix) - 1)])


def forgetting(matrix: Matrix) -> float | None:
    """Mean over j < T of max_{i<T} a[i][j] - a[T][j]; None with one task. Positive: worse than its best."""
    drops = []
    for j in range(len(matrix) - 1):
        best = [row[j] for row in matrix[:-1] if row[j] is not None]
        drops.append(_minus(max(x for x in best if x is not None), matrix[-1][j]) if best else None)
    return _mean(drops)


def forward_transfer(matrix: Matrix, base: Row) -> float | None:
    """Mean over j > 1 of a[j-1][j] - b[j]; None with one task. Positive: earlier tasks helped."""
    return _mean([_minus(matrix[j - 1][j], base[j]) for j in range(1, len(matrix))])


def matrix_scalars(matrix: Matrix, base: Row) -> dict[str, float | None]:
    """Return every scalar of a T x T matrix; what a longer row says about later tasks is left out.

    Scalars that are undefined (one task) or lack a score are None, never 0.
    """
    return {
        "average_accuracy": average_accuracy(matrix),
        "learning_accuracy": learning_accuracy(matrix),
        "forgetting": forgetting(matrix),
        "bwt": backward_transfer(matrix),
        "fwt": forward_transfer(matrix, base),
    }


def _mean(values: Row) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
