"""A report as headings, sentences, tables and pictures, the same for every format it is written in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.job_report.facts import Facts

SCALARS = (
    ("average_accuracy", "average accuracy", "mean over tasks of the last row; higher is better"),
    ("forgetting", "forgetting", "mean drop from each task's best score; lower is better"),
    ("bwt", "backward transfer (BWT)", "mean change since each task was trained; higher is better"),
    ("fwt", "forward transfer (FWT)", "mean gain before each task was trained; higher is better"),
    ("learning_accuracy", "learning accuracy", "mean score right after training; higher is better"),
)
TASK_FACTS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("evaluation rows", lambda task: task["eval_dataset"]["sha256"]),
    ("training rows", lambda task: task["dataset"]["sha256"]),
    ("training steps", lambda task: task["steps"]),
    ("training of single tasks", lambda task: task["training"]),
)
"""What a comparison of two jobs looks at, beside their configurations."""
SHOWN_LOST_ROWS = 12


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    """Text that keeps its lines."""

    text: str


@dataclass(frozen=True)
class Picture:
    """Where a picture stands; formats without pictures leave it out."""

    name: str


Block = str | Table | Code | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    heading: str
    blocks: Sequence[Block]


def title(facts: Facts) -> str:
    """Return the report's title."""
    return f"Adapter {facts['adapter']}, job {facts['job_id']}"


def sections(facts: Facts, baseline: Facts | None = None) -> list[Section]:
    """Arrange the facts; with a baseline its scores stand beside the job's own."""
    found = [
        Section("Summary", [summary(facts)]),
        Section("What was learnt and forgotten", _accuracy(facts)),
        Section("General ability", _general(facts)),
        Section("Training", _training(facts)),
        Section("Costs", _costs(facts)),
        Section("Tasks and data", [_tasks(facts)]),
        Section("Lineage", [_lineage(facts)]),
        Section("Configuration", [Code(json.dumps(facts["configuration"], indent=1, sort_keys=True))]),
        Section("Environment", [_environments(facts)]),
    ]
    if baseline is not None:
        found.insert(2, Section("Comparison with the baseline", _comparison(facts, baseline)))
    return found


def summary(facts: Facts) -> str:
    """Say in two sentences how the job went."""
    accuracy, names = facts["accuracy"], facts["accuracy"]["tasks"]
    planned = facts["num_planned_tasks"]
    of_all = f" of {planned}" if planned > len(names) else ""
    words = (
        f"{len(names)}{of_all} task{'s' if planned > 1 else ''} trained; v{len(names)} is the newest version."
    )
    words += f" Average accuracy {_with_interval(accuracy, 'average_accuracy')}"
    if accuracy["forgetting"] is not None:
        words += f", forgetting {_with_interval(accuracy, 'forgetting')}"
    words += f" ({facts['configuration']['evaluation']['metric']})."
    if facts["general"]:
        first, last = facts["general"][0], facts["general"][-1]
        words += (
            f" General ability changed by {_percent(last['after'] / first['base'] - 1)} since the base model."
        )
    return words


def _accuracy(facts: Facts) -> list[Block]:
    accuracy = facts["accuracy"]
    rows = []
    if any(score is not None for score in accuracy["base_scores"]):
        rows.append(["(untrained)", *map(number, accuracy["base_scores"])])
    rows += [
        [name, *map(number, row)] for name, row in zip(accuracy["tasks"], accuracy["matrix"], strict=True)
    ]
    scalars = [[words, _with_interval(accuracy, key), note] for key, words, note in SCALARS]
    blocks: list[Block] = [
        "Score on each task (columns) after training each task (rows), between 0 and 1.",
        Picture("matrix"),
        Table(["after training", *accuracy["tasks"]], rows),
        f"Every task counts the same. {_about_intervals(accuracy)}",
        Table(["figure", "value", "meaning"], scalars),
        Picture("forgetting"),
        Picture("curves"),
    ]
    lost = [[task, str(len(found)), _some_rows(found)] for task, found in facts["lost_rows"].items() if found]
    if lost:
        blocks.append("Rows that were right after their task's training and are wrong now, from 0:")
        blocks.append(Table(["task", "lost rows", "which"], lost))
    elif facts["lost_rows"]:
        blocks.append("No evaluation row that was right after its task's training is wrong now.")
    return blocks


def _about_intervals(accuracy: Mapping[str, Any]) -> str:
    if any(accuracy["intervals_95"].values()):
        return "In brackets: 95 % intervals from resampling the evaluation rows."
    return "There are no intervals: each task needs at least two evaluation rows."


def _some_rows(rows: Sequence[int]) -> str:
    more = len(rows) - SHOWN_LOST_ROWS
    shown = ", ".join(map(str, rows[:SHOWN_LOST_ROWS]))
    return f"{shown} and {more} more" if more > 0 else shown


