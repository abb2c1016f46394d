"""What strategies hold: the replay buffer, masks, and the directions that tasks occupy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from clcore.engine.errors import DataError
from clcore.evaluation.figures_curves import STEP_TITLE, stages
from clcore.evaluation.figures_heatmap import column_axis, column_width, similarity_figure
from clcore.evaluation.figures_style import (
    GRID,
    category_style,
    escape,
    finish,
    labels,
    nonempty,
    number,
    unique_names,
    upper_limit,
)

CAPACITY = ("earlier tasks only", "reused", "newly claimed", "free")

Masks = Mapping[str, Mapping[str, Any]]
"""Task -> {layer: array of booleans}; every task has the same layers and shapes."""


def replay_composition_figure(
    history: Sequence[tuple[Any, Mapping[str, float]]], *, unit: str = "rows", title: str | None = None
) -> go.Figure:
    """Draw what replay holds over time, by the task that it came from.

    history: [(x, {task: amount})]; x is a number of training steps or the name of the task trained last. A
    task that is not named at x has nothing there. unit: what is counted ("rows in the buffer", "tokens").
    """
    xs = [x for x, _ in history]
    names = stages(xs)
    tasks = unique_names(list(dict.fromkeys(task for _, amounts in history for task in amounts)), "tasks")
    figure = go.Figure()
    for i, (task, label) in enumerate(zip(tasks, labels(tasks), strict=True)):
        amounts = [_amount(held.get(task, 0), task) for _, held in history]
        figure.add_trace(_share(i, task, label, list(range(len(xs))) if names else xs, amounts, unit, names))
    if names:
        figure.update_layout(barmode="stack")
        figure.update_xaxes(title_text="after training task", **column_axis(names))
    else:
        figure.update_xaxes(title_text=STEP_TITLE)
    totals = [sum(held.values()) for _, held in history]
    figure.update_yaxes(title_text=escape(unit), range=[0, upper_limit(totals)])
    height = max(360, 110 + 21 * len(tasks)) + (90 if figure.layout.xaxis.tickangle else 0)
    width = 320 + max(300, column_width(names) * len(names) if names else 0)
    title = title or "Where replayed rows come from"
    return finish(figure, title, height=height, least_width=width, legend="task")


def _share(
    index: int,
    task: str,
    label: str,
    xs: Sequence[Any],
    amounts: Sequence[float],
    unit: str,
    names: Sequence[str] | None,
) -> go.Scatter | go.Bar:
    style = category_style(index)
    hover = f"{escape(task)}<br>%{{x}}: %{{y:.4g}} {escape(unit)}<extra></extra>"
    if names is not None:
        pattern = {"shape": style["fill"], "fgcolor": "#FFFFFF"}
        return go.Bar(
            x=list(xs),
            y=list(amounts),
            name=label,
            marker={"color": style["colour"], "pattern": pattern},
            customdata=[escape(name) for name in names],
            hovertemplate=hover.replace("%{x}", "after %{customdata}"),
        )
    return go.Scatter(
        x=list(xs),
        y=list(amounts),
        name=label,
        mode="lines",
        stackgroup="held",
        line={"color": style["colour"], "width": 1},
        fillcolor=style["colour"],
        fillpattern={"shape": style["fill"], "fgcolor": "#FFFFFF", "fillmode": "overlay"},
        hovertemplate=hover.replace("%{x}", "step %{x}"),
    )


def mask_overlap_figure(masks: Masks, *, title: str | None = None) -> go.Figure:
    """Draw how much the masks of two tasks overlap: components in both over components in either, 0 to 1.

    Blank where both masks are empty.
    """
    tasks, flat = _flat_masks(masks)
    values = [[_ratio(a & b, a | b) for b in flat] for a in flat]
    unit = "components in both / in either, 0 to 1"
    return similarity_figure(
        tasks,
        values,
        title=title or "Overlap of the tasks' masks",
        unit=unit,
        limits=(0.0, 1.0),
        note="1: the same components. 0: none in common.",
    )


def mask_capacity_figure(masks: Masks, *, title: str | None = None) -> go.Figure:
    """Draw what each task's mask took of all maskable components, and what is left free after it.

    The four parts of a column add up to 100 %: held by earlier tasks only, reused from them, newly claimed,
    and free.
    """
    tasks, flat = _flat_masks(masks)
    taken = np.zeros_like(flat[0])
    parts: list[list[float]] = []
    for mask in flat:
        split = (taken & ~mask, taken & mask, mask & ~taken, ~(taken | mask))
        parts.append([100.0 * float(part.mean()) for part in split])
        taken = taken | mask
    figure = go.Figure()
    colours = ("#7F7F7F", category_style(4)["colour"], category_style(0)["colour"], "#F2F2F2")
    for k, (name, colour) in enumerate(zip(CAPACITY, colours, strict=True)):
        figure.add_trace(
            go.Bar(
                x=list(range(len(tasks))),
                y=[column[k] for column in parts],
                name=name,
                marker={"color": colour, "line": {"color": GRID, "width": 1}},
                customdata=[escape(task) for task in tasks],
                hovertemplate=f"%{{customdata}}<br>{name}: %{{y:.1f}} %<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title_text="task", **column_axis(tasks))
    figure.update_yaxes(title_text="share of all components (%)", range=[0, 100])
    height = 360 + (90 if figure.layout.xaxis.tickangle else 0)
    title = title or "Capacity that masks take"
    width = 260 + max(300, column_width(tasks) * len(tasks))
    return finish(figure, title, height=height, least_width=width, legend="components")


def orthogonality_figure(
    tasks: Sequence[str],
    overlaps: Sequence[Sequence[float | None]],
    *,
    unit: str = "overlap of the tasks' subspaces, 0 to 1",
    title: str | None = None,
) -> go.Figure:
    """Draw how far tasks use the same directions: 0 is orthogonal, 1 the same subspace.

    overlaps: tasks x tasks, in 0..1, such as the mean squared cosine of the principal angles.
    """
    for i, row in enumerate(overlaps):
        for value in row:
            number(value, f"overlap in row {i}", 0, 1)
    return similarity_figure(
        tasks,
        overlaps,
        title=title or "Overlap of the directions that tasks use",
        unit=unit,
        limits=(0.0, 1.0),
        note="0: orthogonal. 1: the same directions.",
    )


def _amount(value: Any, task: str) -> float:
    found = number(value, f"amount of {task!r}", 0)
    if found is None:
        raise DataError(f"amount of {task!r} must be a number; leave a task out that holds nothing")
    return found


def _flat_masks(masks: Masks) -> tuple[list[str], list[np.ndarray[Any, np.dtype[np.bool_]]]]:
    tasks = unique_names(list(nonempty(masks, "masks")), "tasks")
    layers = list(nonempty(masks[tasks[0]], f"masks of {tasks[0]!r}"))
    arrays = {
        task: {layer: np.asarray(mask, dtype=bool) for layer, mask in masks[task].items()} for task in tasks
    }
    shapes = {layer: arrays[tasks[0]][layer].shape for layer in layers}
    for task in tasks:
        found = {layer: mask.shape for layer, mask in arrays[task].items()}
        if found != shapes:
            raise DataError(f"masks of {task!r} have shapes {found}, those of {tasks[0]!r} {shapes}")
    return tasks, [np.concatenate([arrays[task][layer].ravel() for layer in layers]) for task in tasks]


def _ratio(part: np.ndarray[Any, Any], whole: np.ndarray[Any, Any]) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None
