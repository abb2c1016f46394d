"""What the overhead's figures are held against, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import target
from benchmarks.stats import Ratio

STEP_LIMITS = {
    "ewc": 1.05,
    "ewc_online": 1.05,
    "si": 1.05,
    "orthogonal_lora": 1.10,
    "adaptive_svd": 1.10,
    "experience_replay": 1.02,
    "prioritized_replay": 1.02,
}
"""Strategy -> limit of its step, in plain steps; for replay per token."""
FLAT_LIMIT = 1.03
FLAT = ("orthogonal_lora", "adaptive_svd")
FISHER_LIMIT = 1.3
FISHER = ("ewc", "ewc_online")
COPIES_LIMIT = 3.0
COPIES = ("ewc", "ewc_online", "si")


def targets_of(rows: Sequence[Mapping[str, Any]], fisher: Ratio) -> list[dict[str, Any]]:
    """Hold what was measured against what the README promises."""
    targets = [
        target(
            "Fisher pass, in plain forward and backward passes over the same rows",
            fisher.median,
            f"<= {FISHER_LIMIT}",
            fisher.median <= FISHER_LIMIT,
        )
    ]
    for row in rows:
        label, steps = row["what"], row["steps"]
        name = label.split(":")[0]
        first, last = min(steps, key=int), max(steps, key=int)
        if name in STEP_LIMITS:
            is_replay = steps[last]["token_ratio"] > 1
            ratio = steps[last]["ratio_per_token" if is_replay else "ratio"]
            what = f"{label}: step with {last} earlier tasks, in plain steps" + " per token" * is_replay
            limit = STEP_LIMITS[name]
            targets.append(target(what, ratio, f"<= {limit}", ratio <= limit))
        if name in FISHER:
            passes = row["once_per_task"]["after_in_passes"]
            what = f"{label}: end of a task, in plain forward and backward passes over its rows"
            targets.append(target(what, passes, f"<= {FISHER_LIMIT}", passes <= FISHER_LIMIT))
        if name in FLAT:
            growth = steps[last]["ratio"] / steps[first]["ratio"]
            what = f"{label}: ratio with {last} earlier tasks to that with {first}"
            targets.append(target(what, growth, f"<= {FLAT_LIMIT}", growth <= FLAT_LIMIT))
        if name in COPIES and "space=" not in label:
            copies = row["copies"]
            what = f"{label}: bytes held, in copies of the trainable parameters"
            targets.append(target(what, copies, f"<= {COPIES_LIMIT:.0f}", copies <= COPIES_LIMIT))
    return targets


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as Markdown."""
    counts = list(next(iter(rows))["steps"])
    heads = [
        "strategy",
        *(f"step, {count} earlier" for count in counts),
        "tokens",
        "per token",
        "after task, in passes",
        "copies held",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if not row["steps"]:
            lines.append(f"| {row['what']} | {row['not_measured']} |" + " |" * (len(heads) - 2))
            continue
        last = row["steps"][counts[-1]]
        cells = [
            row["what"],
            *(f"{row['steps'][c]['ratio']:.3f}" if c in row["steps"] else "" for c in counts),
            f"{last['token_ratio']:.2f}",
            f"{last['ratio_per_token']:.3f}",
            f"{row['once_per_task']['after_in_passes']:.2f}" if "config" in row else "",
            f"{row['copies']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
