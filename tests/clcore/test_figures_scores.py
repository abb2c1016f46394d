"""Figures of scores and curves: the data that they show, their axes, scales and what is blank."""

from __future__ import annotations

import json
from typing import Any

import plotly.graph_objects as go
import pytest

from clcore.engine.errors import DataError
from clcore.evaluation.eval_visualization import (
    GateCheck,
    accuracy_matrix_figure,
    backward_transfer_figure,
    cost_figure,
    forgetting_curves_figure,
    gate_decisions_figure,
    general_ability_figure,
    learning_curves_figure,
    training_curves_figure,
)
from clcore.evaluation.scalars import backward_transfer

TASKS = ["colours", "dates", "units"]
MATRIX = [[0.9, 0.1, None], [0.6, 0.8, 0.2], [0.5, 0.7, 1.0]]


def data(figure: go.Figure) -> Any:
    """Return a figure as a browser gets it."""
    return json.loads(figure.to_json())


def named(figure: go.Figure, name: str) -> Any:
    (found,) = [trace for trace in data(figure)["data"] if trace.get("name") == name]
    return found


def test_the_matrix_shows_the_untrained_row_first_and_every_score_in_its_cell() -> None:
    figure = data(accuracy_matrix_figure(TASKS, MATRIX, [0.0, 0.05, None]))
    cells, text = figure["data"]
    assert cells["z"] == [[0.0, 0.05, None], *MATRIX]
    assert figure["layout"]["yaxis"]["ticktext"] == ["<i>(untrained)</i>", *TASKS]
    assert figure["layout"]["xaxis"]["ticktext"] == TASKS
    shown = {(x, y): word for x, y, word in zip(text["x"], text["y"], text["text"], strict=True)}
    assert shown[(0, 0)] == "0.00"  # a measured zero
    assert shown[(1, 0)] == "0.05"
    assert shown[(2, 3)] == "1.00"


def test_a_score_that_was_not_measured_is_blank_and_not_zero() -> None:
    cells, text = data(accuracy_matrix_figure(TASKS, MATRIX))["data"]
    assert cells["z"][0][2] is None
    assert (2, 0) not in list(zip(text["x"], text["y"], strict=True))
    assert cells["hoverongaps"] is False


@pytest.mark.parametrize("scores", [[[0.01]], [[0.99]], [[0.0, 1.0], [0.5, 0.5]]])
def test_all_accuracy_matrices_have_the_same_colours_from_0_to_1(scores: list[list[float]]) -> None:
    cells = data(accuracy_matrix_figure(TASKS, scores))["data"][0]
    assert (cells["zmin"], cells["zmax"]) == (0, 1)
    assert cells["colorbar"]["title"]["text"] == "score, 0 to 1"


def test_the_outlined_cells_are_those_of_the_task_just_trained() -> None:
    for base, shift in ((None, 0), ([0.1, 0.1, 0.1], 1)):
        shapes = data(accuracy_matrix_figure(TASKS, MATRIX, base))["layout"]["shapes"]
        centres = [
            ((box["x0"] + box["x1"]) / 2, (box["y0"] + box["y1"]) / 2)
            for box in shapes
            if box["type"] == "rect"
        ]
        assert centres == [(i, i + shift) for i in range(3)]


def test_a_matrix_of_a_job_that_still_trains_has_as_many_rows_as_trained_tasks() -> None:
    cells = data(accuracy_matrix_figure(TASKS, [[0.9], [0.6, 0.8]]))["data"][0]
    assert cells["z"] == [[0.9, None, None], [0.6, 0.8, None]]