def _comparison(facts: Facts, baseline: Facts) -> list[Block]:
    mine, other = facts["accuracy"], baseline["accuracy"]
    metrics = [found["configuration"]["evaluation"]["metric"] for found in (facts, baseline)]
    rows = []
    for key, words, _ in SCALARS:
        values = (mine[key], other[key])
        difference = None if None in values or metrics[0] != metrics[1] else values[0] - values[1]
        rows.append([words, _with_interval(mine, key), _with_interval(other, key), signed(difference)])
    blocks: list[Block] = [
        Table(["figure", facts["job_id"], f"baseline {baseline['job_id']}", "difference"], rows)
    ]
    if metrics[0] != metrics[1]:
        blocks.append(f"No difference is taken between scores by {metrics[0]} and by {metrics[1]}.")
    different = _differences(facts, baseline)
    if different:
        blocks.append(f"The two jobs differ in more than their scores: {'; '.join(different)}.")
    return blocks


def _differences(facts: Facts, baseline: Facts) -> list[str]:
    """Say what makes a comparison of the scores unfair or needs to be known about it."""
    found = []
    if facts["accuracy"]["tasks"] != baseline["accuracy"]["tasks"]:
        found.append(f"tasks ({', '.join(baseline['accuracy']['tasks'])} in the baseline)")
    tasks = facts["tasks"], baseline["tasks"]
    for words, value in TASK_FACTS:
        if [value(task) for task in tasks[0]] != [value(task) for task in tasks[1]]:
            found.append(words)
    mine, other = facts["configuration"], baseline["configuration"]
    found += [name.replace("_", " ") for name in mine if mine[name] != other[name]]
    return found


def _general(facts: Facts) -> list[Block]:
    if not facts["general"]:
        return ["Not measured: the job's evaluation.general is null."]
    first = facts["general"][0]
    rows = [
        [g["task"], *(number(1 / g[when], 2) for when in ("before", "after")), _change(g)]
        for g in facts["general"]
    ]
    return [
        f"Perplexity on {first['num_rows']} rows of the set {first['dataset']!r} before and after each task; "
        f"the base model's is {number(1 / first['base'], 2)}. The change is that of 1/perplexity: "
        "below zero means that general ability was lost.",
        Picture("general"),
        Table(["task", "before", "after", "change"], rows),
    ]


def _change(general: Mapping[str, Any]) -> str:
    interval = general["relative_drop_interval_95"]
    brackets = f" [{_percent(-interval[1])}, {_percent(-interval[0])}]" if interval else ""
    return _percent(-general["relative_drop"]) + brackets


def _training(facts: Facts) -> list[Block]:
    counts = ("num_steps", "label_tokens", "total_tokens", "replay_tokens")
    rows = [
        [task, *(f"{found.get(name, 0):.0f}" for name in counts), number(found.get("final_loss"))]
        for task, found in facts["training"].items()
    ]
    heads = ["task", "steps", "label tokens", "all tokens", "of them replayed", "final loss (nats/token)"]
    blocks: list[Block] = [Picture("loss"), Table(heads, rows)]
    figures = [
        [task, name, "-" if value is None else f"{value:.6g}"]
        for task, found in facts["strategy_figures"].items()
        for name, value in sorted(found.items())
    ]
    if figures:
        blocks += ["What the strategies report:", Table(["task", "figure", "value"], figures)]
    return blocks


def _costs(facts: Facts) -> list[Block]:
    heads = ["task", "training (s)", "strategy (s)", "evaluation (s)", "all (s)"]
    parts = {task: seconds_of(found) for task, found in facts["costs_s"].items()}
    rows = [
        [task, *(f"{s:.1f}" for s in (*found.values(), sum(found.values())))] for task, found in parts.items()
    ]
    totals = [sum(found[name] for found in parts.values()) for name in ("training", "strategy", "evaluation")]
    rows.append(["all", *(f"{seconds:.1f}" for seconds in (*totals, sum(totals)))])
    return [Picture("costs"), Table(heads, rows)]


def seconds_of(costs: Mapping[str, float | None]) -> dict[str, float]:
    """Split a task's wall time: the strategy's part is taken out of the training's."""
    train, strategy, evaluate = (costs.get(name) or 0.0 for name in ("train_s", "strategy_s", "evaluate_s"))
    return {"training": train - strategy, "strategy": strategy, "evaluation": evaluate}


def _tasks(facts: Facts) -> Table:
    rows = []
    for task in facts["tasks"]:
        for use in ("dataset", "eval_dataset"):
            data = task[use]
            words = "training" if use == "dataset" else "evaluation"
            rows.append([task["name"], words, data["id"], str(data["num_rows"]), data["sha256"]])
    return Table(["task", "use", "data set", "rows", "sha256"], rows)


def _lineage(facts: Facts) -> Table:
    rows = [
        [
            f"v{entry['version']}",
            entry["task"],
            entry["run_id"],
            str(entry["attempt"]),
            entry["adapter_sha256"] or "",
            entry["code_version"],
            entry["created_at"][:19],
        ]
        for entry in facts["lineage"]
    ]
    return Table(["version", "task", "run", "attempt", "adapter sha256", "cl-peft", "created"], rows)


def _environments(facts: Facts) -> Table:
    rows = [
        [", ".join(entry["tasks"]), name, value]
        for entry in facts["environments"]
        for name, value in sorted(entry["environment"].items())
        if value
    ]
    return Table(["tasks", "what", "value"], rows)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number; a missing one is a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Write a difference with its sign."""
    return "-" if value is None else f"{value:+.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _with_interval(accuracy: Mapping[str, Any], key: str) -> str:
    interval = accuracy["intervals_95"].get(key)
    brackets = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return number(accuracy[key]) + brackets
