"""Pictures of a model's adapter over the tasks, from one snapshot of its parameters per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.adapter_geometry import Snapshot, distance, embed, inner_products
from clcore.evaluation.dashboard import Section, dashboard_html
from clcore.evaluation.export import check_folder
from clcore.evaluation.figures_curves import forgetting_curves_figure
from clcore.evaluation.figures_parameters import (
    adapter_embedding_figure,
    adapter_ranks_figure,
    parameter_changes_figure,
    parameter_importance_figure,
    task_trajectory_figure,
)
from clcore.evaluation.figures_scores import accuracy_matrix_figure, backward_transfer_figure
from clcore.evaluation.figures_style import unique_names

if TYPE_CHECKING:
    from torch import Tensor, nn

START = "(start)"

Importance = Mapping[str, Any]
"""Parameter name -> tensor of its importance, or task -> such a mapping."""


class VisualizationTools:
    """Figures of one adapter over a sequence of tasks.

    model: a PEFT model, or None if ranks are read from snapshots alone. task_order: names in the order of
    training. model_snapshots: task -> the adapter's parameters after it, as ForgettingMetrics keeps them; a
    task without one is left out. importance_scores: parameter -> tensor, or task -> such a mapping. initial:
    the adapter's parameters before the first task; with it the first task's change can be drawn too.

    Raises ConfigError for a snapshot or importance of a task that is not in task_order.
    """

    def __init__(
        self,
        model: nn.Module | None,
        task_order: Sequence[str],
        model_snapshots: Mapping[str, Snapshot] | None = None,
        importance_scores: Importance | None = None,
        *,
        initial: Snapshot | None = None,
    ) -> None:
        self.model = model
        self.task_order = unique_names(task_order, "tasks")
        self.snapshots = _in_order(model_snapshots or {}, self.task_order, "snapshot")
        self.importance = self._importance_of(importance_scores or {})
        self.initial = initial

    def adapter_embeddings(self, method: str = "pca", *, seed: int = 0) -> go.Figure:
        """Draw the adapters after each task as points; method is pca, tsne or mds.

        Raises DataError with fewer than 2 snapshots.
        """
        found = embed(list(self.snapshots.values()), method, seed=seed)
        return adapter_embedding_figure(
            list(self.snapshots), found.points, method=method, explained=found.explained
        )

    def task_trajectory(self, method: str = "pca", *, seed: int = 0) -> go.Figure:
        """Draw the way of the adapter from task to task, from initial if it is known.

        Raises DataError with fewer than 2 points.
        """
        way = self._way()
        found = embed(list(way.values()), method, seed=seed)
        return task_trajectory_figure(list(way), found.points, method=method, explained=found.explained)

    def parameter_changes(self) -> go.Figure:
        """Draw per layer how far each task's training moved the update: the L2 norm of its change.

        A LoRA pair counts by its product. Raises DataError with fewer than 2 points (initial counts as one).
        """
        way = self._way()
        if len(way) < 2:
            raise DataError(f"changes need at least 2 snapshots, got {len(way)}")
        products = inner_products(list(way.values()))
        changes = {
            task: {module: distance(cells, i, i + 1) for module, cells in products.items()}
            for i, task in enumerate(list(way)[1:])
        }
        return parameter_changes_figure(changes)

    def adapter_ranks(self, task: str | None = None) -> go.Figure:
        """Draw the rank of each module's adapter: after a task, or of the model as it is now (task None).

        AdaLoRA's rank is the number of singular values that it has not set to zero. Raises ConfigError for a
        task without snapshot, DataError if there is no LoRA pair.
        """
        if task is not None:
            if task not in self.snapshots:
                raise ConfigError(
                    f"no snapshot of task {task!r}; there are {', '.join(self.snapshots) or 'none'}"
                )
            return adapter_ranks_figure(adapter_ranks(self.snapshots[task]), title=f"Rank after {task}")
        if self.model is None:
            raise ConfigError("ranks need a model or the name of a task with a snapshot")
        return adapter_ranks_figure(adapter_ranks(dict(self.model.named_parameters())))

    def parameter_importance(self, task: str | None = None) -> go.Figure:
        """Draw the importance per layer and module, of one task or of all together (task None).

        Figures of several tasks share their scale. Raises ConfigError for a task without importance.
        """
        if task not in self.importance:
            known = ", ".join(repr(name) for name in self.importance) or "none"
            raise ConfigError(f"no importance for task {task!r}; there is {known}")
        title = "Importance per layer and module" + (f", task {task}" if task is not None else "")
        figures = {
            name: parameter_importance_figure(scores, title=title) for name, scores in self.importance.items()
        }
        most = max(float(figure.data[0].zmax) for figure in figures.values())
        return parameter_importance_figure(self.importance[task], most=most, title=title)

    def _way(self) -> dict[str, Snapshot]:
        start = {START: self.initial} if self.initial is not None else {}
        return start | self.snapshots

    def _importance_of(self, scores: Importance) -> dict[str | None, dict[str, Any]]:
        if not scores:
            return {}
        if not any(isinstance(value, Mapping) for value in scores.values()):
            return {None: _arrays(scores)}
        ordered = _in_order(scores, self.task_order, "importance")
        return {task: _arrays(found) for task, found in ordered.items()}


def adapter_ranks(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return module -> rank of its LoRA pair; of AdaLoRA's triple, how many singular values are not zero."""
    ranks = {}
    for name, value in parameters.items():
        for factor in ("lora_A", "lora_embedding_A"):
            head, mark, tail = name.partition(f".{factor}")
            if not mark:
                continue
            values = parameters.get(f"{head}.lora_E{tail}")
            ranks[head] = int(value.shape[0]) if values is None else int((values != 0).sum())
    return ranks


