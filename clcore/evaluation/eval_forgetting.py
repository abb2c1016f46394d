"""What was learnt and what was forgotten."""

from __future__ import annotations

from clcore.evaluation.scalars import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    matrix_scalars,
)

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "matrix_scalars",
]
