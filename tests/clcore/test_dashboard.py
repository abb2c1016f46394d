"""One HTML file: what it holds, that it opens in a real browser without a network, and that it repeats."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from plotly.offline import get_plotlyjs

from clcore.engine.errors import DataError
from clcore.evaluation.eval_visualization import (
    accuracy_matrix_figure,
    create_visualization_dashboard,
    dashboard_html,
    learning_curves_figure,
)
from tests.clcore.browser import open_page
from tests.clcore.tiny import tiny_llama

FIGURE = accuracy_matrix_figure(["colours", "dates"], [[0.9, 0.1], [0.6, 0.8]])
SNAPSHOT = {
    "base_model.model.model.layers.0.q.lora_A.default.weight": torch.eye(2, 3),
    "base_model.model.model.layers.0.q.lora_B.default.weight": torch.eye(2, 2),
}
SNAPSHOTS = {task: {n: (i + 1) * v for n, v in SNAPSHOT.items()} for i, task in enumerate("abc")}
PROGRAM = """
import hashlib, torch
from tests.clcore.test_dashboard import whole_dashboard
print(hashlib.sha256(whole_dashboard().encode()).hexdigest())
"""


def whole_dashboard(output: Path | None = None) -> str:
    return create_visualization_dashboard(
        tiny_llama(),
        ["a", "b", "c"],
        SNAPSHOTS,
        {"a": {"model.layers.0.q.weight": torch.ones(2)}},
        matrix=[[0.9, 0.1, 0.0], [0.7, 0.8, 0.1], [0.6, 0.7, None]],
        base_scores=[0.0, 0.1, 0.0],
        output=output,
    )


def test_a_page_holds_plotly_once_and_no_address_beside_it() -> None:
    page = dashboard_html([("One", "<p>x</p>", FIGURE), ("Two", "", FIGURE)], title="Report")
    assert page.count(get_plotlyjs()) == 1
    rest = page.replace(get_plotlyjs(), "")
    assert "//" not in rest
    assert re.findall(r'(?:src|href)="([^"]*)"', rest) == ["data:,"]


def test_a_page_without_figures_holds_no_script() -> None:
    page = dashboard_html([("One", "<p>x</p>", None)], title="Report")
    assert "<script" not in page
    assert "<p>x</p>" in page


def test_titles_and_headings_are_escaped_and_the_text_stands_as_it_is() -> None:
    page = dashboard_html([("<b>&", "<b>bold</b>", None)], title="<i>")
    assert "<title>&lt;i&gt;</title>" in page
    assert "<h2>&lt;b&gt;&amp;</h2>" in page
    assert "<b>bold</b>" in page


def test_the_caption_is_the_title_of_the_figure_unless_the_heading_says_it() -> None:
    figure = learning_curves_figure({"a": [(1, 2.0)]}, title="Loss < 3 " + "of a long run " * 8)
    page = dashboard_html([("One", "", figure)], title="t")
    assert f"<strong>Loss &lt; 3 {'of a long run ' * 8}".strip() in page
    figure.layout.title.text = "One"
    assert "<strong>" not in dashboard_html([("One", "", figure)], title="t").replace(get_plotlyjs(), "")


def test_the_same_input_gives_the_same_bytes_in_another_process() -> None:
    here = hashlib.sha256(whole_dashboard().encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True, env=environment)
    assert done.stdout.split()[-1] == here


def test_the_reader_of_the_console_sees_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>nothing.at.all()</script>")
    with pytest.raises(AssertionError, match="Uncaught"):
        open_page(page)
    page.write_text('<p>x</p><script src="https://example.com/x.js"></script><script>console.log(1)</script>')
    with pytest.raises(AssertionError, match="CONSOLE"):
        open_page(page)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_dashboard_draws_every_figure_in_a_browser_without_a_network(tmp_path: Path, width: int) -> None:
    page = tmp_path / "dashboard.html"
    assert whole_dashboard(page) == page.read_text(encoding="utf-8")
    found = open_page(page, width=width)
    headings = re.findall(r"<h2>(.*?)</h2>", found)
    assert headings == [
        *("Scores", "Forgetting", "Backward transfer", "Adapters", "Way of the adapter"),
        *("Parameter changes", "Ranks", "Importance for a"),
    ]
    assert len(re.findall(r'class="picture js-plotly-plot"', found)) == 8
    assert len(re.findall(r'<g class="hm"|class="heatmaplayer mlayer"><g', found)) >= 4
    words = re.findall(r"<text[^>]*>([^<]*)</text>", found)
    assert {"scored on task", "after training task", "mean (BWT)", "0.90", "-0.30"} <= set(words)


def test_names_that_look_like_markup_are_drawn_as_text_and_run_nothing(tmp_path: Path) -> None:
    name = "</script><script>document.title='broken'</script>"
    figure = accuracy_matrix_figure([name], [[0.5]], title=name)
    page = tmp_path / "page.html"
    page.write_text(dashboard_html([(name, "", figure)], title="whole"), encoding="utf-8")
    found = open_page(page)
    assert "<title>whole</title>" in found
    assert len(re.findall(r"js-plotly-plot", found.split("<script", 1)[0])) == 1


def test_a_figure_of_another_make_can_stand_on_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(dashboard_html([("Bar", "", go.Figure(go.Bar(y=[1, 2])))], title="t"), encoding="utf-8")
    assert 'class="picture js-plotly-plot"' in open_page(page)


def test_the_dashboard_says_what_it_lacks() -> None:
    page = create_visualization_dashboard(None, ["a"])
    for lack in (
        "No matrix of scores",
        "needs at least 2 snapshots; 0 were given",
        "no model",
        "No importance",
    ):
        assert lack in page
    assert "<script" not in page
    with pytest.raises(DataError, match="got 'a' twice"):
        create_visualization_dashboard(None, ["a", "a"])


def test_the_call_of_the_original_module_works() -> None:
    page = create_visualization_dashboard(
        model=tiny_llama(), task_order=["a", "b"], model_snapshots={"a": SNAPSHOTS["a"], "b": SNAPSHOTS["b"]}
    )
    assert "Parameter changes" in page
