"""What a demo found: the report's rows and targets, and the tables at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.report import target

STRATEGY, BASELINE = "ewc + experience_replay", "none"
BUFFER_SHARE = 0.1
"""Rows that replay may keep, as a share of the rows that the first task trains on."""
MAX_DEMO_S = 900.0
MAX_PEAK_GB = 9.0
MAX_FIRST_STEP_S = 45.0
MIN_LEARNING_SHARE = 0.9


@dataclass
class Findings:
    """What a demo measures, as far as it came."""

    phases_s: dict[str, float] = field(default_factory=dict)
    matrices: dict[str, dict[str, Any]] = field(default_factory=dict)
    first_step_s: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)
    adapter: str = ""
    version: int = 0
    buffer_size: int = 0
    num_old_rows: int = 0
    """Rows that the first task trains on: what is old when the second one starts."""
    peak_bytes: int = 0


def targets_of(findings: Findings) -> list[dict[str, Any]]:
    """Return each promised figure with its limit."""
    ours, baseline = findings.matrices[STRATEGY], findings.matrices[BASELINE]
    entries = []
    if ours["forgetting"] is not None:  # with one task nothing can be forgotten
        forgetting = (ours["forgetting"], baseline["forgetting"])
        entries.append(_below("forgetting with the strategy", *forgetting, " (none)", is_strict=True))
    accuracy, other = ours["average_accuracy"], baseline["average_accuracy"]
    entries.append(target("average accuracy", accuracy, f"> {other:.3f} (none)", accuracy > other))
    if baseline["learning_accuracy"]:
        share = ours["learning_accuracy"] / baseline["learning_accuracy"]
        limit, is_ok = f">= {MIN_LEARNING_SHARE}", share >= MIN_LEARNING_SHARE
        entries.append(target("learning accuracy, share of the baseline's", share, limit, is_ok))
    share = findings.buffer_size / findings.num_old_rows
    entries.append(_below("replay buffer, share of the old rows", share, BUFFER_SHARE))
    entries.append(_below("whole demo, s", findings.phases_s["total"], MAX_DEMO_S))
    entries.append(_below("peak memory of the whole system, GB", findings.peak_bytes / 1e9, MAX_PEAK_GB))
    slowest = max(findings.first_step_s.values())
    entries.append(_below("submit to first step, s", slowest, MAX_FIRST_STEP_S))
    return entries


def rows_of(findings: Findings) -> list[dict[str, Any]]:
    """Return what was measured as the report's rows; `row` says what each one is."""
    rows: list[dict[str, Any]] = []
    rows += [{"row": "matrix", "strategy": name, **matrix} for name, matrix in findings.matrices.items()]
    rows.append({"row": "adapter", "name": findings.adapter, "version": findings.version})
    rows += [{"row": "answer", **answer} for answer in findings.answers]
    rows += [{"row": "phase", "phase": name, "s": round(s, 2)} for name, s in findings.phases_s.items()]
    first = findings.first_step_s.items()
    rows += [{"row": "first_step", "strategy": name, "s": round(s, 2)} for name, s in first]
    rows.append({"row": "memory", "peak_bytes": findings.peak_bytes})
    return rows


def show_costs(console: Console, findings: Findings, targets: list[dict[str, Any]]) -> None:
    """Show seconds per phase and whether the targets hold."""
    phases = Table("phase", "s", box=None)
    phases.columns[1].justify = "right"
    for name, seconds in findings.phases_s.items():
        phases.add_row(name, f"{seconds:.1f}")
    console.print(phases)
    table = Table("", "target", "value", "limit")
    table.columns[2].justify = "right"
    for entry in targets:
        mark = "[green]✓[/]" if entry["ok"] else "[red]✗[/]"
        table.add_row(mark, entry["what"], f"{entry['value']:.3g}", entry["limit"])
    console.print(table)


def answers_table(answers: list[dict[str, str]]) -> Table:
    """Show what was asked and answered."""
    table = Table("", "task", "prompt", "answer", "reference", show_lines=True)
    for answer in answers:
        prompt = answer["prompt"] if len(answer["prompt"]) <= 200 else f"{answer['prompt'][:200]}..."
        is_right = answer["answer"] == answer["reference"]
        mark = "[green]✓[/]" if is_right else "[red]✗[/]"
        texts = (answer["task"], prompt, answer["answer"], answer["reference"])
        table.add_row(mark, *(escape(text) for text in texts))
    return table


def _below(
    what: str, value: float, limit: float, note: str = "", *, is_strict: bool = False
) -> dict[str, Any]:
    text = f"{'<' if is_strict else '<='} {limit:.3g}{note}"
    return target(what, value, text, value < limit if is_strict else value <= limit)
