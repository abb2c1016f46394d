"""Score a model on rows: batches of similar length, outputs stored as they come, scores from the outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from clcore.engine.errors import ConfigError, DataError, TrainingDivergedError
from clcore.evaluation import bootstrap
from clcore.evaluation.answering import drafts_from, greedy_answers
from clcore.evaluation.batches import split
from clcore.evaluation.cache import Output, Stored
from clcore.evaluation.kv_batch import Prefix, pad_token, shared_prefix
from clcore.evaluation.likelihoods import completion_nlls, label_nlls
from clcore.evaluation.metrics import TextMetric, metric_family, metric_name, text_metric
from clcore.evaluation.questions import Question, Rows, label_set, read_labelled, read_questions, read_texts

MAX_SCORED = 2048
"""Positions of a batch that the output head sees for a likelihood, unless a single row has more."""


@dataclasses.dataclass(frozen=True)
class RowScore:
    """One scored row."""

    row: int
    """Number in the data set, from 0."""
    score: float
    answer: str
    """What was generated or, by likelihood, the chosen label; empty for perplexity."""
    reference: str
    nll: float | None = None
    """Summed nll of the reference with its end token, in nats; None for metrics of answers."""
    num_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scores of one model on rows of one data set."""

    metric: str
    rows: tuple[RowScore, ...]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def score(self) -> float:
        """The score of the set, in 0..1. Raises DataError without rows."""
        return set_score(self.metric, self.rows)

    def interval(
        self, level: float = 0.95, num_samples: int = 1000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Return the bootstrap interval of the score over rows; None with fewer than two."""
        values, statistic = self.values()
        return bootstrap.interval(values, statistic, level=level, num_samples=num_samples, seed=seed)

    def values(self) -> tuple[np.ndarray, bootstrap.Statistic]:
        """Return what each row puts into the score, and the function that makes the score of it."""
        return row_values(self.metric, self.rows)

    @staticmethod
    def merge(parts: Sequence[Evaluation]) -> Evaluation:
        """Put the parts of several processes together, in the order of row numbers.

        Raises DataError for no parts, parts of different metrics and a row that stands in two parts.
        """
        metrics = {part.metric for part in parts}
        rows = sorted((row for part in parts for row in part.rows), key=lambda row: row.row)
        if len(metrics) != 1:
            raise DataError(f"parts of one metric can be merged, got {sorted(metrics)}")
        if len({row.row for row in rows}) != len(rows):
            raise DataError("a row stands in two parts")
        return Evaluation(metrics.pop(), tuple(rows))


def row_values(metric: str, rows: Sequence[RowScore]) -> tuple[np.ndarray, bootstrap.Statistic]:
    """Return an array over rows and the statistic whose value on it is the score of the set."""
    if metric == "perplexity":
        pairs = np.array([[row.nll, row.num_tokens] for row in rows], dtype=float)
        return pairs, bootstrap.inverse_perplexity
    return np.array([row.score for row in rows], dtype=float), bootstrap.mean


def set_score(metric: str, rows: Sequence[RowScore]) -> float:
    """Return the score of a set of rows: their mean, for perplexity exp(-sum of nll / sum of tokens).

    Raises DataError without rows.
    """
    if not rows:
        raise DataError("no rows, no score")
    values, statistic = row_values(metric, rows)
    return float(statistic(values[None])[0])


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Rows,
    metric: str | TextMetric,
    *,
    max_length: int,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    labels: Sequence[str] | None = None,
    with_adapter: bool = True,
    stored: Stored | None = None,
    on_batch: Callable[[int], None] = lambda done_rows: None,  # noqa: ARG005
) -> Evaluation:
    """Score rows, this process's share; scores come back in the order of rows.

    rows: (number in the data set, row). metric: a name of METRICS, or a function of (answer, reference).
    max_new_tokens None takes the longest of these rows' references; labels None the distinct completions of
    these rows. Processes that share a data set pass both (longest_answer, label_set), or each has its own.
    "likelihood" chooses the label with the highest summed log-likelihood with its end token: the end token
    makes the probabilities of labels of all lengths comparable, so nothing is divided by the length.
    with_adapter False scores the base model under the adapter. stored: outputs found there are not computed
    again, and each batch is stored before on_batch hears of it. Answers are greedy and do not depend on the
    batch size, as far as rounding goes. Raises ConfigError, DataError; TrainingDivergedError for a likelihood
    that is no number; StateError for stored outputs that are not this evaluation's.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    name, family = metric_name(metric), metric_family(metric)
    if any(isinstance(entry, Mapping) or len(entry) != 2 for entry in rows):
        raise DataError("rows must be pairs (number, row), as list(enumerate(rows)) makes them")
    if len({number for number, _ in rows}) != len(rows):
        raise DataError("a row number stands twice among the rows")
    if not rows:
        return Evaluation(name, ())
    settings: dict[str, Any] = {"family": family}
    label_tokens: list[tuple[int, ...]] = []
    if family == "likelihood":
        settings["labels"] = list(label_set(rows) if labels is None else labels)
        questions, label_tokens = read_labelled(rows, tokenizer, max_length, settings["labels"])
    elif family == "perplexity":
        questions = read_texts(rows, tokenizer, max_length)
    else:
        questions = read_questions(rows, tokenizer, max_length)
        settings["max_new_tokens"] = max_new_tokens or max(len(q.completion) for q in questions)
    digests = {question.row: question.digest for question in questions}
    outputs = stored.load(settings, digests) if stored else {}
    if outputs:
        on_batch(len(outputs))
    pending = [question for question in questions if question.row not in outputs]
    was_training = model.training
    model.eval()
    bare = nullcontext() if with_adapter else model.disable_adapter()  # type: ignore[operator]
    try:
        with torch.inference_mode(), bare:
            prefix = shared_prefix(model, [question.prompt for question in pending], pad_token(tokenizer))
            compute = _computer(model, tokenizer, prefix, questions, settings, label_tokens)
            for batch in split(
                pending,
                batch_size,
                device=next(model.parameters()).device,
                num_shared=len(prefix.tokens) if prefix else 0,
                max_scored=MAX_SCORED if family == "perplexity" else None,
            ):
                new = dict(zip((question.row for question in batch), compute(batch), strict=True))
                outputs |= new
                if stored:
                    stored.save(settings, [(row, digests[row], output) for row, output in new.items()])
                on_batch(len(outputs))
    finally:
        model.train(was_training)
    scored = (
        _scored(question, outputs[question.row], metric, settings, label_tokens) for question in questions
    )
    return Evaluation(name, tuple(scored))


def _computer(
    model: nn.Module,
    tokenizer: Any,
    prefix: Prefix | None,
    questions: Sequence[Question],
    settings: dict[str, Any],
    label_tokens: Sequence[tuple[int, ...]],
) -> Callable[[Sequence[Question]], list[Output]]:
    """Return the function from a batch to its outputs."""
    pad = pad_token(tokenizer)
    if settings["family"] == "perplexity":
        return lambda batch: [
            {"nll": _finite(nll, question), "num_tokens": len(question.completion)}
            for nll, question in zip(
                completion_nlls(model, batch, pad=pad, prefix=prefix), batch, strict=True
            )
        ]
    if settings["family"] == "likelihood":
        return lambda batch: [
            {"nlls": [_finite(nll, question) for nll in nlls]}
            for nlls, question in zip(
                label_nlls(model, batch, label_tokens, pad=pad, prefix=prefix), batch, strict=True
            )
        ]
    eos, limit = tokenizer.eos_token_id, settings["max_new_tokens"]
    drafts = drafts_from(questions, eos)
    return lambda batch: [
        {"answer": str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()}
        for tokens in greedy_answers(
            model, batch, limit=limit, eos=eos, pad=pad, prefix=prefix, drafts=drafts
        )
    ]


def _finite(nll: float, question: Question) -> float:
    if not math.isfinite(nll):
        raise TrainingDivergedError(f"row {question.row}: the negative log-likelihood is {nll}")
    return nll


def _scored(
    question: Question,
    output: Output,
    metric: str | TextMetric,
    settings: dict[str, Any],
    label_tokens: Sequence[tuple[int, ...]],
) -> RowScore:
    row, reference, num_tokens = question.row, question.reference, len(question.completion)
    if metric == "perplexity":
        nll = output["nll"]
        return RowScore(row, math.exp(-nll / num_tokens), "", reference, nll, num_tokens)
    if metric == "likelihood":
        nlls, wanted = output["nlls"], label_tokens.index(question.completion)
        best = min(range(len(nlls)), key=nlls.__getitem__)
        chosen = settings["labels"][best].strip()
        return RowScore(row, float(best == wanted), chosen, reference, nlls[wanted], num_tokens)
    answer = output["answer"]
    return RowScore(row, text_metric(metric)(answer, reference), answer, reference)
