"""What training did to the parameters: per layer and module, and as points that stand for whole adapters."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.figures_heatmap import Table, finish_heat_map, heat_map, luminance
from clcore.evaluation.figures_style import (
    GRID,
    INK,
    NEUTRAL,
    escape,
    finish,
    labels,
    nonempty,
    number,
    significant_text,
    unique_names,
    upper_limit,
)

OUTSIDE = "outside"
"""Row of parameters that belong to no numbered layer."""

EMBEDDING_AXES = {
    "pca": "principal component {axis} (L2 norm of the update)",
    "mds": "MDS dimension {axis} (L2 norm of the update)",
    "tsne": "t-SNE dimension {axis} (no unit)",
}

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.")
_WRAPPERS = ("base_model", "model", "module", "transformer")
_FACTORS = re.compile(r"\.(?:lora_(?:embedding_)?[ABE]|ia3_l)(?:\..*)?$|\.(?:weight|bias)$")


def layer_and_module(name: str) -> tuple[int | None, str]:
    """Split a parameter's name: "model.layers.3.mlp.up_proj.lora_A.default.weight" -> 3, "mlp.up_proj".

    The layer is None for a parameter outside numbered layers, such as an embedding.
    """
    found = _LAYER.search(name)
    before, after = (name[: found.start()], name[found.end() :]) if found else (name, "")
    head = [part for part in before.split(".") if part not in _WRAPPERS]
    if found is None:
        return None, _FACTORS.sub("", ".".join(head)) or name
    stack = [part for part in head if part in ("encoder", "decoder")]
    return int(found.group(1)), ".".join([*stack, _FACTORS.sub("", after)])


def parameter_changes_figure(
    changes: Mapping[str, Mapping[str, float | None]], *, title: str | None = None
) -> go.Figure:
    """Draw how far each layer moved in each training.

    changes: task -> {parameter or module name: L2 norm of its change}; a cell is the root of the sum of
    squares of what its layer holds, blank if one of them was not measured.
    """
    tasks = unique_names(list(nonempty(changes, "changes")), "tasks")
    cells: dict[tuple[int | None, str], float | None] = {}
    for task in tasks:
        squares: dict[int | None, list[float | None]] = {}
        for name, value in changes[task].items():
            found = number(value, f"change of {name!r} in {task!r}", 0)
            squares.setdefault(layer_and_module(name)[0], []).append(None if found is None else found**2)
        cells |= {(layer, task): _root(values) for layer, values in squares.items()}
    table = _layer_table(cells, tasks, "training of task", "L2 norm of the change")
    note = "Layers count from the input. Blank: not measured."
    return finish_heat_map(heat_map(table), table, title or "Parameter changes per layer", note)


def parameter_importance_figure(
    importance: Mapping[str, Any],
    *,
    unit: str = "mean Fisher information per parameter (nats² per squared unit)",
    most: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw how important the parameters of each layer and module are.

    importance: parameter name -> array of its importance, at least 0 (or one number). A cell is the mean over
    all elements of a module. most: end of the colour scale; give the same to figures that are to be
    compared, None takes the greatest value.
    """
    sums: dict[tuple[int | None, str], list[float]] = {}
    for name, value in nonempty(importance, "importance").items():
        total, count = _total(name, value)
        cell = sums.setdefault(layer_and_module(name), [0.0, 0.0])
        cell[0] += total
        cell[1] += count
    means: dict[tuple[int | None, str], float | None] = {
        cell: total / count for cell, (total, count) in sums.items()
    }
    modules = list(dict.fromkeys(module for _, module in means))
    table = _layer_table(means, modules, "module", unit, most)
    note = "Layers count from the input. Blank: the layer has no such module with importance."
    title = title or "Importance per layer and module"
    return finish_heat_map(heat_map(table), table, title, note)


def adapter_ranks_figure(
    ranks: Mapping[str, int], *, most: int | None = None, title: str | None = None
) -> go.Figure:
    """Draw the rank of the adapter in each layer and module, as AdaLoRA leaves it.

    ranks: module name -> rank, at least 0. most: end of the colour scale; None takes the greatest rank.
    """
    cells: dict[tuple[int | None, str], float | None] = {}
    for name, rank in nonempty(ranks, "ranks").items():
        cell = layer_and_module(name)
        if cell in cells:
            raise DataError(
                f"two ranks belong to layer {cell[0]}, module {cell[1]!r}; the second is {name!r}"
            )
        cells[cell] = number(rank, f"rank of {name!r}", 0)
    modules = list(dict.fromkeys(module for _, module in cells))
    table = _layer_table(cells, modules, "module", "rank (number of directions)", most, digits=0)
    note = "Layers count from the input. Blank: the layer has no adapter there."
    title = title or "Rank of the adapter per layer and module"
    return finish_heat_map(heat_map(table), table, title, note)