@pytest.mark.parametrize(
    ("tasks", "matrix", "message"),
    [
        (TASKS, [[1.2]], r"score on 'colours' after 'colours' must be in \[0, 1\], got 1.2"),
        (TASKS, [[float("nan")]], "must be finite"),
        (TASKS, [["high"]], "must be a number or None, got 'high'"),
        (TASKS, [[0.1] * 4], "are 4 for 3 tasks"),
        (TASKS, [[0.1]] * 4, "4 rows for 3 tasks"),
        (["a", "a"], [[0.1]], "got 'a' twice"),
        ([], [], "no tasks to draw"),
        (TASKS, [], "no row of scores"),
    ],
)
def test_a_matrix_that_cannot_be_drawn_says_why(tasks: Any, matrix: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy_matrix_figure(tasks, matrix)


def test_backward_transfer_bars_are_the_changes_and_their_mean() -> None:
    figure = data(backward_transfer_figure(TASKS, MATRIX))
    (bars,) = figure["data"]
    # 0.5 - 0.9, 0.7 - 0.8, and their mean
    assert bars["x"] == pytest.approx([-0.4, -0.1, -0.25])
    assert bars["x"][-1] == pytest.approx(backward_transfer(MATRIX))
    assert bars["text"] == ["-0.40", "-0.10", "-0.25"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["colours", "dates", "mean (BWT)"]
    low, high = figure["layout"]["xaxis"]["range"]
    assert low == -high
    assert low < -0.4


def test_backward_transfer_has_no_mean_where_a_score_is_missing() -> None:
    figure = data(backward_transfer_figure(TASKS, [*MATRIX[:2], [None, 0.7, 1.0]]))
    assert figure["data"][0]["x"][0] is None
    assert figure["data"][0]["x"][2] is None
    assert "No mean" in figure["layout"]["title"]["subtitle"]["text"]
    with pytest.raises(DataError, match="at least 2 trained tasks, got 1"):
        backward_transfer_figure(TASKS, MATRIX[:1])


def test_forgetting_curves_over_tasks_stand_at_the_task_trained_last() -> None:
    curves = {"colours": [("colours", 0.9), ("dates", None), ("units", 0.5)], "units": [("units", 1.0)]}
    figure = forgetting_curves_figure(curves)
    layout = data(figure)["layout"]
    assert (named(figure, "colours")["x"], named(figure, "colours")["y"]) == ([0, 1, 2], [0.9, None, 0.5])
    assert named(figure, "units")["x"] == [2]
    assert layout["xaxis"]["ticktext"] == TASKS
    assert layout["xaxis"]["title"]["text"] == "after training task"
    assert layout["yaxis"]["title"]["text"] == "score, 0 to 1"
    assert layout["yaxis"]["range"] == [-0.03, 1.03]
    assert named(figure, "colours")["connectgaps"] is False


def test_forgetting_curves_over_steps_count_steps_and_do_not_mix_with_names() -> None:
    figure = forgetting_curves_figure({"a": [(0, 0.2), (50, 0.4)]})
    assert named(figure, "a")["x"] == [0, 50]
    assert data(figure)["layout"]["xaxis"]["title"]["text"] == "training step (optimizer updates)"
    with pytest.raises(DataError, match="either names or numbers"):
        forgetting_curves_figure({"a": [(0, 0.2), ("b", 0.4)]})


def test_learning_curves_show_the_loss_in_nats_from_zero() -> None:
    figure = learning_curves_figure({"a": [(1, 3.0), (2, 1.5)], "b": [(1, 2.0)]})
    layout = data(figure)["layout"]
    assert (named(figure, "a")["x"], named(figure, "a")["y"]) == ([1, 2], [3.0, 1.5])
    assert layout["yaxis"]["title"]["text"] == "training loss (nats per token)"
    assert layout["yaxis"]["range"] == pytest.approx([0, 3.24])
    with pytest.raises(DataError, match="must be finite, got inf"):
        learning_curves_figure({"a": [(1, float("inf"))]})


def test_training_curves_have_one_panel_per_trained_task_and_the_same_axes_in_all() -> None:
    curves = {
        "colours": [(0, {"colours": 0.1}), (40, {"colours": 0.9})],
        "dates": [(0, {"dates": 0.0, "colours": 0.9}), (80, {"colours": None, "dates": 0.8})],
    }
    figure = data(training_curves_figure(curves))
    axes = {name: axis for name, axis in figure["layout"].items() if name.startswith(("xaxis", "yaxis"))}
    assert len(axes) == 4
    assert {tuple(axis["range"]) for name, axis in axes.items() if name.startswith("y")} == {(-0.03, 1.03)}
    (span,) = {tuple(axis["range"]) for name, axis in axes.items() if name.startswith("x")}
    assert span[0] < 0
    assert span[1] > 80
    words = [note["text"] for note in figure["layout"]["annotations"]]
    assert words == ["colours", "dates", "training step (optimizer updates)", "score, 0 to 1"]
    second = [trace for trace in figure["data"] if trace["name"] == "colours"]
    assert [trace["y"] for trace in second] == [[0.1, 0.9], [0.9, None]]
    assert second[0]["line"] == second[1]["line"]
    assert [trace["showlegend"] for trace in second] == [True, False]


def test_general_ability_tells_rise_from_fall_and_shows_the_untrained_model() -> None:
    figure = general_ability_figure(["a", "b", "c"], 0.06, [0.06, 0.05, None], [0.05, 0.07, 0.04])
    assert named(figure, "before training")["y"] == [0.06, 0.05, None]
    assert named(figure, "after, not lower")["y"] == [None, 0.07, 0.04]  # c: nothing to be lower than
    assert named(figure, "after, lower")["y"] == [0.05, None, None]
    assert named(figure, "untrained model")["y"] == [0.06, 0.06]
    assert "1 / perplexity, 0 to 1" in data(figure)["layout"]["yaxis"]["title"]["text"]
    assert data(figure)["layout"]["yaxis"]["range"] == pytest.approx([0, 0.07 * 1.08])


@pytest.mark.parametrize(
    ("seconds", "unit", "shown"), [(90.0, "s", 90.0), (600.0, "min", 10.0), (14400.0, "h", 4.0)]
)
def test_costs_are_in_the_unit_of_the_longest_bar(seconds: float, unit: str, shown: float) -> None:
    figure = cost_figure({"a": {"training": seconds, "evaluation": 1.0}, "b": {"training": None}})
    assert named(figure, "training")["x"] == [pytest.approx(shown), None]
    layout = data(figure)["layout"]
    assert layout["xaxis"]["title"]["text"] == f"wall time ({unit})"
    assert [note["text"].endswith("(part missing)") for note in layout["annotations"]] == [False, True]


def test_the_gate_refuses_what_breaks_a_limit_and_what_was_not_measured() -> None:
    def check(version: str, name: str, measured: float | None, limit: float, kind: Any) -> GateCheck:
        return GateCheck(version=version, name=name, measured=measured, limit=limit, kind=kind)

    checks = [
        check("v1", "max_forgetting", 0.05, 0.05, "most"),
        check("v2", "max_forgetting", 0.06, 0.05, "most"),
        check("v1", "max_general_drop", None, 0.1, "most"),
        check("v2", "min_new_task", 0.7, 0.75, "least"),
    ]
    assert [found.passed for found in checks] == [True, False, False, False]
    figure = data(gate_decisions_figure(checks))
    drawn = {
        (trace["name"], trace["xaxis"]): trace["text"]
        for trace in figure["data"]
        if trace["name"] != "limit" and trace["text"]
    }
    assert drawn[("passed", "x")] == ["0.05"]
    assert drawn[("refused", "x")] == ["0.06"]
    assert drawn[("refused", "x2")] == ["not<br>measured"]
    assert drawn[("refused", "x3")] == ["0.70"]
    assert figure["layout"]["yaxis"]["range"] == figure["layout"]["yaxis2"]["range"]