def _in_order(found: Mapping[str, Any], order: Sequence[str], what: str) -> dict[str, Any]:
    strangers = [name for name in found if name not in order]
    if strangers:
        raise ConfigError(f"{what} of task {strangers[0]!r}, which is not one of {', '.join(order)}")
    return {task: found[task] for task in order if task in found}


def _arrays(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu().double().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in scores.items()
    }


def create_visualization_dashboard(
    model: nn.Module | None,
    task_order: Sequence[str],
    model_snapshots: Mapping[str, Snapshot] | None = None,
    importance_scores: Importance | None = None,
    *,
    matrix: Sequence[Sequence[float | None]] | None = None,
    base_scores: Sequence[float | None] | None = None,
    initial: Snapshot | None = None,
    title: str = "Continual training of an adapter",
    output: str | Path | None = None,
) -> str:
    """Return one HTML page of everything that can be drawn, and write it to output if that is given.

    Arguments as for VisualizationTools; matrix and base_scores as for accuracy_matrix_figure. A section says
    what it lacks where something was not given. The page opens without a network; the same input gives the
    same bytes.
    """
    tools = VisualizationTools(model, task_order, model_snapshots, importance_scores, initial=initial)
    sections = [
        *_score_sections(tools.task_order, matrix, base_scores),
        *_snapshot_sections(tools),
        *_model_sections(tools),
    ]
    page = dashboard_html(sections, title=title)
    if output is not None:
        check_folder(Path(output))
        Path(output).write_text(page, encoding="utf-8")
    return page


def _score_sections(
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float | None]] | None,
    base_scores: Sequence[float | None] | None,
) -> list[Section]:
    if not matrix:
        return [("Scores", "<p>No matrix of scores was given.</p>", None)]
    curves = {
        task: [(tasks[i], row[j]) for i, row in enumerate(matrix) if i >= j and j < len(row)]
        for j, task in enumerate(tasks[: len(matrix)])
    }
    sections: list[Section] = [
        ("Scores", "", accuracy_matrix_figure(tasks, matrix, base_scores)),
        ("Forgetting", "", forgetting_curves_figure(curves)),
    ]
    if len(matrix) > 1:
        sections.append(("Backward transfer", "", backward_transfer_figure(tasks, matrix)))
    return sections


def _snapshot_sections(tools: VisualizationTools) -> list[Section]:
    count = len(tools.snapshots)
    if count + (tools.initial is not None) < 2:
        lack = f"<p>The way of the adapter needs at least 2 snapshots; {count} were given.</p>"
        return [("Adapters", lack, None)]
    sections: list[Section] = []
    if count >= 2:
        sections.append(("Adapters", "", tools.adapter_embeddings()))
    sections.append(("Way of the adapter", "", tools.task_trajectory()))
    sections.append(("Parameter changes", "", tools.parameter_changes()))
    return sections


def _model_sections(tools: VisualizationTools) -> list[Section]:
    sections: list[Section] = []
    if tools.model is not None and adapter_ranks(dict(tools.model.named_parameters())):
        sections.append(("Ranks", "", tools.adapter_ranks()))
    else:
        sections.append(("Ranks", "<p>There is no model with LoRA pairs.</p>", None))
    for task in tools.importance:
        heading = "Importance" if task is None else f"Importance for {task}"
        sections.append((heading, "", tools.parameter_importance(task)))
    if not tools.importance:
        sections.append(("Importance", "<p>No importance was given.</p>", None))
    return sections
