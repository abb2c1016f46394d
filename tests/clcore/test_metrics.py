"""Metrics of answers, worked out by hand."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.metrics import exact_match, metric_family, metric_name, rouge_l, text_metric, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [(" Sports\n", "Sports", 1), ("sports", "Sports", 0), ("Sports.", "Sports", 0), ("", " ", 1)],
)
def test_exact_match_forgives_white_space_at_the_ends_only(answer: str, reference: str, score: float) -> None:
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The cat sat.", "a cat SAT", 1),  # articles, case and punctuation do not count
        ("cat cat dog", "cat cat cat", 4 / 6),  # two in common of three and three, as a multiset
        ("red green", "green blue black", 2 / 5),  # one in common of two and three
        ("red", "blue", 0),
        ("the", "an", 1),  # neither side has words
        ("the", "cat", 0),
        ("cat", "...", 0),
        ("it's theirs", "its theirs", 1),  # punctuation goes without a trace; theirs is no article
    ],
)
def test_token_f1_is_that_of_squad(answer: str, reference: str, score: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)
    assert token_f1(reference, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat down", "the cat lay down", 3 / 4),  # the cat ... down: 3 of 4 and 3 of 4
        ("down sat cat", "cat sat down", 1 / 3),  # the order counts
        ("a b", "a b c d", 2 / 3),  # precision 1, recall 1/2
        ("", "a", 0),
        ("crème brûlée", "crème anglaise", 1 / 2),  # letters beyond ASCII are letters
        ("снег и лёд", "снег и град", 2 / 3),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    answer: str, reference: str, score: float
) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_on_ascii_text_rouge_l_is_that_of_rouge_score() -> None:
    scorer = RougeScorer(["rougeL"])
    pairs = [("Don't_stop: 3.5 times!", "dont stop 3 5 Times"), ("The U.S. team", "the us team won")]
    for answer, reference in pairs:
        assert rouge_l(answer, reference) == scorer.score(reference, answer)["rougeL"].fmeasure


def test_what_is_no_number_in_0_to_1_is_refused() -> None:
    for wrong in (None, "1", float("nan"), 2, -0.1):
        with pytest.raises(DataError, match=r"must return a number in 0..1, got .* for the answer 'red'"):
            text_metric(lambda _, __, wrong=wrong: wrong)("red", "red")  # type: ignore[misc]


def test_metrics_of_answers_are_one_family_and_functions_belong_to_it() -> None:
    assert {metric_family(name) for name in ("exact_match", "token_f1", "rouge_l", token_f1)} == {"answers"}
    assert metric_family("perplexity") == "perplexity"
    assert metric_family("likelihood") == "likelihood"
    assert metric_name(token_f1) == "user:token_f1"
    with pytest.raises(ConfigError, match=r"exact_match, token_f1, rouge_l, likelihood, perplexity .*'f1'"):
        metric_family("f1")
