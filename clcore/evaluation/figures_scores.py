"""Scores of tasks: the accuracy matrix, backward transfer and general ability.

Scores are in 0..1, higher is better; None is a score that was not measured and stays blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from clcore.engine.errors import DataError
from clcore.evaluation.figures_heatmap import (
    Table,
    column_axis,
    column_width,
    finish_heat_map,
    heat_map,
    row_axis,
)
from clcore.evaluation.figures_style import (
    BAD,
    GOOD,
    INK,
    NEUTRAL,
    SCORE_UNIT,
    escape,
    finish,
    known,
    number,
    unique_names,
    upper_limit,
)
from clcore.evaluation.scalars import backward_transfer

UNTRAINED, MEAN = "(untrained)", "mean (BWT)"

Matrix = Sequence[Sequence[float | None]]


def accuracy_matrix_figure(
    tasks: Sequence[str],
    matrix: Matrix,
    base_scores: Sequence[float | None] | None = None,
    *,
    title: str | None = None,
) -> go.Figure:
    """Draw a[i][j], the score on task j after training task i, as a heat map from 0 to 1.

    matrix may have fewer rows than tasks (training goes on) and shorter rows; what is missing stays blank.
    base_scores, one per task, become a first row marked as the untrained model. Outlined: the task that was
    just trained.

    Raises DataError for scores outside 0..1, or more rows or columns than tasks.
    """
    tasks = unique_names(tasks, "tasks")
    cells = score_rows(tasks, matrix)
    rows = tasks[: len(cells)]
    first = 0
    if base_scores is not None:
        cells = [score_row(tasks, base_scores, "of the untrained model"), *cells]
        rows, first = [UNTRAINED, *rows], 1
    if not cells:
        raise DataError("no row of scores to draw")
    table = Table(
        rows=rows,
        columns=tasks,
        values=cells,
        row_title="after training task",
        column_title="scored on task",
        quantity=SCORE_UNIT,
        limits=(0.0, 1.0),
    )
    figure = heat_map(table)
    for i in range(len(rows) - first):
        box = {"x0": i - 0.5, "x1": i + 0.5, "y0": i + first - 0.5, "y1": i + first + 0.5}
        figure.add_shape(type="rect", line={"color": BAD, "width": 2.5}, **box)
    note = "Higher is better. Outlined: the task just trained. Blank: not scored."
    if first:
        figure.add_hline(y=0.5, line={"color": INK, "width": 3})
        figure.update_yaxes(ticktext=[f"<i>{UNTRAINED}</i>", *figure.layout.yaxis.ticktext[1:]])
        note += " Above the line: the untrained model."
    return finish_heat_map(figure, table, title or "Score on each task after each training", note)


def score_row(tasks: Sequence[str], row: Sequence[Any], what: str) -> list[float | None]:
    """Return one score or None per task. Raises DataError for a longer row or a score outside 0..1."""
    if len(row) > len(tasks):
        raise DataError(f"the scores {what} are {len(row)} for {len(tasks)} tasks")
    found = [number(value, f"the score on {tasks[j]!r} {what}", 0, 1) for j, value in enumerate(row)]
    return found + [None] * (len(tasks) - len(row))


def score_rows(tasks: Sequence[str], matrix: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """Return the rows of an accuracy matrix, each as long as tasks."""
    if len(matrix) > len(tasks):
        raise DataError(f"the matrix has {len(matrix)} rows for {len(tasks)} tasks")
    return [score_row(tasks, row, f"after {tasks[i]!r}") for i, row in enumerate(matrix)]


def backward_transfer_figure(tasks: Sequence[str], matrix: Matrix, *, title: str | None = None) -> go.Figure:
    """Draw per task what training later tasks did to its score: a[T][j] - a[j][j], T the last trained task.

    Bars left of zero: worse than when it was trained. The last bar is their mean (BWT), blank if a score
    that it needs was not measured. Raises DataError with fewer than two trained tasks.
    """
    tasks = unique_names(tasks, "tasks")
    rows = score_rows(tasks, matrix)
    if len(rows) < 2:
        raise DataError(f"backward transfer needs at least 2 trained tasks, got {len(rows)}")
    earlier = tasks[: len(rows) - 1]
    values = [_minus(rows[-1][j], rows[j][j]) for j in range(len(earlier))]
    mean = backward_transfer(rows)
    note = "Below 0: training later tasks made it worse."
    figure = _signed_bars([*earlier, MEAN], [*values, mean])
    figure.add_hline(y=len(earlier) - 0.5, line={"color": INK, "width": 1.5})
    if mean is None:
        note += " No mean: a score is missing."
    limit = max([0.1, *(abs(value) for value in known(values))]) * 1.35
    figure.update_xaxes(title_text="change of score since the task was trained", range=[-limit, limit])
    height = 100 + 36 * (len(earlier) + 1)
    return finish(figure, title or "Backward transfer", note=note, height=max(height, 240), least_width=560)


def _signed_bars(names: Sequence[str], values: Sequence[float | None]) -> go.Figure:
    """Draw one bar per name, the first on top: blue above zero, vermilion below, with signed text."""
    positions = list(range(len(names)))
    colours = [BAD if value is not None and value < 0 else GOOD for value in values]
    bars = go.Bar(
        orientation="h",
        x=list(values),
        y=positions,
        marker={"color": [*colours[:-1], NEUTRAL]},
        text=["" if value is None else f"{value:+.2f}" for value in values],
        textposition="outside",
        cliponaxis=False,
        customdata=[escape(name) for name in names],
        hovertemplate="%{customdata}: %{x:+.4f}<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_yaxes(title_text="task", **row_axis(names))
    figure.update_xaxes(zeroline=True, zerolinecolor=INK, zerolinewidth=1.5)
    return figure


def general_ability_figure(
    tasks: Sequence[str],
    base: float | None,
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    title: str | None = None,
) -> go.Figure:
    """Draw how well the model still does on text of no task, before and after training each task.

    Values are scores in 0..1, here 1 / perplexity, higher is better; base is the untrained model's, a dashed
    line. before and after hold one value or None per task.
    """
    tasks = unique_names(tasks, "tasks")
    starts = score_row(tasks, before, "before training")
    ends = score_row(tasks, after, "after training")
    base = number(base, "the untrained model's score", 0, 1)
    figure = go.Figure()
    for j, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start is not None and end is not None:
            line = {"color": GOOD if end >= start else BAD, "width": 3}
            pair = {"x": [j - 0.15, j + 0.15], "y": [start, end]}
            figure.add_trace(go.Scatter(**pair, mode="lines", line=line, showlegend=False, hoverinfo="skip"))
    rose = [(_minus(end, start) or 0.0) >= 0 for start, end in zip(starts, ends, strict=True)]
    series = (
        ("before training", starts, -0.15, "circle-open", NEUTRAL),
        ("after, not lower", _where(ends, rose), 0.15, "triangle-up", GOOD),
        ("after, lower", _where(ends, [not up for up in rose]), 0.15, "triangle-down", BAD),
    )
    for name, values, shift, symbol, colour in series:
        figure.add_trace(
            go.Scatter(
                x=[j + shift for j in range(len(tasks))],
                y=values,
                mode="markers",
                name=name,
                marker={"symbol": symbol, "size": 12, "color": colour, "line": {"width": 2, "color": colour}},
                customdata=[escape(task) for task in tasks],
                hovertemplate=f"%{{customdata}}, {name}: %{{y:.4f}}<extra></extra>",
            )
        )
    if base is not None:
        figure.add_trace(
            go.Scatter(
                x=[-0.5, len(tasks) - 0.5],
                y=[base, base],
                mode="lines",
                name="untrained model",
                line={"color": NEUTRAL, "dash": "dash", "width": 2},
                hovertemplate="untrained model: %{y:.4f}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="task trained", **column_axis(tasks))
    top = min(upper_limit([*starts, *ends, base]), 1.02)
    figure.update_yaxes(title_text="score on general text<br>(1 / perplexity, 0 to 1)", range=[0, top])
    note = "Higher is better. A line joins before and after training a task."
    return finish(
        figure,
        title or "General ability",
        note=note,
        height=360 + (90 if figure.layout.xaxis.tickangle else 0),
        least_width=300 + max(column_width(tasks) * len(tasks), 260),
    )


def _where(values: Sequence[float | None], chosen: Sequence[bool]) -> list[float | None]:
    return [value if here else None for value, here in zip(values, chosen, strict=True)]


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
