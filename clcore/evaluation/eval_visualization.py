"""Pictures of continual training: the public names of all figures, of their export and of the dashboard.

Every figure takes plain data and returns a plotly.graph_objects.Figure. docs/evaluation-figures.md has one
line and one call for each.
"""

from __future__ import annotations

from clcore.evaluation.dashboard import dashboard_html
from clcore.evaluation.export import image_bytes, write_image, write_images
from clcore.evaluation.figures_costs import GateCheck, cost_figure, gate_decisions_figure
from clcore.evaluation.figures_curves import (
    forgetting_curves_figure,
    learning_curves_figure,
    training_curves_figure,
)
from clcore.evaluation.figures_heatmap import similarity_figure
from clcore.evaluation.figures_parameters import (
    adapter_embedding_figure,
    adapter_ranks_figure,
    parameter_changes_figure,
    parameter_importance_figure,
    task_trajectory_figure,
)
from clcore.evaluation.figures_scores import (
    accuracy_matrix_figure,
    backward_transfer_figure,
    general_ability_figure,
)
from clcore.evaluation.figures_strategies import (
    mask_capacity_figure,
    mask_overlap_figure,
    orthogonality_figure,
    replay_composition_figure,
)
from clcore.evaluation.visualization_tools import VisualizationTools, create_visualization_dashboard

__all__ = [
    "GateCheck",
    "VisualizationTools",
    "accuracy_matrix_figure",
    "adapter_embedding_figure",
    "adapter_ranks_figure",
    "backward_transfer_figure",
    "cost_figure",
    "create_visualization_dashboard",
    "dashboard_html",
    "forgetting_curves_figure",
    "gate_decisions_figure",
    "general_ability_figure",
    "image_bytes",
    "learning_curves_figure",
    "mask_capacity_figure",
    "mask_overlap_figure",
    "orthogonality_figure",
    "parameter_changes_figure",
    "parameter_importance_figure",
    "replay_composition_figure",
    "similarity_figure",
    "task_trajectory_figure",
    "training_curves_figure",
    "write_image",
    "write_images",
]
