"""Colours, names and text: what makes every figure readable."""

from __future__ import annotations

import itertools
import json

import pytest

from clcore.engine.errors import DataError
from clcore.evaluation import figures_style as style
from clcore.evaluation.eval_visualization import (
    accuracy_matrix_figure,
    forgetting_curves_figure,
    similarity_figure,
)
from clcore.evaluation.figures_heatmap import luminance, text_colour

LONG = ["a" * 62 + "1", "a" * 62 + "2", "b" * 20 + "1" + "b" * 42, "b" * 20 + "2" + "b" * 42]


def rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


def test_a_rounded_zero_has_no_sign() -> None:
    assert [style.number_text(value) for value in (-0.001, 0.0, -0.01, None)] == ["0.00", "0.00", "-0.01", ""]


def test_thirty_categories_all_look_different() -> None:
    looks = [tuple(style.category_style(i)[part] for part in ("colour", "dash")) for i in range(30)]
    assert len(set(looks)) == 30
    marks = [tuple(style.category_style(i)[part] for part in ("colour", "marker")) for i in range(30)]
    assert len(set(marks)) == 30


def test_the_colours_are_those_of_okabe_and_ito_without_the_one_that_fades_on_white() -> None:
    okabe_ito = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    assert set(style.COLOURS) == set(okabe_ito) - {"#F0E442"}
    assert luminance(rgb("#F0E442")) > max(luminance(rgb(colour)) for colour in style.COLOURS)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (-1.0, 1.0), (0.0, 37.0)])
def test_text_in_a_cell_of_any_value_has_a_contrast_of_at_least_4_5(limits: tuple[float, float]) -> None:
    from plotly.colors import sample_colorscale

    scale = style.SIGNED if limits[0] < 0 else style.AMOUNTS
    for share in [i / 200 for i in range(201)]:
        cell = luminance(sample_colorscale(scale, [share])[0])
        text = luminance(rgb(text_colour(limits[0] + share * (limits[1] - limits[0]), limits)))
        assert (max(cell, text) + 0.05) / (min(cell, text) + 0.05) >= 4.5


def test_luminance_of_black_white_and_green_by_hand() -> None:
    assert luminance("rgb(0, 0, 0)") == 0
    assert luminance("rgb(255, 255, 255)") == pytest.approx(1)
    assert luminance("rgb(0, 255, 0)") == pytest.approx(0.7152)


def test_names_of_63_characters_are_cut_in_the_middle_and_stay_apart() -> None:
    found = style.labels(LONG)
    assert len(set(found)) == 4
    assert found[0].endswith("1")
    assert found[2].endswith("(3)")  # it looks like the fourth once cut, so its place tells them apart
    assert max(map(len, found)) <= style.NAME_LENGTH + len(" (3)")
    assert style.labels(["short", "names"]) == ["short", "names"]


def test_wrapped_labels_break_after_a_sign_and_no_line_is_longer_than_the_width() -> None:
    assert style.wrapped_labels(["sentiment-of-reviews"], 14, 2) == ["sentiment-of-<br>reviews"]
    assert style.wrapped_labels(["self_attn.q_proj"], 14, 2) == ["self_attn.<br>q_proj"]
    lines = itertools.chain.from_iterable(
        label.split("<br>") for label in style.wrapped_labels(LONG[:2], 14, 3)
    )
    assert max(map(len, lines)) <= 14


def test_whole_names_show_on_hover_in_heat_maps_and_curves() -> None:
    matrix = json.loads(accuracy_matrix_figure(LONG, [[0.1, 0.2, 0.3, 0.4]]).to_json())
    assert f"scored on task: {LONG[3]}" in matrix["data"][0]["customdata"][0][3]
    curves = json.loads(forgetting_curves_figure({name: [(0, 0.5)] for name in LONG}).to_json())
    assert [trace["hovertemplate"].split("<br>")[0] for trace in curves["data"]] == LONG


def test_markup_in_a_name_is_shown_as_text() -> None:
    name = '<a href="x">&'
    figure = json.loads(accuracy_matrix_figure([name], [[0.5]], title=name).to_json())
    assert figure["layout"]["xaxis"]["ticktext"] == ['&lt;a href="x"&gt;&amp;']
    assert figure["layout"]["title"]["text"] == '&lt;a href="x"&gt;&amp;'
    assert figure["data"][0]["customdata"][0][0].endswith('scored on task: &lt;a href="x"&gt;&amp;')


def test_long_titles_are_wrapped_and_get_room() -> None:
    short = accuracy_matrix_figure(["a"], [[0.5]], title="Scores")
    long = accuracy_matrix_figure(["a"], [[0.5]], title="Scores of tasks " * 10)
    assert max(len(line) for line in long.layout.title.text.split("<br>")) <= 76
    assert long.layout.height - short.layout.height == long.layout.margin.t - short.layout.margin.t == 44


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0"),
        (0.034, "0.034"),
        (1.0, "1"),
        (123.4, "123"),
        (0.000012, "1.2e-5"),
        (2e7, "2.0e7"),
    ],
)
def test_text_of_an_amount_is_short(value: float | None, text: str) -> None:
    assert style.significant_text(value) == text


def test_similarity_takes_the_balanced_scale_only_for_signed_values() -> None:
    def scale(values: list[list[float | None]], **options: tuple[float, float]) -> tuple[float, float]:
        figure = similarity_figure(["a", "b"], values, title="t", unit="cosine", **options)
        return figure.data[0].zmin, figure.data[0].zmax

    assert scale([[1, 0.2], [0.2, 1]]) == (0, 1)
    assert scale([[1, -0.2], [-0.2, 1]]) == (-1, 1)
    assert scale([[1, -3.0], [None, 1]]) == (-3, 3)
    assert scale([[1, 0.2], [0.2, 1]], limits=(-1.0, 1.0)) == (-1, 1)


def test_similarity_says_what_is_no_square_of_numbers() -> None:
    with pytest.raises(DataError, match="2 names need 2 x 2 values, got 1 x 2"):
        similarity_figure(["a", "b"], [[1, 2]], title="t", unit="u")
    with pytest.raises(DataError, match="rising"):
        similarity_figure(["a"], [[1]], title="t", unit="u", limits=(1.0, 0.0))
