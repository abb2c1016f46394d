"""What all figures share: colours, names, scales and the checks of what is drawn.

Categories take the colours of Okabe and Ito (2008), which stay apart under every common colour blindness; the
eighth, yellow, is left out because it fades on white. Every category has its own marker too, and beyond seven
its own dash, so that print without colour still tells them apart. Amounts take cividis, signed amounts a
red-blue scale with its middle at zero.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from clcore.engine.errors import DataError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MARKERS = (
    *("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star"),
    *("pentagon", "hexagram", "bowtie", "hourglass", "triangle-left", "triangle-right", "circle-open"),
)
FILLS = ("", "/", "x", ".", "+")
AMOUNTS = "Cividis"
SIGNED = "RdBu"
BAD, GOOD, NEUTRAL = "#D55E00", "#0072B2", "#595959"

SCORE_UNIT = "score, 0 to 1"
NAME_LENGTH = 26
"""Longest name in a legend or on an axis, in characters; the whole name shows on hover."""

GRID = "#D9D9D9"
INK = "#1A1A1A"
SLANTED = -45
"""Angle of labels under an axis when they do not fit side by side."""


def category_style(index: int) -> dict[str, Any]:
    """Return colour, dash, marker and fill of the category at this position, the same in every figure."""
    cycle = index // len(COLOURS)
    return {
        "colour": COLOURS[index % len(COLOURS)],
        "dash": DASHES[cycle % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "fill": FILLS[cycle % len(FILLS)],
    }


def line_style(index: int) -> dict[str, Any]:
    """Return line and marker of a category as arguments of a scatter trace."""
    style = category_style(index)
    return {
        "line": {"color": style["colour"], "dash": style["dash"], "width": 2},
        "marker": {"color": style["colour"], "symbol": style["marker"], "size": 8},
    }


def escape(name: object) -> str:
    """Return a name as text for Plotly, which reads a subset of HTML in labels."""
    return html.escape(str(name), quote=False)


def short_name(name: str, length: int = NAME_LENGTH) -> str:
    """Cut a name in its middle: what tells tasks apart is often at the end."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def labels(names: Sequence[object], length: int = NAME_LENGTH) -> list[str]:
    """Return short names that differ where the names differ, safe as Plotly text."""
    short = [short_name(str(name), length) for name in names]
    seen: dict[str, int] = {}
    for label in short:
        seen[label] = seen.get(label, 0) + 1
    numbered = (f"{label} ({i + 1})" if seen[label] > 1 else label for i, label in enumerate(short))
    return [escape(label) for label in numbered]


def wrapped_labels(names: Sequence[object], width: int = 14, lines: int = 2) -> list[str]:
    """Return labels broken into lines at most width characters long, preferably after a sign."""
    whole = [html.unescape(label) for label in labels(names, width * lines)]
    return ["<br>".join(map(escape, _lines(label, width))) for label in whole]


def _lines(text: str, width: int) -> list[str]:
    pieces = []
    while len(text) > width:
        cuts = [max(text.rfind(sign, width // 3, width) for sign in signs) for signs in ("./ ", "-", "_")]
        cut = next((cut + 1 for cut in cuts if cut > 0), width)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def unique_names(names: Sequence[object], what: str) -> list[str]:
    """Return names as a list of str. Raises DataError if there are none or one comes twice."""
    found = [str(name) for name in names]
    if not found:
        raise DataError(f"no {what} to draw")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise DataError(f"{what} must have different names, got {twice[0]!r} twice")
    return found


def number(value: Any, what: str, low: float = -math.inf, high: float = math.inf) -> float | None:
    """Return value as a float, None as None (not measured).

    Raises DataError for what is no finite number in [low, high].
    """
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be a number or None, got {value!r}") from error
    if not math.isfinite(found):
        raise DataError(f"{what} must be finite, got {found}; what was not measured is None")
    if not low <= found <= high:
        raise DataError(f"{what} must be in [{low:g}, {high:g}], got {found:g}")
    return found


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that were measured."""
    return [value for value in values if value is not None]


def upper_limit(values: Sequence[float | None], least: float = 1e-12) -> float:
    """Return the end of an axis from zero: 8 % beyond the greatest value."""
    return max([least, *known(values)]) * 1.08


def number_text(value: float | None, digits: int = 2) -> str:
    """Return a value as text of a cell or bar; what was not measured is empty, never 0."""
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: never "-0.00"


def significant_text(value: float | None) -> str:
    """Return a value in about two significant digits and at most seven characters; None is empty."""
    if value is None:
        return ""
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def finish(
    figure: go.Figure,
    title: str,
    *,
    note: str = "",
    height: int = 440,
    least_width: int = 0,
    legend: str = "",
    panels: bool = False,
) -> go.Figure:
    """Give a figure its title, size and look, and return it.

    note is a line under the title; legend the heading of the legend, which stands right of the picture.
    panels leaves room for headings of panels. height (pixels) is without title and note. least_width (pixels)
    is what the picture needs to stay readable; layout.meta.least_width tells it to dashboard and export.
    """
    head = textwrap.wrap(title, 76, break_on_hyphens=False) or [""]
    under = textwrap.wrap(note, 120, break_on_hyphens=False)
    slanted = any(axis.tickangle == SLANTED for axis in figure.select_xaxes())
    top = 30 + 22 * len(head) + 17 * len(under) + (24 if panels else 0)
    figure.update_layout(
        title={
            "text": "<br>".join(map(escape, head)),
            "subtitle": {"text": "<br>".join(map(escape, under)), "font": {"size": 12, "color": NEUTRAL}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            # Plotly places the block by its first line and a half: more lines need more room above.
            "pad": {"l": 16, "t": 14 + 13 * (len(head) - 1)},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": 17},
        },
        height=height + top,
        margin={"l": 140 if slanted else 70, "r": 30, "t": top, "b": 70},
        template="plotly_white",
        font={"family": "Arial, Helvetica, DejaVu Sans, sans-serif", "size": 13, "color": INK},
        legend={
            "title": {"text": escape(legend), "font": {"size": 13}},
            "x": 1.02,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "tracegroupgap": 0,
            "traceorder": "normal",
        },
        colorway=COLOURS,
        hoverlabel={"namelength": -1, "align": "left"},
        meta={"title": title, "note": note, "least_width": least_width},
    )
    axis = {"automargin": True, "gridcolor": GRID, "linecolor": "#737373"}
    axis |= {"title": {"standoff": 12, "font": {"size": 14}}}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def colour_bar(title: str) -> dict[str, Any]:
    """Return a colour bar with its quantity and unit beside it."""
    text = "<br>".join(map(escape, textwrap.wrap(title, 26)))
    return {
        "title": {"text": text, "side": "right", "font": {"size": 13}},
        "thickness": 14,
        "outlinewidth": 0,
    }


def curve_points(
    points: Sequence[tuple[Any, Any]], what: str, low: float = -math.inf, high: float = math.inf
) -> tuple[list[Any], list[float | None]]:
    """Split (x, value) pairs; x is a label or a number, value a number or None."""
    xs, values = [], []
    for point in points:
        x, value = point
        xs.append(x if isinstance(x, str) else number(x, f"position in the curve of {what}"))
        values.append(number(value, f"value in the curve of {what}", low, high))
    return xs, values


def nonempty(mapping: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the mapping. Raises DataError if it holds nothing."""
    if not mapping:
        raise DataError(f"no {what} to draw")
    return mapping
