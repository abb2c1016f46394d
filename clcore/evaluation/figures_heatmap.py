"""Heat maps of named rows and columns, on which the other figures stand, and the similarity of tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from clcore.engine.errors import DataError
from clcore.evaluation.figures_style import (
    AMOUNTS,
    SIGNED,
    SLANTED,
    colour_bar,
    escape,
    finish,
    known,
    labels,
    number,
    number_text,
    unique_names,
    wrapped_labels,
)

MOST_TEXT_COLUMNS, MOST_TEXT_ROWS = 20, 64
"""With more the cells are too small for text, or too many to read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Named rows and columns with one number or None per cell."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_title: str
    column_title: str
    quantity: str
    """What the cells hold, with its unit and range."""
    limits: tuple[float, float]
    """Ends of the colour scale."""
    text: Sequence[Sequence[str]] | None = None
    """What the cells say; None takes two decimals."""


def heat_map(table: Table) -> go.Figure:
    """Draw a table: first row on top, a blank where nothing was measured, text in the cells.

    Positions are numbers and names are their labels, so names that look alike once shortened stay apart.
    """
    figure = go.Figure(data=heat_map_traces(table))
    figure.update_xaxes(title_text=escape(table.column_title), **column_axis(table.columns))
    figure.update_yaxes(title_text=escape(table.row_title), **row_axis(table.rows))
    return figure


def heat_map_traces(table: Table, **options: Any) -> list[go.Heatmap | go.Scatter]:
    """Return the cells of a table and, if they are large enough, their text; options are of the Heatmap."""
    hover = [
        [
            f"{escape(table.row_title)}: {escape(row)}<br>{escape(table.column_title)}: {escape(column)}"
            for column in table.columns
        ]
        for row in table.rows
    ]
    options = {
        "zmin": table.limits[0],
        "zmax": table.limits[1],
        "colorscale": SIGNED if table.limits[0] < 0 else AMOUNTS,
        "colorbar": colour_bar(table.quantity),
    } | options
    cells = go.Heatmap(
        x=list(range(len(table.columns))),
        y=list(range(len(table.rows))),
        z=[list(row) for row in table.values],
        customdata=hover,
        hovertemplate=f"%{{customdata}}<br>{escape(table.quantity)}: %{{z:.4g}}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        **options,
    )
    shown = len(table.columns) <= MOST_TEXT_COLUMNS and len(table.rows) <= MOST_TEXT_ROWS
    return [cells, _text(table)] if shown else [cells]


def _text(table: Table) -> go.Scatter:
    text = table.text or [[number_text(value) for value in row] for row in table.values]
    found = [
        (j, i, text[i][j], text_colour(value, table.limits))
        for i, row in enumerate(table.values)
        for j, value in enumerate(row)
        if value is not None
    ]
    return go.Scatter(
        x=[x for x, _, _, _ in found],
        y=[y for _, y, _, _ in found],
        text=[word for _, _, word, _ in found],
        mode="text",
        textfont={
            "color": [colour for _, _, _, colour in found],
            "size": 12 if len(table.columns) <= 10 else 10,
        },
        hoverinfo="skip",
        showlegend=False,
    )


def text_colour(value: float, limits: tuple[float, float]) -> str:
    """Return black or white, whichever has the higher contrast with the cell (WCAG 2: at least 4.5)."""
    share = min(max((value - limits[0]) / (limits[1] - limits[0]), 0.0), 1.0)
    (colour,) = sample_colorscale(SIGNED if limits[0] < 0 else AMOUNTS, [share])
    light = luminance(colour)
    return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#FFFFFF"


def luminance(colour: str) -> float:
    """Return the relative luminance, 0 to 1, of "rgb(r, g, b)" (WCAG 2)."""
    parts = [float(part) / 255 for part in colour[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def column_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return the labels of columns: upright and wrapped while they fit, else slanted."""
    longest = max(map(len, names))
    if len(names) <= 6 or longest * len(names) <= 80:
        text, angle = wrapped_labels(names, 14 if len(names) > 3 else 26, 3), 0
    else:
        text, angle = labels(names, 22), SLANTED
    return _axis(text, len(names)) | {"tickangle": angle, "range": [-0.5, len(names) - 0.5]}


def row_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return the labels of rows, the first on top."""
    return _axis(labels(names), len(names)) | {"range": [len(names) - 0.5, -0.5]}


def _axis(text: Sequence[str], count: int) -> dict[str, Any]:
    return {
        "tickmode": "array",
        "tickvals": list(range(count)),
        "ticktext": list(text),
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }


def finish_heat_map(figure: go.Figure, table: Table, title: str, note: str = "") -> go.Figure:
    """Give a heat map its title and the height and least width at which every cell can be read."""
    rows, columns = len(table.rows), len(table.columns)
    under = 150 if column_axis(table.columns)["tickangle"] else 60
    height = 60 + under + max(rows * (34 if columns <= 10 else 30), 190)
    width = 290 + max(columns * column_width(table.columns), 210)
    return finish(figure, title, note=note, height=height, least_width=width)


def column_width(names: Sequence[str]) -> int:
    """Return the least distance of columns in pixels at which their labels stay apart."""
    axis = column_axis(names)
    if axis["tickangle"]:
        return 42
    return 16 + 7 * max(len(line) for text in axis["ticktext"] for line in text.split("<br>"))


def similarity_figure(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    unit: str,
    limits: tuple[float, float] | None = None,
    note: str = "",
) -> go.Figure:
    """Draw how alike things are, pair by pair.

    names: what is compared. values: names x names, None for what was not measured (numpy arrays are taken
    too). unit: quantity, unit and range, written beside the colours ("cosine, -1 to 1"). limits: ends of the
    colour scale; None takes 0 to 1, or -1 to 1 if a value is negative, further where a value lies outside.
    Give the same limits to figures that are to be compared.

    Raises DataError if values is not square or holds what is no finite number.
    """
    names = unique_names(names, "names")
    cells = square(names, values)
    if limits is None:
        found = known([value for row in cells for value in row])
        widest = max([1.0, *(abs(value) for value in found)])
        limits = (-widest if min(found, default=0.0) < 0 else 0.0, widest)
    elif not (math.isfinite(limits[0]) and limits[0] < limits[1]):
        raise DataError(f"limits must be two rising numbers, got {limits}")
    table = Table(
        rows=names,
        columns=names,
        values=cells,
        row_title="task",
        column_title="task",
        quantity=unit,
        limits=limits,
    )
    return finish_heat_map(heat_map(table), table, title, note)


def square(names: Sequence[str], values: Sequence[Sequence[Any]]) -> list[list[float | None]]:
    """Return values as a names x names table of numbers. Raises DataError if it has another shape."""
    rows = [list(row) for row in values]
    if len(rows) != len(names) or any(len(row) != len(names) for row in rows):
        shape = f"{len(rows)} x {len(rows[0]) if rows else 0}"
        raise DataError(f"{len(names)} names need {len(names)} x {len(names)} values, got {shape}")
    return [
        [number(value, f"value of {names[i]!r} and {names[j]!r}") for j, value in enumerate(row)]
        for i, row in enumerate(rows)
    ]
