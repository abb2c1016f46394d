"""Figures as image files, without a network: Kaleido draws them in a browser of this machine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from clcore.engine.errors import ConfigError, ExportError

FORMATS = ("png", "svg", "pdf", "webp", "jpeg")
WIDTH = 900
"""Width of an image in layout pixels, unless the figure needs more."""

NO_BROWSER = (
    "images need Chrome or Chromium, and none was found. Install one (Debian and Ubuntu: apt-get install "
    "chromium; elsewhere: the command kaleido_get_chrome, which downloads it), or set BROWSER_PATH to it. "
    "HTML needs no browser to be written"
)


def image_bytes(
    figure: go.Figure,
    kind: str = "png",
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float = 2.0,
) -> bytes:
    """Return a figure as an image.

    kind: one of FORMATS. width and height in layout pixels; None takes the figure's own height, and the
    greater of WIDTH and the least width at which the figure can be read. scale: pixels per layout pixel
    (png, webp, jpeg).

    Raises ConfigError for another kind or a size that is not positive, ExportError if no browser is found or
    it cannot draw. Cost: about 2 s to start the browser.
    """
    kaleido = importlib.import_module("kaleido")
    options = _options(figure, kind, width, height, scale)
    try:
        found = kaleido.calc_fig_sync(figure.to_dict(), opts=options, kopts={"mathjax": False})
    except Exception as error:
        raise _export_error(error) from error
    return bytes(found)


def write_image(
    figure: go.Figure,
    path: str | Path,
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float = 2.0,
) -> Path:
    """Write a figure as an image; the ending of path says which of FORMATS. As image_bytes otherwise."""
    path = Path(path)
    check_folder(path)
    path.write_bytes(image_bytes(figure, _kind(path), width=width, height=height, scale=scale))
    return path


def write_images(figures: Mapping[str | Path, go.Figure], *, scale: float = 2.0) -> list[Path]:
    """Write several figures, path -> figure, with one start of the browser. As write_image otherwise."""
    kaleido = importlib.import_module("kaleido")
    paths = [Path(path) for path in figures]
    jobs = [
        {
            "fig": figure.to_dict(),
            "path": path,
            "opts": _options(figure, _kind(path), None, None, scale),
        }
        for path, figure in zip(paths, figures.values(), strict=True)
    ]
    for path in paths:
        check_folder(path)
    try:
        kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
    except Exception as error:
        raise _export_error(error) from error
    return paths


def check_folder(path: Path) -> None:
    """Raise ConfigError unless the folder that path is to be written to is there."""
    if not path.parent.is_dir():
        raise ConfigError(f"no folder {str(path.parent)!r} to write {path.name!r} to")


def _kind(path: Path) -> str:
    return path.suffix.lstrip(".").lower().replace("jpg", "jpeg")


def _options(
    figure: go.Figure, kind: str, width: int | None, height: int | None, scale: float
) -> dict[str, Any]:
    if kind not in FORMATS:
        raise ConfigError(f"an image must be one of {', '.join(FORMATS)}, got {kind!r}")
    meta = figure.layout.meta if isinstance(figure.layout.meta, dict) else {}
    width = width if width is not None else figure.layout.width or max(WIDTH, meta.get("least_width", 0))
    height = height if height is not None else figure.layout.height or 500
    for name, value in (("width", width), ("height", height), ("scale", scale)):
        if not value > 0:
            raise ConfigError(f"{name} must be positive, got {value}")
    return {"format": kind, "width": width, "height": height, "scale": scale}


def _export_error(error: Exception) -> ExportError:
    if type(error).__name__ == "ChromeNotFoundError":
        return ExportError(NO_BROWSER)
    return ExportError(f"the browser could not draw the figure: {type(error).__name__}: {error}")
