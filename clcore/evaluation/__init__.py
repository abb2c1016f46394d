"""Scores of tasks, what follows from them, and pictures of both.

Names load on first use: the scalars need neither torch nor plotly.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "ForgettingMetrics": "eval_forgetting",
    "GateCheck": "eval_visualization",
    "Interference": "interference",
    "TaskRecord": "interference",
    "TaskScore": "scores",
    "TransferMetrics": "eval_transfer",
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
    "forgetting": "scalars",
    "forgetting_curves_figure": "eval_visualization",
    "forward_transfer": "scalars",
    "gate_decisions_figure": "eval_visualization",
    "general_ability_figure": "eval_visualization",
    "image_bytes": "eval_visualization",
    "learning_accuracy": "scalars",
    "learning_curves_figure": "eval_visualization",
    "linear_cka": "similarity",
    "mask_capacity_figure": "eval_visualization",
    "mask_overlap_figure": "eval_visualization",
    "matrix_scalars": "scalars",
    "orthogonality_figure": "eval_visualization",
    "parameter_changes_figure": "eval_visualization",
    "parameter_importance_figure": "eval_visualization",
    "predict_interference": "interference",
    "principal_angles": "similarity",
    "record_task": "interference",
    "replay_composition_figure": "eval_visualization",
    "restore": "snapshots",
    "similarity_figure": "eval_visualization",
    "take_snapshot": "snapshots",
    "task_forgetting": "scalars",
    "task_score": "scores",
    "task_trajectory_figure": "eval_visualization",
    "training_curves_figure": "eval_visualization",
    "write_image": "eval_visualization",
    "write_images": "eval_visualization",
}
"""Public name -> the module of this package that defines it."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
