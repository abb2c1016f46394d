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
from clcore.evaluation.figures_scores import (
    accuracy_matrix_figure,
    backward_transfer_figure,
    general_ability_figure,
)

__all__ = [
    "GateCheck",
    "accuracy_matrix_figure",
    "backward_transfer_figure",
    "cost_figure",
    "dashboard_html",
    "forgetting_curves_figure",
    "gate_decisions_figure",
    "general_ability_figure",
    "image_bytes",
    "learning_curves_figure",
    "similarity_figure",
    "training_curves_figure",
    "write_image",
    "write_images",
]
