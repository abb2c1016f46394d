"""What the terminal shows: one line per case while it is played, and a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tests.chaos.cases import Case


class Board:
    """A table of all cases, redrawn as they are played; plain lines where the output is no terminal."""

    def __init__(self, runs: Sequence[Sequence[Case]], done: Mapping[str, Mapping[str, Any]]) -> None:
        self._console = Console()
        self._start = time.monotonic()
        self._order = [case.id for run in runs for case in run]
        self._lines: dict[str, tuple[str, str]] = dict.fromkeys(self._order, ("", "waits"))
        self._now = ""
        for name, row in done.items():
            self._lines[name] = _verdict(row)
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """Show what the stand does."""
        self._now = text
        self._print(text)

    def case(self, case: Case, text: str) -> None:
        """Show where a case is."""
        self._lines[case.id] = ("", text)
        self._print(f"{case.id}: {text}")

    def finished(self, row: Mapping[str, Any]) -> None:
        """Show how a case went."""
        self._lines[row["case"]] = _verdict(row)
        self._print(f"{row['case']}: {_verdict(row)[1]} {'; '.join(row['problems'])}")

    def _print(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(
                f"{time.monotonic() - self._start:7.1f} s  {text}", highlight=False, soft_wrap=True
            )

    def _draw(self) -> Group:
        table = Table("case", "recovery", "state", box=None, pad_edge=False)
        # what is long done makes room for what comes
        height = max(5, self._console.height - 5)
        names = [name for name in self._order if self._lines[name][1] != "waits"][-height:]
        for name in names:
            recovery, state = self._lines[name]
            style = "green" if state == "holds" else "red" if state == "FAILS" else ""
            table.add_row(name, recovery, Text(state, style=style))
        num_done = sum(state in ("holds", "FAILS", "skipped") for _, state in self._lines.values())
        head = f"{num_done} of {len(self._order)} cases, {time.monotonic() - self._start:.0f} s   {self._now}"
        return Group(Text(head, style="bold"), table)


def print_summary(rows: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
    """Print the failed cases, the medians per part and the targets."""
    console = Console()
    for row in rows:
        if not row["ok"]:
            said = "; ".join(row["problems"])
            console.print(
                f"[red]{'skipped' if row['skipped'] else 'FAILS'}[/red] {row['case']}: {said}", soft_wrap=True
            )
    table = Table("target", "measured", "limit", "", box=None, pad_edge=False)
    for entry in targets:
        value = "" if entry["value"] is None else f"{entry['value']:g}"
        table.add_row(entry["what"], value, entry["limit"], "holds" if entry["ok"] else "[red]FAILS[/red]")
    console.print(table)


def _verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    recovery = "" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
    return recovery, "holds" if row["ok"] else "skipped" if row["skipped"] else "FAILS"
