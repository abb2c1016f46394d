"""The pictures of a report, drawn from its facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clcore.evaluation.eval_visualization import (
    accuracy_matrix_figure,
    cost_figure,
    forgetting_curves_figure,
    general_ability_figure,
    learning_curves_figure,
    training_curves_figure,
)
from service.job_report.document import seconds_of
from service.job_report.facts import Facts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw(name: str, facts: Facts) -> Figure | None:
    """Draw a picture by its name in the document; None when there is nothing to draw."""
    return _PICTURES[name](facts)


def _matrix(facts: Facts) -> Figure:
    accuracy = facts["accuracy"]
    return accuracy_matrix_figure(accuracy["tasks"], accuracy["matrix"], accuracy["base_scores"])


def _forgetting(facts: Facts) -> Figure | None:
    accuracy = facts["accuracy"]
    names = accuracy["tasks"]
    if len(names) < 2:
        return None
    return forgetting_curves_figure(
        {
            name: [
                (after, row[j])
                for after, row in list(zip(names, accuracy["matrix"], strict=True))[j:]
                if row[j] is not None
            ]
            for j, name in enumerate(names)
        }
    )


def _curves(facts: Facts) -> Figure | None:
    found = facts["curves"]["scores"]
    if not found:
        return None
    return training_curves_figure(
        {task: [(point["step"], point["scores"]) for point in points] for task, points in found.items()}
    )


def _loss(facts: Facts) -> Figure | None:
    curves = {task: points for task, points in facts["curves"]["loss"].items() if points}
    return learning_curves_figure(curves) if curves else None


def _general(facts: Facts) -> Figure | None:
    general = facts["general"]
    if not general:
        return None
    return general_ability_figure(
        [g["task"] for g in general],
        general[0]["base"],
        [g["before"] for g in general],
        [g["after"] for g in general],
    )


def _costs(facts: Facts) -> Figure:
    return cost_figure({task: seconds_of(found) for task, found in facts["costs_s"].items()})


_PICTURES: dict[str, Callable[[Facts], Figure | None]] = {
    "matrix": _matrix,
    "forgetting": _forgetting,
    "curves": _curves,
    "loss": _loss,
    "general": _general,
    "costs": _costs,
}
