"""Write a report as JSON, Markdown or one HTML page that opens without a network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from service.job_report.document import Block, Code, Picture, Section, Table, sections, title
from service.job_report.facts import Facts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_NUMBER = re.compile(r"-|[-+]?\d+(\.\d+)?(e[-+]?\d+)?( %)?( \[.*\])?")
"""A number as the document writes it, with its interval if there is one; a dash is none."""

ReportFormat = Literal["html", "md", "json"]


def as_json(facts: Facts, baseline: Facts | None = None) -> str:
    """Write all facts; a baseline's stand under "baseline"."""
    whole = facts if baseline is None else {**facts, "baseline": baseline}
    return json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n"


def as_markdown(facts: Facts, baseline: Facts | None = None) -> str:
    """Write text with tables, without pictures."""
    parts = [f"# {_plain(title(facts))}"]
    for section in sections(facts, baseline):
        parts.append(f"## {section.heading}")
        parts += [_markdown(block) for block in section.blocks if not isinstance(block, Picture)]
    return "\n\n".join(parts) + "\n"


def as_html(facts: Facts, baseline: Facts | None = None) -> str:
    """Write one page with text, tables and pictures."""
    from clcore.evaluation.dashboard import dashboard_html  # plotly, for those who want pictures

    parts: list[tuple[str, str, Figure | None]] = []
    for section in sections(facts, baseline):
        parts += _html_parts(section, facts)
    return dashboard_html(parts, title=title(facts))


WRITERS: dict[ReportFormat, Callable[[Facts, Facts | None], str]] = {
    "html": as_html,
    "md": as_markdown,
    "json": as_json,
}
MEDIA_TYPES: dict[ReportFormat, str] = {
    "html": "text/html; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "json": "application/json",
}


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        lines = [block.heads, ["---"] * len(block.heads), *block.rows]
        return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)
    if isinstance(block, Code):
        return f"```json\n{block.text}\n```"
    return _plain(str(block))


def _plain(text: str) -> str:
    """Keep a cell in its column and on its line."""
    return text.replace("|", "\\|").replace("\n", " ")


def _html_parts(section: Section, facts: Facts) -> list[tuple[str, str, Figure | None]]:
    """Cut a section where a picture stands: a part is text with at most one picture under it."""
    from service.job_report.pictures import draw

    parts: list[tuple[str, str, Figure | None]] = []
    heading, text = section.heading, ""
    for block in section.blocks:
        if isinstance(block, Picture):
            figure = draw(block.name, facts)
            if figure is not None:
                parts.append((heading, text, figure))
                heading, text = "", ""
        else:
            text += _html(block)
    if text or heading:
        parts.append((heading, text, None))
    return parts


def _html(block: Block) -> str:
    if isinstance(block, Table):
        kinds = [_kind([row[i] for row in block.rows]) for i in range(len(block.heads))]
        head, *rows = (_html_row(line, kinds, tag) for line, tag in _tagged(block))
        body = "".join(rows)
        table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        return f'<div class="wide">{table}</div>'
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    return f"<p>{html.escape(str(block))}</p>"


def _tagged(table: Table) -> list[tuple[Sequence[str], str]]:
    return [(table.heads, "th"), *((row, "td") for row in table.rows)]


def _html_row(cells: Sequence[str], kinds: Sequence[str], tag: str) -> str:
    pairs = zip(cells, kinds, strict=True)
    return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in pairs) + "</tr>"


def _kind(column: Sequence[str]) -> str:
    """Numbers stand on the right, everything else on the left."""
    return "" if all(_NUMBER.fullmatch(cell) for cell in column) else ' class="text"'
