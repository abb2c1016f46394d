"""Figures and text as one HTML file that opens without a network.

The file holds plotly.js once (4.8 MB), every figure as data, and no address that a browser loads. The same
input gives the same bytes. On a narrow screen legends go below the pictures, and a picture that needs more
width than there is scrolls inside its own box.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

Section = tuple[str, str, "go.Figure | None"]
"""Heading (plain text), text (HTML), figure or None."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 76rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 Arial, Helvetica, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.2rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid #d0d0d0; }
p, li { max-width: 46rem; }
nav ul { columns: 18rem; padding-left: 1.2rem; margin: 0; }
a { color: #00528f; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d0d0d0; padding: .35rem .7rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .text { text-align: left; }
.wide th, .wide td { overflow-wrap: normal; white-space: nowrap; }
thead th { border-bottom: 2px solid #1a1a1a; }
caption { text-align: left; font-weight: bold; padding-bottom: .3rem; }
code, pre { font-family: "DejaVu Sans Mono", Consolas, monospace; font-size: .88em; }
pre { overflow-x: auto; background: #f4f4f4; padding: .7rem; }
figure { margin: .8rem 0 0; }
figcaption strong { display: block; }
figcaption span { color: #4d4d4d; font-size: .9rem; }
@media (max-width: 640px) { body { padding: .6rem .7rem 2rem; } h1 { font-size: 1.35rem; }
  th, td { padding: .3rem .4rem; } }
@media print { nav { display: none; } figure { break-inside: avoid; } body { max-width: none; } }
"""

SCRIPT = """
const narrow = window.innerWidth <= 640;
const config = {responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
for (const picture of JSON.parse(document.getElementById("figures").textContent)) {
  const box = document.getElementById(picture.id), layout = picture.layout;
  let width = picture.width;
  if (narrow && picture.legend > 0) {
    layout.legend = {...layout.legend, orientation: "h", x: 0, xref: "container", xanchor: "left",
      y: 0, yref: "container", yanchor: "bottom"};
    layout.height += 22 * (picture.legend + 1);
    width -= 220;
  }
  box.style.height = layout.height + "px";
  box.style.minWidth = width + "px";
  Plotly.newPlot(box, picture.data, layout, config);
}
"""


def dashboard_html(sections: Sequence[Section], *, title: str) -> str:
    """Return one self-contained HTML page.

    sections: (heading, text, figure or None); without a heading a section goes on with the one before. title
    and heading are plain text and are escaped here; text is HTML and stands as it is: who writes it escapes
    what came from others (html.escape). A figure's title and the line below become the caption of its
    picture. Tables in text get their look here: a cell of class "text" stands on the left; put a wide
    table into <div class="wide">, which scrolls.
    """
    links, bodies, pictures = [], [], []
    for i, (heading, text, figure) in enumerate(sections, start=1):
        parts = [f'<section id="section-{i}">', text]
        if heading:
            links.append(f'<li><a href="#section-{i}">{html.escape(heading)}</a></li>')
            parts.insert(1, f"<h2>{html.escape(heading)}</h2>")
        if figure is not None:
            caption, picture = _picture(figure, f"figure-{i}", heading)
            parts.append(
                f'<figure><figcaption>{caption}</figcaption><div class="wide">'
                f'<div id="figure-{i}" class="picture"></div></div></figure>'
            )
            pictures.append(picture)
        bodies.append("\n".join([*(part for part in parts if part), "</section>"]))
    contents = f"<nav><ul>\n{chr(10).join(links)}\n</ul></nav>" if len(links) > 3 else ""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{html.escape(title)}</h1>",
            contents,
            *bodies,
            *(_scripts(pictures) if pictures else []),
            "</body>",
            "</html>",
            "",
        ]
    )


def _scripts(pictures: Sequence[dict[str, Any]]) -> list[str]:
    # "<" written as an escape: no name inside a figure can end the script element.
    data = json.dumps(pictures, sort_keys=True, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return [
        f'<script type="application/json" id="figures">{data}</script>',
        f"<script>{get_plotlyjs()}</script>",
        f"<script>{SCRIPT}</script>",
    ]


def _picture(figure: go.Figure, name: str, heading: str) -> tuple[str, dict[str, Any]]:
    """Return a figure's caption as HTML, and what the page's script needs to draw it."""
    drawn = json.loads(figure.to_json())
    layout = drawn["layout"]
    title = layout.pop("title", {})
    strong, under = _plain(title.get("text", "")), _plain(title.get("subtitle", {}).get("text", ""))
    caption = f"<strong>{html.escape(strong)}</strong>" if strong not in ("", heading) else ""
    caption += f"<span>{html.escape(under)}</span>" if under else ""
    layout.setdefault("height", 450)
    margin = layout.setdefault("margin", {})
    if title:
        # Room for a panel's heading stays; the title itself is the caption.
        layout["height"] -= max(0, margin.get("t", 0) - 36)
        margin["t"] = 36
    meta = layout.get("meta") or {}
    width = meta.get("least_width", 0) if isinstance(meta, dict) else 0
    entries = sum(1 for trace in drawn["data"] if trace.get("name") and trace.get("showlegend", True))
    picture = {"id": name, "data": drawn["data"], "layout": layout, "legend": entries, "width": width}
    return caption, picture


def _plain(text: str) -> str:
    """Return Plotly's text without its markup."""
    return html.unescape(re.sub(r"<[^>]*>", " ", text)).strip()
