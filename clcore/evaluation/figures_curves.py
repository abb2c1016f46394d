"""Curves over tasks and over training steps, one colour, dash and marker per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clcore.engine.errors import DataError
from clcore.evaluation.figures_heatmap import column_axis, column_width
from clcore.evaluation.figures_style import (
    SCORE_UNIT,
    curve_points,
    escape,
    finish,
    known,
    labels,
    line_style,
    nonempty,
    number,
    unique_names,
    upper_limit,
)

SCORE_RANGE = (-0.03, 1.03)
STEP_TITLE = "training step (optimizer updates)"
MOST_MARKERS = 20
"""A longer curve shows its marker at about a dozen points."""

Points = Sequence[tuple[Any, float | None]]


def forgetting_curves_figure(
    curves: Mapping[str, Points], *, x_title: str | None = None, title: str | None = None
) -> go.Figure:
    """Draw the score on each task as training goes on.

    curves: task -> [(x, score)]; x is the name of the task trained last, or a number of steps. Scores are in
    0..1, and the axis always shows all of it; None leaves a gap. x_title None says "after training task" or
    counts training steps.

    Raises DataError without curves, for scores outside 0..1, and for names beside numbers.
    """
    tasks = unique_names(list(nonempty(curves, "curves")), "tasks")
    points = {task: curve_points(curves[task], repr(task), 0, 1) for task in tasks}
    along = stages([x for xs, _ in points.values() for x in xs])
    figure = go.Figure()
    for i, (task, label) in enumerate(zip(tasks, labels(tasks), strict=True)):
        xs, scores = points[task]
        positions = xs if along is None else [along.index(x) for x in xs]
        where = [escape(x) for x in xs] if along else [f"step {x:g}" for x in xs]
        figure.add_trace(_curve(i, task, label, positions, scores, where, "score"))
    if along is None:
        figure.update_xaxes(title_text=escape(x_title or STEP_TITLE))
    else:
        figure.update_xaxes(title_text=escape(x_title or "after training task"), **column_axis(along))
        figure.update_xaxes(range=[-0.3, len(along) - 0.7])
    figure.update_yaxes(title_text=SCORE_UNIT, range=SCORE_RANGE)
    return finish(
        figure,
        title or "Score on each task as training goes on",
        note="Higher is better. A falling line is forgetting.",
        height=_legend_height(len(tasks), 360) + (90 if figure.layout.xaxis.tickangle else 0),
        least_width=620 if along is None else 320 + max(column_width(along) * len(along), 300),
        legend="scored task",
    )


def learning_curves_figure(
    curves: Mapping[str, Points],
    *,
    x_title: str = STEP_TITLE,
    y_title: str = "training loss (nats per token)",
    title: str | None = None,
) -> go.Figure:
    """Draw how each task was learnt: task -> [(step, loss)], from each task's own first step.

    y_title names another quantity and its unit, such as a score. The axis starts at zero.
    Raises DataError without curves and for values that are no finite numbers.
    """
    tasks = unique_names(list(nonempty(curves, "curves")), "tasks")
    figure = go.Figure()
    everything: list[float | None] = [0.0]
    for i, (task, label) in enumerate(zip(tasks, labels(tasks), strict=True)):
        xs, values = curve_points(curves[task], repr(task))
        if any(isinstance(x, str) for x in xs):
            raise DataError(f"the curve of {task!r} must have numbers of steps, got {xs[0]!r}")
        everything += values
        figure.add_trace(_curve(i, task, label, xs, values, [f"step {x:g}" for x in xs], "value"))
    figure.update_xaxes(title_text=escape(x_title))
    low = min(known(everything))
    figure.update_yaxes(title_text=escape(y_title), range=[low * 1.08, upper_limit(everything)])
    height = _legend_height(len(tasks), 360)
    return finish(
        figure,
        title or "Learning curve of each task",
        height=height,
        least_width=620,
        legend="trained task",
    )


def training_curves_figure(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, float | None]]]], *, title: str | None = None
) -> go.Figure:
    """Draw forgetting within each task's training: one panel per trained task, all with the same axes.

    curves: trained task -> [(step, {scored task: score})]; scores in 0..1, None leaves a gap. A scored task
    keeps its colour, dash and marker in every panel.
    """
    trained = unique_names(list(nonempty(curves, "curves")), "trained tasks")
    scored = list(dict.fromkeys(task for name in trained for _, scores in curves[name] for task in scores))
    # The order of training where it is known, so that colours agree with the other figures.
    scored = [task for task in trained if task in scored] + [task for task in scored if task not in trained]
    scored = unique_names(scored, "scored tasks")
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    height = _legend_height(len(scored), 70 + 210 * rows if rows > 1 else 340)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=labels(trained, 22 if columns > 1 else 60),
        horizontal_spacing=0.03,
        vertical_spacing=55 / (height - 70) if rows > 1 else 0,
        x_title=STEP_TITLE,
        y_title=SCORE_UNIT,
    )
    figure.update_annotations(font_size=13)
    shown: set[str] = set()
    last = 0.0
    for k, name in enumerate(trained):
        row, column = k // columns + 1, k % columns + 1
        steps = [number(step, f"step in the curve of {name!r}", 0) or 0.0 for step, _ in curves[name]]
        last = max([last, *steps])
        for i, (task, label) in enumerate(zip(scored, labels(scored), strict=True)):
            if not any(task in scores for _, scores in curves[name]):
                continue
            pairs = [(step, scores.get(task)) for step, (_, scores) in zip(steps, curves[name], strict=True)]
            xs, values = curve_points(pairs, repr(task), 0, 1)
            trace = _curve(i, task, label, xs, values, [f"step {x:g}" for x in xs], "score")
            trace.update(legendgroup=str(i), showlegend=task not in shown, legendrank=i + 1)
            shown.add(task)
            figure.add_trace(trace, row=row, col=column)
    pad = 0.04 * last or 1.0
    figure.update_xaxes(range=[-pad, last + pad], showticklabels=True)
    figure.update_yaxes(range=SCORE_RANGE)
    return finish(
        figure,
        title or "Scores while each task is trained",
        note="Each panel: while its task is trained. Higher is better. A falling line is forgetting.",
        height=height,
        panels=True,
        least_width=440 + 170 * columns,
        legend="scored task",
    )


def _curve(
    index: int,
    name: str,
    label: str,
    xs: Sequence[Any],
    values: Sequence[float | None],
    where: Sequence[str],
    quantity: str,
) -> go.Scatter:
    style = line_style(index)
    style["marker"] |= {"maxdisplayed": 12 if len(xs) > MOST_MARKERS else 0}
    return go.Scatter(
        x=list(xs),
        y=list(values),
        mode="lines+markers",
        name=label,
        customdata=list(where),
        hovertemplate=f"{escape(name)}<br>%{{customdata}}<br>{quantity}: %{{y:.4g}}<extra></extra>",
        connectgaps=False,
        **style,
    )


def stages(xs: Sequence[Any]) -> list[str] | None:
    """Return the names along the axis in order of first appearance, or None if they are numbers."""
    names = [x for x in xs if isinstance(x, str)]
    if not names:
        return None
    if len(names) < len(xs):
        raise DataError(f"curves must have either names or numbers along the axis, got {names[0]!r} and both")
    return list(dict.fromkeys(names))


def _legend_height(entries: int, least: int) -> int:
    return max(least, 110 + 21 * entries)