def adapter_embedding_figure(
    names: Sequence[str],
    points: Sequence[Sequence[float]],
    *,
    method: str,
    explained: Sequence[float] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw adapters as points; near points are adapters that do nearly the same.

    names: one per adapter, in the order of training; the number in a point is its place. points: len(names)
    x 2. method: pca, tsne or mds, which names the axes. explained: share of the variance on each axis, 0..1.
    Both axes have the same scale.
    """
    figure = _points(names, points, method, explained)
    note = "Numbers: order of training." + (
        " Only neighbourhood has meaning, not distance." if method == "tsne" else " Near: alike."
    )
    return _finish_points(figure, names, title or "Adapters after each task", note)


def task_trajectory_figure(
    names: Sequence[str],
    points: Sequence[Sequence[float]],
    *,
    method: str = "pca",
    explained: Sequence[float] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw the way of the adapter from task to task as arrows. Arguments as for adapter_embedding_figure."""
    figure = _points(names, points, method, explained)
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if math.dist((x, y), (next_x, next_y)) == 0:
            continue
        figure.add_annotation(
            x=float(next_x),
            y=float(next_y),
            ax=float(x),
            ay=float(y),
            xref="x",
            yref="y",
            axref="x",
            ayref="y",
            showarrow=True,
            arrowhead=2,
            arrowwidth=1.5,
            arrowcolor=NEUTRAL,
            standoff=12,
            startstandoff=12,
            text="",
        )
    return _finish_points(
        figure, names, title or "Way of the adapter", "Numbers: order of training. Arrows: from task to task."
    )


def _points(
    names: Sequence[str],
    points: Sequence[Sequence[float]],
    method: str,
    explained: Sequence[float] | None,
) -> go.Figure:
    if method not in EMBEDDING_AXES:
        raise ConfigError(f"method must be one of {', '.join(EMBEDDING_AXES)}, got {method!r}")
    names = unique_names(names, "adapters")
    if len(points) != len(names) or any(len(point) != 2 for point in points):
        raise DataError(f"{len(names)} adapters need {len(names)} points of 2 numbers, got {len(points)}")
    shares = [i / max(len(names) - 1, 1) for i in range(len(names))]
    figure = go.Figure()
    for i, (name, label, colour) in enumerate(
        zip(names, labels(names), sample_colorscale("Viridis", shares), strict=True)
    ):
        x, y = (number(value, f"position of {name!r}") for value in points[i])
        figure.add_trace(
            go.Scatter(
                x=[x],
                y=[y],
                mode="markers+text",
                name=f"{i + 1}  {label}",
                text=[str(i + 1)],
                textfont={"color": "#000000" if luminance(colour) > 0.18 else "#FFFFFF", "size": 11},
                marker={"size": 22, "color": colour, "line": {"width": 1, "color": INK}},
                hovertemplate=f"{escape(name)}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            )
        )
    titles = [EMBEDDING_AXES[method].format(axis=axis) for axis in (1, 2)]
    if explained is not None:
        titles = [
            f"{title}, {100 * share:.0f} % of the variance"
            for title, share in zip(titles, explained, strict=True)
        ]
    figure.update_xaxes(title_text=titles[0], zerolinecolor=GRID)
    figure.update_yaxes(title_text=titles[1].replace(" (", "<br>(", 1))
    figure.update_yaxes(scaleanchor="x", scaleratio=1, zerolinecolor=GRID)
    return figure


def _finish_points(figure: go.Figure, names: Sequence[str], title: str, note: str) -> go.Figure:
    height = max(420, 110 + 21 * len(names))
    return finish(figure, title, note=note, height=height, least_width=620, legend="after training")


def _layer_table(
    cells: Mapping[tuple[int | None, str], float | None],
    columns: Sequence[str],
    column_title: str,
    quantity: str,
    most: float | None = None,
    digits: int | None = None,
) -> Table:
    layers: list[int | None] = [*sorted({layer for layer, _ in cells if layer is not None})]
    if any(layer is None for layer, _ in cells):
        layers.append(None)
    values = [[cells.get((layer, column)) for column in columns] for layer in layers]
    everything = [value for row in values for value in row]
    text = [
        [
            significant_text(value) if digits is None else "" if value is None else f"{value:.{digits}f}"
            for value in row
        ]
        for row in values
    ]
    return Table(
        rows=[OUTSIDE if layer is None else str(layer) for layer in layers],
        columns=columns,
        values=values,
        row_title="layer",
        column_title=column_title,
        quantity=quantity,
        limits=(0.0, most if most is not None else upper_limit(everything) / 1.08),
        text=text,
    )


def _root(squares: Sequence[float | None]) -> float | None:
    total = 0.0
    for square in squares:
        if square is None:
            return None
        total += square
    return math.sqrt(total)


def _total(name: str, value: Any) -> tuple[float, int]:
    found = np.asarray(value, dtype=np.float64)
    if found.size == 0 or not np.isfinite(found).all() or found.min() < 0:
        raise DataError(f"importance of {name!r} must be finite numbers of at least 0, and at least one")
    return float(found.sum()), found.size
