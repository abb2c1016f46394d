"""How answers are compared with references, each figure worked out by hand."""

from __future__ import annotations

import pytest

from clcore.engine.errors import ConfigError, DataError
from clcore.evaluation.metrics import exact_match, metric_family, metric_name, rouge_l, text_metric, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("", "", 1),
    ],
)
def test_exact_match_forgives_white_space_at_the_ends_alone(answer: str, reference: str, score: int) -> None:
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "A cat sat!", 1),  # articles, case and punctuation go: cat sat on both sides
        ("cat cat dog", "cat dog dog", 2 / 3),  # common: one cat, one dog; 2 * 2 / (3 + 3)
        ("red", "red green blue", 0.5),  # precision 1, recall 1/3: 2 * 1 / (1 + 3)
        ("yellow", "red", 0),
        ("the", "a", 1),  # no words on either side
        ("", "red", 0),
    ],
)
def test_token_f1_counts_each_word_as_often_as_both_sides_have_it(
    answer: str, reference: str, score: float
) -> None:
    assert token_f1(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat on the mat", "the cat sat on the mat", 2 * 5 / (5 + 6)),
        ("mat the on", "on the mat", 2 * 1 / (3 + 3)),  # the longest common subsequence is one word
        ("Émile à Paris", "émile à paris", 1),
        ("", "red", 0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    answer: str, reference: str, score: float
) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


def test_rouge_l_of_ascii_text_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("A quick brown fox, 3 times", "the quick fox ran 3 times"), ("it's", "its"), ("x_y", "x y")]
    for answer, reference in pairs:
        expected = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(answer, reference) == pytest.approx(expected)


def test_a_users_function_is_named_and_held_to_0_to_1() -> None:
    def length_ratio(answer: str, reference: str) -> float:
        return len(answer) / len(reference)

    assert metric_name(length_ratio) == "user:length_ratio"
    assert metric_family(length_ratio) == "answers"
    assert text_metric(length_ratio)("ab", "abcd") == 0.5
    with pytest.raises(DataError, match=r"'user:length_ratio' must return a number in 0..1, got 2.0"):
        text_metric(length_ratio)("abcd", "ab")
    with pytest.raises(DataError, match="got nan"):
        text_metric(lambda _, __: float("nan"))("a", "b")


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"exact_match, token_f1, rouge_l, likelihood, perplexity.*'bleu'"):
        metric_family("bleu")
