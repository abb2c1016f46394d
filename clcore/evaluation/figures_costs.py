"""What training cost, and what the promotion gate decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clcore.engine.errors import DataError
from clcore.evaluation.figures_heatmap import column_axis, column_width, row_axis
from clcore.evaluation.figures_style import (
    BAD,
    GOOD,
    NEUTRAL,
    category_style,
    escape,
    finish,
    known,
    labels,
    nonempty,
    number,
    unique_names,
    upper_limit,
)

UNITS = (("h", 3600.0, 3 * 3600.0), ("min", 60.0, 3 * 60.0), ("s", 1.0, 0.0))
"""Unit, its seconds, and the longest bar from which it is used, in seconds."""


def cost_figure(costs: Mapping[str, Mapping[str, float | None]], *, title: str | None = None) -> go.Figure:
    """Draw the wall time of each task, split by what it went into.

    costs: task -> {part: seconds}, such as training, strategy and evaluation; None was not measured and is
    left out of the total, which then says so. Bars are in s, min or h, by the longest.
    """
    tasks = unique_names(list(nonempty(costs, "costs")), "tasks")
    parts = unique_names(list(dict.fromkeys(part for task in tasks for part in costs[task])), "parts")
    seconds = {
        part: [number(costs[task].get(part), f"seconds of {part} for {task!r}", 0) for task in tasks]
        for part in parts
    }
    totals = [sum(known([seconds[part][i] for part in parts])) for i in range(len(tasks))]
    unit, scale, _ = next(row for row in UNITS if max(totals) >= row[2])
    figure = go.Figure()
    positions = list(range(len(tasks)))
    for i, (part, label) in enumerate(zip(parts, labels(parts), strict=True)):
        style = category_style(i)
        figure.add_trace(
            go.Bar(
                orientation="h",
                name=label,
                x=[None if value is None else value / scale for value in seconds[part]],
                y=positions,
                marker={"color": style["colour"], "pattern": {"shape": style["fill"]}},
                customdata=[escape(task) for task in tasks],
                hovertemplate=f"%{{customdata}}<br>{label}: %{{x:.3g}} {unit}<extra></extra>",
            )
        )
    room = 1.12
    for i, total in enumerate(totals):
        missing = any(seconds[part][i] is None for part in parts)
        room = 1.4 if missing else room
        text = f" {total / scale:.3g} {unit}{' (part missing)' if missing else ''}"
        figure.add_annotation(x=total / scale, y=i, text=text, showarrow=False, xanchor="left")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(
        title_text=f"wall time ({unit})", range=[0, upper_limit(totals) / scale * room], zeroline=False
    )
    figure.update_yaxes(title_text="task", **row_axis(tasks))
    return finish(
        figure,
        title or "Time spent on each task",
        height=100 + 36 * max(len(tasks), 4),
        least_width=680,
        legend="spent on",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateCheck:
    """One limit of the promotion gate, as a version met it."""

    version: str
    name: str
    """What is limited, such as max_forgetting."""
    measured: float | None
    """None was not measured."""
    limit: float
    kind: Literal["most", "least"]
    """Whether measured may be at most or must be at least the limit."""

    @property
    def passed(self) -> bool:
        """Whether the limit was kept; what was not measured does not pass."""
        if self.measured is None:
            return False
        return self.measured <= self.limit if self.kind == "most" else self.measured >= self.limit


def gate_decisions_figure(checks: Sequence[GateCheck], *, title: str | None = None) -> go.Figure:
    """Draw what the promotion gate measured for each version beside its limits, one panel per limit.

    Blue circles passed, orange crosses were refused; one without a value was not measured. Panels of upper
    limits have the same axis, and so have panels of lower limits. Values are scores or changes of scores.
    """
    if not checks:
        raise DataError("no decisions to draw")
    names = list(dict.fromkeys(check.name for check in checks))
    versions = list(dict.fromkeys(check.version for check in checks))
    measured = [number(check.measured, f"{check.name} of {check.version!r}", -1, 1) for check in checks]
    limits = [number(check.limit, f"the limit of {check.name}", -1, 1) or 0.0 for check in checks]
    spans = {kind: _span(checks, measured, limits, kind) for kind in ("most", "least")}
    kinds = {check.name: f"at {check.kind}" for check in checks}
    figure = make_subplots(
        rows=len(names),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.22 / len(names),
        subplot_titles=[f"{escape(name)} ({kinds[name]} the dashed limit)" for name in names],
    )
    figure.update_annotations(font_size=13, x=0, xanchor="left")
    for row, name in enumerate(names, start=1):
        found = [(check, versions.index(check.version)) for check in checks if check.name == name]
        figure.add_trace(_limit_trace(found, first=row == 1), row=row, col=1)
        for passed in (True, False):
            trace = _measured_trace(found, spans[found[0][0].kind][0], passed=passed)
            trace.update(showlegend=row == 1)
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(range=spans[found[0][0].kind], title_text="score, -1 to 1", row=row, col=1)
    figure.update_xaxes(**column_axis(versions))
    figure.update_xaxes(title_text="version", row=len(names), col=1)
    slanted = 80 if column_axis(versions)["tickangle"] else 0
    return finish(
        figure,
        title or "Decisions of the promotion gate",
        note="A version is promoted if it passes every limit.",
        height=80 + 180 * len(names) + slanted,
        panels=True,
        least_width=250 + max(column_width(versions) * len(versions), 300),
    )


def _span(
    checks: Sequence[GateCheck], measured: Sequence[float | None], limits: Sequence[float], kind: str
) -> list[float]:
    """Return the axis of the panels of one kind: zero, every value and every limit, with room for text."""
    chosen = [i for i, check in enumerate(checks) if check.kind == kind]
    found = [0.0, *known([measured[i] for i in chosen]), *(limits[i] for i in chosen)]
    room = (max(found) - min(found)) or 1.0
    return [min(found) - 0.3 * room, max(found) + 0.3 * room]


def _limit_trace(found: Sequence[tuple[GateCheck, int]], *, first: bool) -> go.Scatter:
    xs: list[Any] = [edge for _, x in found for edge in (x - 0.45, x + 0.45, None)]
    ys: list[Any] = [edge for check, _ in found for edge in (check.limit, check.limit, None)]
    line = {"color": NEUTRAL, "dash": "dash", "width": 2}
    return go.Scatter(
        x=xs, y=ys, mode="lines", line=line, name="limit", legendgroup="limit", showlegend=first,
        hovertemplate="limit: %{y:.4f}<extra></extra>",
    )  # fmt: skip


def _measured_trace(found: Sequence[tuple[GateCheck, int]], floor: float, *, passed: bool) -> go.Scatter:
    chosen = [(check, x) for check, x in found if check.passed is passed]
    hover = [
        f"{escape(check.version)}<br>{escape(check.name)}: "
        + ("not measured" if check.measured is None else f"{check.measured:.4f}")
        for check, _ in chosen
    ]
    sides = [
        "bottom center" if check.measured is not None and check.measured < check.limit else "top center"
        for check, _ in chosen
    ]
    word = "passed" if passed else "refused"
    # A trace without points keeps its entry in the legend only if it holds a blank.
    blank: list[Any] = [] if chosen else [None]
    return go.Scatter(
        x=[*(x for _, x in chosen), *blank],
        y=[*(floor if check.measured is None else check.measured for check, _ in chosen), *blank],
        text=[
            "not<br>measured" if check.measured is None else f"{check.measured:.2f}" for check, _ in chosen
        ],
        textposition=sides or "top center",
        textfont={"size": 11},
        cliponaxis=False,
        mode="markers+text",
        name=word,
        legendgroup=word,
        marker={"size": 12, "color": GOOD if passed else BAD, "symbol": "circle" if passed else "x"},
        customdata=hover,
        hovertemplate=f"%{{customdata}}<br>{word}<extra></extra>",
    )
