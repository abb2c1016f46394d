"""Scores of tasks, what follows from them, and pictures of both.

Names load on first use: the scalars need neither torch nor plotly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clcore.evaluation.bootstrap import (
        interval,
        matrix_intervals,
    )
    from clcore.evaluation.cache import (
        LocalStore,
        OutputStore,
        Stored,
        output_key,
    )
    from clcore.evaluation.eval_forgetting import (
        ForgettingMetrics,
    )
    from clcore.evaluation.eval_transfer import (
        TransferMetrics,
    )
    from clcore.evaluation.eval_visualization import (
        GateCheck,
        VisualizationTools,
        accuracy_matrix_figure,
        adapter_embedding_figure,
        adapter_ranks_figure,
        backward_transfer_figure,
        cost_figure,
        create_visualization_dashboard,
        dashboard_html,
        forgetting_curves_figure,
        gate_decisions_figure,
        general_ability_figure,
        image_bytes,
        learning_curves_figure,
        mask_capacity_figure,
        mask_overlap_figure,
        orthogonality_figure,
        parameter_changes_figure,
        parameter_importance_figure,
        replay_composition_figure,
        similarity_figure,
        task_trajectory_figure,
        training_curves_figure,
        write_image,
        write_images,
    )
    from clcore.evaluation.general import (
        GENERAL_NAME,
        evaluate_general,
        general_delta,
        general_rows,
        general_sha256,
        relative_drop,
    )
    from clcore.evaluation.interference import (
        Interference,
        TaskRecord,
        predict_interference,
        record_task,
    )
    from clcore.evaluation.metrics import (
        METRICS,
        metric_family,
    )
    from clcore.evaluation.questions import (
        label_set,
        longest_answer,
    )
    from clcore.evaluation.runner import (
        Evaluation,
        RowScore,
        evaluate,
        set_score,
    )
    from clcore.evaluation.scalars import (
        average_accuracy,
        backward_transfer,
        forgetting,
        forward_transfer,
        learning_accuracy,
        matrix_scalars,
        task_forgetting,
    )
    from clcore.evaluation.scores import (
        TaskScore,
        task_score,
    )
    from clcore.evaluation.similarity import (
        linear_cka,
        principal_angles,
    )
    from clcore.evaluation.snapshots import (
        restore,
        take_snapshot,
    )

__all__ = [
    "GENERAL_NAME",
    "METRICS",
    "Evaluation",
    "ForgettingMetrics",
    "GateCheck",
    "Interference",
    "LocalStore",
    "OutputStore",
    "RowScore",
    "Stored",
    "TaskRecord",
    "TaskScore",
    "TransferMetrics",
    "VisualizationTools",
    "accuracy_matrix_figure",
    "adapter_embedding_figure",
    "adapter_ranks_figure",
    "average_accuracy",
    "backward_transfer",
    "backward_transfer_figure",
    "cost_figure",
    "create_visualization_dashboard",
    "dashboard_html",
    "evaluate",
    "evaluate_general",
    "forgetting",
    "forgetting_curves_figure",
    "forward_transfer",
    "gate_decisions_figure",
    "general_ability_figure",
    "general_delta",
    "general_rows",
    "general_sha256",
    "image_bytes",
    "interval",
    "label_set",
    "learning_accuracy",
    "learning_curves_figure",
    "linear_cka",
    "longest_answer",
    "mask_capacity_figure",
    "mask_overlap_figure",
    "matrix_intervals",
    "matrix_scalars",
    "metric_family",
    "orthogonality_figure",
    "output_key",
    "parameter_changes_figure",
    "parameter_importance_figure",
    "predict_interference",
    "principal_angles",
    "record_task",
    "relative_drop",
    "replay_composition_figure",
    "restore",
    "set_score",
    "similarity_figure",
    "take_snapshot",
    "task_forgetting",
    "task_score",
    "task_trajectory_figure",
    "training_curves_figure",
    "write_image",
    "write_images",
]

_MODULES = {
    "Evaluation": "runner",
    "ForgettingMetrics": "eval_forgetting",
    "GENERAL_NAME": "general",
    "GateCheck": "eval_visualization",
    "Interference": "interference",
    "LocalStore": "cache",
    "METRICS": "metrics",
    "OutputStore": "cache",
    "RowScore": "runner",
    "Stored": "cache",
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
    "linear_cka": "similarity",
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
    "predict_interference": "interference",
    "principal_angles": "similarity",
    "record_task": "interference",
    "relative_drop": "general",
    "replay_composition_figure": "eval_visualization",
    "restore": "snapshots",
    "set_score": "runner",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
