"""Figures as image files, drawn by a real browser without a network."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from PIL import Image

from clcore.engine.errors import ClError, ConfigError, ExportError
from clcore.evaluation.eval_visualization import (
    accuracy_matrix_figure,
    image_bytes,
    learning_curves_figure,
    write_image,
    write_images,
)
from tests.clcore.browser import browser

MATRIX = accuracy_matrix_figure(["colours", "dates"], [[0.9, 0.1], [0.6, 0.8]], [0.0, 0.0])


def colours(image: Image.Image) -> int:
    return len(image.convert("RGB").getcolors(maxcolors=1 << 24) or [])


def test_a_png_has_the_size_asked_for_and_shows_a_picture(tmp_path: Path) -> None:
    browser()
    path = write_image(MATRIX, tmp_path / "matrix.png", width=700, height=400, scale=1.5)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (1050, 600)
        assert colours(image) > 100
    blank = go.Figure(layout={"template": "none", "xaxis": {"visible": False}, "yaxis": {"visible": False}})
    with Image.open(io.BytesIO(image_bytes(blank))) as image:
        assert colours(image) == 1  # what the count above rules out


def test_an_svg_holds_names_and_scores_as_text(tmp_path: Path) -> None:
    browser()
    path = write_image(MATRIX, tmp_path / "matrix.svg")
    root = ElementTree.parse(path).getroot()
    words = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"colours", "dates", "0.90", "0.60", "scored on task", "score, 0 to 1"} <= words


def test_several_figures_are_written_with_one_browser_at_the_width_that_they_need(tmp_path: Path) -> None:
    browser()
    names = [f"task-{i}" for i in range(30)]
    wide = accuracy_matrix_figure(names, [[0.5] * 30] * 30)
    curves = learning_curves_figure({"a": [(1, 2.0), (2, 1.0)]})
    paths = write_images({tmp_path / "wide.png": wide, tmp_path / "curves.svg": curves}, scale=1)
    assert paths == [tmp_path / "wide.png", tmp_path / "curves.svg"]
    with Image.open(paths[0]) as image:
        assert image.size == (wide.layout.meta["least_width"], wide.layout.height)
        assert image.size[0] > 900
    assert "optimizer updates" in paths[1].read_text()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("figure.gif", {}, "png, svg, pdf, webp, jpeg, got 'gif'"),
        ("figure", {}, "got ''"),
        ("figure.png", {"width": 0}, "width must be positive, got 0"),
        ("figure.png", {"scale": -1.0}, "scale must be positive, got -1.0"),
    ],
)
def test_what_cannot_be_an_image_is_refused_before_a_browser_starts(
    tmp_path: Path, name: str, size: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_image(MATRIX, tmp_path / name, **size)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for write in (lambda path: write_images({path: MATRIX}), lambda path: write_image(MATRIX, path)):
        with pytest.raises(ConfigError, match=r"no folder '.*absent' to write 'matrix.png' to"):
            write(tmp_path / "absent" / "matrix.png")


def test_without_a_browser_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/absent/chrome")
    with pytest.raises(ExportError, match=r"apt-get install chromium.*BROWSER_PATH") as caught:
        image_bytes(MATRIX)
    assert isinstance(caught.value, (ClError, RuntimeError))


def test_a_browser_that_does_not_start_is_an_export_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "chrome"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    with pytest.raises(ExportError, match="could not draw the figure"):
        image_bytes(MATRIX)


def test_figures_and_pages_load_neither_torch_nor_the_exporter() -> None:
    program = (
        "import sys\n"
        "from clcore.evaluation import accuracy_matrix_figure, dashboard_html\n"
        "dashboard_html([('a', '', accuracy_matrix_figure(['a'], [[0.5]]))], title='t')\n"
        "print(sorted({'torch', 'kaleido', 'sklearn', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
