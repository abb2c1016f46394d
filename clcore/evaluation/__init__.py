"""Scores of tasks, what follows from them, and pictures of both.

Names load on first use: the scalars need neither torch nor plotly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clcore.evaluation.bootstrap import interval, matrix_intervals
    from clcore.evaluation.cache import LocalStore, OutputStore, Stored, output_key
    from clcore.evaluation.general import (
        GENERAL_NAME,
        evaluate_general,
        general_delta,
        general_rows,
        general_sha256,
        relative_drop,
    )
    from clcore.evaluation.metrics import METRICS, metric_family
    from clcore.evaluation.questions import label_set, longest_answer
    from clcore.evaluation.runner import Evaluation, RowScore, evaluate, set_score
    from clcore.evaluation.scalars import (
        average_accuracy,
        backward_transfer,
        forgetting,
        forward_transfer,
        learning_accuracy,
        matrix_scalars,
    )

__all__ = [
    "GENERAL_NAME",
    "METRICS",
    "Evaluation",
    "LocalStore",
    "OutputStore",
    "RowScore",
    "Stored",
    "average_accuracy",
    "backward_transfer",
    "evaluate",
    "evaluate_general",
    "forgetting",
    "forward_transfer",
    "general_delta",
    "general_rows",
    "general_sha256",
    "interval",
    "label_set",
    "learning_accuracy",
    "longest_answer",
    "matrix_intervals",
    "matrix_scalars",
    "metric_family",
    "output_key",
    "relative_drop",
    "set_score",
]

_MODULES = {
    "Evaluation": "runner",
    "GENERAL_NAME": "general",
    "GateCheck": "eval_visualization",
    "LocalStore": "cache",
    "METRICS": "metrics",
    "OutputStore": "cache",
    "RowScore": "runner",
    "Stored": "cache",
    "VisualizationTools": "eval_visualization",
    "accuracy_matrix_figure": "eval_visualization",
    "adapter_embedding_figure": "eval_visualization",
    "adapter_ranks_figure": "eval_visualization",
    "average_accuracy": "scalars",
    "backward_transfer": "scalars",
    "backward_transfer_figure": "eval_visualization",
    "cost_figure": "eval_visualization",
    "create_visualization_dashboard": "eval_visualization",
    "dashboard_html": "eval_visualization",
    "evaluate": "runner",
    "evaluate_general": "general",
    "forgetting": "scalars",
    "forgetting_curves_figure": "eval_visualization",
    "forward_transfer": "scalars",
    "gate_decisions_figure": "eval_visualization",
    "general_ability_figure": "eval_visualization",
    "general_delta": "general",
    "general_rows": "general",
    "general_sha256": "general",
    "image_bytes": "eval_visualization",
    "interval": "bootstrap",
    "label_set": "questions",
    "learning_accuracy": "scalars",
    "learning_curves_figure": "eval_visualization",
    "longest_answer": "questions",
    "mask_capacity_figure": "eval_visualization",
    "mask_overlap_figure": "eval_visualization",
    "matrix_intervals": "bootstrap",
    "matrix_scalars": "scalars",
    "metric_family": "metrics",
    "orthogonality_figure": "eval_visualization",
    "output_key": "cache",
    "parameter_changes_figure": "eval_visualization",
    "parameter_importance_figure": "eval_visualization",
    "relative_drop": "general",
    "replay_composition_figure": "eval_visualization",
    "set_score": "runner",
    "similarity_figure": "eval_visualization",
    "task_trajectory_figure": "eval_visualization",
    "training_curves_figure": "eval_visualization",
    "write_image": "eval_visualization",
    "write_images": "eval_visualization",
}
"""Public name -> the module of this package that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
