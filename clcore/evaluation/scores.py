"""The score of one task: what a metric returned, and which rows and classes it is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from clcore.engine.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on one task, in 0..1, higher is better."""

    score: float
    num_rows: int | None = None
    """None where neither the metric nor the data set says it."""
    per_example: Mapping[int, float] | None = None
    """Row number -> its score, where the metric returned it."""
    per_class: Mapping[str, float] | None = None
    """Class -> its score, where the metric returned it."""


def task_score(result: Any, *, metric_name: str = "score", num_rows: int | None = None) -> TaskScore:
    """Read what a metric function returned.

    A number; an Evaluation (with score and rows); or a mapping that holds metric_name, or else exactly one
    number, and optionally "per_example" (a list by row, or row -> score) and "per_class" (class -> score).

    Raises DataError for scores that are not in 0..1: NaN, a loss, percentages; ConfigError for a mapping
    without the metric.
    """
    if isinstance(result, Mapping):
        score, rows, classes = (
            _named(result, metric_name),
            result.get("per_example"),
            result.get("per_class"),
        )
        by_row = None if rows is None else rows if isinstance(rows, Mapping) else dict(enumerate(rows))
    elif hasattr(result, "score") and hasattr(result, "rows"):
        score, classes = result.score, None
        by_row = {row.row: row.score for row in result.rows}
    else:
        score, by_row, classes = result, None, None
    per_example = None if by_row is None else {int(row): _unit(x, f"row {row}") for row, x in by_row.items()}
    per_class = None if classes is None else {str(name): _unit(x, str(name)) for name, x in classes.items()}
    return TaskScore(
        score=_unit(score, metric_name),
        num_rows=num_rows if per_example is None else len(per_example),
        per_example=per_example,
        per_class=per_class,
    )


def row_scores(score: TaskScore) -> list[float] | None:
    """Return the scores of rows, by row number, if the task's score is their mean; else None."""
    if not score.per_example:
        return None
    rows = [score.per_example[row] for row in sorted(score.per_example)]
    return rows if math.isclose(sum(rows) / len(rows), score.score, abs_tol=1e-9) else None


def lost_rows(before: TaskScore, now: TaskScore, threshold: float = 1.0) -> list[int]:
    """Return the rows that were right before and are wrong now, ascending; right is score >= threshold.

    Raises DataError without scores per example, or for other rows than before.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
    if before.per_example is None or now.per_example is None:
        raise DataError("lost rows need a metric that returns 'per_example', the score of each row")
    if set(before.per_example) != set(now.per_example):
        raise DataError(
            f"the same rows must be scored each time, got {len(before.per_example)} and then "
            f"{len(now.per_example)} rows, or other row numbers"
        )
    pairs = sorted((row, then, now.per_example[row]) for row, then in before.per_example.items())
    return [row for row, then, score in pairs if then >= threshold > score]


def class_drops(before: TaskScore, now: TaskScore) -> dict[str, float | None]:
    """Return class -> score before - score now; positive: worse. None for a class scored only once.

    Raises DataError without scores per class.
    """
    if before.per_class is None or now.per_class is None:
        raise DataError("drops per class need a metric that returns 'per_class', the score of each class")
    names = list(dict.fromkeys([*before.per_class, *now.per_class]))
    found: dict[str, float | None] = dict.fromkeys(names)
    for name in names:
        if name in before.per_class and name in now.per_class:
            found[name] = before.per_class[name] - now.per_class[name]
    return found


def evaluation_part(dataset: Any, part: str = "eval") -> Any:
    """Return one part of a task's data: {"train": ..., "eval": ...}, or the data set itself for eval.

    Raises ConfigError for a mapping without that part.
    """
    if not isinstance(dataset, Mapping):
        if part == "eval":
            return dataset
        raise ConfigError(f"a task must be a mapping with {part!r}, got {type(dataset).__name__}")
    if part not in dataset:
        raise ConfigError(f"a task's data needs {part!r}, got {', '.join(map(repr, dataset)) or 'nothing'}")
    return dataset[part]


def count_rows(dataset: Iterable[Any]) -> int | None:
    """Return the length of a data set, or None if it has none."""
    return len(dataset) if isinstance(dataset, Sized) else None


def _named(result: Mapping[str, Any], metric_name: str) -> Any:
    if metric_name in result:
        return result[metric_name]
    numbers = [name for name, value in result.items() if _is_number(value)]
    if len(numbers) != 1:
        raise ConfigError(
            f"the metric returned no {metric_name!r} and {len(numbers)} numbers, {numbers}; "
            "say which one is the score with metric_name"
        )
    return result[numbers[0]]


def _is_number(value: Any) -> bool:
    return (
        not isinstance(value, bool | str) and hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    )


def _unit(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{what}: a score must be a number in 0..1, got {value!r}") from None
    if not (math.isfinite(number) and 0 <= number <= 1):
        raise DataError(
            f"{what}: a score must be in 0..1, higher is better, got {number}; a loss has exp(-loss)"
        )
    return number
