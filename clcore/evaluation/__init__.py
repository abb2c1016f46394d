"""Scores of tasks and what follows from them."""

from clcore.evaluation.eval_forgetting import (
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
