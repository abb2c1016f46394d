"""How an answer is compared with its reference; every score is in 0..1 and higher is better."""

from __future__ import annotations

import functools
import math
import numbers
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

from clcore.engine.errors import ConfigError, DataError

METRICS = ("exact_match", "token_f1", "rouge_l", "likelihood", "perplexity")
"""Names that evaluate takes; it also takes a function of (answer, reference)."""

TextMetric = Callable[[str, str], float]
"""(answer, reference) -> score in 0..1."""


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both are equal, white space at the ends aside, else 0. Case and punctuation count."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, as SQuAD's script does.

    Words are what white space separates after lower-casing, dropping ASCII punctuation and then the articles
    a, an and the; a word that stands twice counts twice. 1 if neither side has words, 0 if one has none.
    Source: Rajpurkar et al. 2016.
    """
    words, wanted = _squad_words(answer), _squad_words(reference)
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004), by rouge-score.

    Words are runs of letters and digits in lower case, without stemming; on ASCII text they are rouge-score's
    own, which sees no other letters. No words on one side: 0.
    """
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def metric_name(metric: str | TextMetric) -> str:
    """Return the name of a metric, "user:<name>" for a function. Raises ConfigError for an unknown name."""
    if callable(metric):
        return f"user:{getattr(metric, '__name__', type(metric).__name__)}"
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {', '.join(METRICS)} or a function, got {metric!r}")
    return metric


def metric_family(metric: str | TextMetric) -> str:
    """Return what a metric is computed from: "answers", "likelihood" or "perplexity"."""
    name = metric_name(metric)
    return name if name in ("likelihood", "perplexity") else "answers"


def text_metric(metric: str | TextMetric) -> TextMetric:
    """Return the function of a metric of answers; a user's is checked to return 0..1.

    It raises DataError for anything else.
    """
    if isinstance(metric, str):
        return {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}[metric]
    name = metric_name(metric)

    def checked(answer: str, reference: str) -> float:
        score = metric(answer, reference)
        if not (isinstance(score, numbers.Real) and math.isfinite(score) and 0 <= score <= 1):
            raise DataError(
                f"metric {name!r} must return a number in 0..1, got {score!r} for the answer {answer[:60]!r}"
            )
        return float(score)

    return checked


def _squad_words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@functools.cache
def _rouge_scorer() -> Any:
    # Here, because the import takes a second and most metrics do without.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """What rouge-score asks for words."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
