"""General ability: how well a model predicts text that no task is about, and how much training cost of it."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from clcore.engine.errors import DataError
from clcore.evaluation.cache import Stored
from clcore.evaluation.questions import Rows
from clcore.evaluation.runner import Evaluation, evaluate

GENERAL_NAME = "default"
"""Name of the text set that comes with the project."""

Scores = float | Mapping[str, float]
"""The score on one general set, or name of a set -> score."""


def general_rows() -> list[dict[str, str]]:
    """Return the project's own 100 texts as rows {"text": str}.

    English, of 30 to 60 tokens each: knowledge, instructions, science, dialogue, stories, code, arithmetic.
    """
    return [json.loads(line) for line in _text().splitlines()]


def general_sha256() -> str:
    """Name the texts."""
    return hashlib.sha256(_text().encode()).hexdigest()


def evaluate_general(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    *,
    max_length: int,
    batch_size: int = 16,
    with_adapter: bool = True,
    stored: Stored | None = None,
    on_batch: Callable[[int], None] = lambda done_rows: None,  # noqa: ARG005
) -> Evaluation:
    """Score general ability on rows by perplexity: the score of the set is 1/perplexity, in 0..1.

    rows: this process's share, (number, row); a row is {"text"}, of which the first max_length tokens count,
    or prompt and completion, or messages. Raises what evaluate raises.
    """
    return evaluate(
        model,
        tokenizer,
        rows,
        "perplexity",
        max_length=max_length,
        batch_size=batch_size,
        with_adapter=with_adapter,
        stored=stored,
        on_batch=on_batch,
    )


def general_delta(before: Scores, after: Scores) -> float:
    """Return the mean over general sets of after - before; negative: general ability was lost."""
    pairs = _pairs(before, after)
    return sum(new - old for old, new in pairs) / len(pairs)


def relative_drop(before: Scores, after: Scores) -> float:
    """Return the mean over general sets of (before - after) / before; positive: general ability was lost.

    1/perplexity is small, so its differences are too; the share that was lost does not depend on its size.
    Raises DataError for a score before that is not positive.
    """
    pairs = _pairs(before, after)
    if min(old for old, _ in pairs) <= 0:
        raise DataError(f"a relative drop needs positive scores before, got {before}")
    return sum((old - new) / old for old, new in pairs) / len(pairs)


def _pairs(before: Scores, after: Scores) -> list[tuple[float, float]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if set(before) != set(after) or not before:
            raise DataError(f"scores of the same sets are needed, got {sorted(before)} and {sorted(after)}")
        return [(before[name], after[name]) for name in before]
    if isinstance(before, Mapping) or isinstance(after, Mapping):
        raise DataError("scores before and after must both be numbers or both be mappings")
    return [(before, after)]


@functools.cache
def _text() -> str:
    return importlib.resources.files(__package__).joinpath("general_text.jsonl").read_text(encoding="utf-8")
