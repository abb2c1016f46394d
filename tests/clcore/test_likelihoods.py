"""Perplexity and choice by likelihood against one token after the other in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clcore.engine.errors import DataError, TrainingDivergedError
from clcore.engine.tasks import prompt_and_completion
from clcore.evaluation import evaluate, label_set
from tests.clcore.eval_models import MAX_LENGTH, MODELS, count_passes, loud_llama, mixed_rows, nll_of


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_nll_and_score_are_those_of_one_row_at_a_time(name: str, batch_size: int, tokenizer: Any) -> None:
    model, rows = MODELS[name](), mixed_rows()
    found = evaluate(model, tokenizer, rows, "perplexity", max_length=MAX_LENGTH, batch_size=batch_size)
    pairs = [prompt_and_completion(row, tokenizer, MAX_LENGTH) for _, row in rows]
    expected = [nll_of(model, *pair) for pair in pairs]
    counts = [len(completion) for _, completion in pairs]
    assert [row.nll for row in found.rows] == pytest.approx(expected, rel=1e-5)
    assert [row.num_tokens for row in found.rows] == counts
    scores = [math.exp(-nll / count) for nll, count in zip(expected, counts, strict=True)]
    assert [row.score for row in found.rows] == pytest.approx(scores, rel=1e-5)
    assert found.score == pytest.approx(math.exp(-sum(expected) / sum(counts)), rel=1e-5)
    assert found.score != pytest.approx(sum(scores) / len(scores), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_chosen_label_has_the_highest_summed_likelihood(
    name: str, batch_size: int, tokenizer: Any
) -> None:
    model, rows = MODELS[name](), mixed_rows()
    labels = label_set(rows)
    assert {len(label) for label in labels} == {1, 2, 3}
    found = evaluate(model, tokenizer, rows, "likelihood", max_length=MAX_LENGTH, batch_size=batch_size)
    chosen = set()
    for (number, row), scored in zip(rows, found.rows, strict=True):
        nlls = {}
        for label in labels:
            pair = prompt_and_completion({**row, "completion": label}, tokenizer, MAX_LENGTH)
            nlls[label] = nll_of(model, *pair)
        best = min(nlls, key=nlls.__getitem__)
        assert (scored.row, scored.answer, scored.score) == (number, best, float(best == row["completion"]))
        assert scored.nll == pytest.approx(nlls[row["completion"]], rel=1e-5)
        chosen.add(best)
    assert len(chosen) > 1, "always the same label: the test shows nothing"


def test_a_prompt_goes_through_the_model_once_for_all_labels(tokenizer: Any) -> None:
    model, rows = loud_llama(), mixed_rows(8)
    passes = count_passes(model)
    evaluate(model, tokenizer, rows, "likelihood", max_length=MAX_LENGTH)
    labels = label_set(rows)
    assert passes == [1, 8, *[8] * len(labels)]  # shared beginning, prompts, each label behind them


def test_labels_of_the_caller_are_used_whatever_the_rows_hold(tokenizer: Any) -> None:
    model, rows = loud_llama(), mixed_rows()
    labels = label_set(rows)
    alone = [
        evaluate(model, tokenizer, [row], "likelihood", max_length=MAX_LENGTH, labels=labels).rows[0]
        for row in rows
    ]
    together = evaluate(model, tokenizer, rows, "likelihood", max_length=MAX_LENGTH)
    assert [row.answer for row in alone] == [row.answer for row in together.rows]


def test_labels_stand_behind_the_same_prompt_even_where_it_is_cut(tokenizer: Any) -> None:
    model, rows = loud_llama(), mixed_rows()
    labels = label_set(rows)  # the longest has 3 tokens and an end token
    found = evaluate(model, tokenizer, rows, "likelihood", max_length=10, labels=labels)
    for (_, row), scored in zip(rows, found.rows, strict=True):
        prompt, _ = prompt_and_completion({**row, "completion": "aaa"}, tokenizer, 10)
        _, completion = prompt_and_completion(row, tokenizer, 10)
        assert scored.nll == pytest.approx(nll_of(model, prompt, completion), rel=1e-5)


def test_labels_that_cannot_be_told_apart_and_rows_without_a_label_are_refused(tokenizer: Any) -> None:
    model, rows = loud_llama(), mixed_rows(2)  # a and bb

    def score(labels: list[str]) -> None:
        evaluate(model, tokenizer, rows, "likelihood", max_length=MAX_LENGTH, labels=labels)

    with pytest.raises(DataError, match=r"at least two distinct labels, got \['a'\]"):
        score(["a"])
    with pytest.raises(DataError, match="at least two distinct labels"):
        score(["a", "bb", "a"])
    with pytest.raises(DataError, match="have the same tokens"):
        score(["a", " a", "bb"])
    with pytest.raises(DataError, match="row 99: 'bb' is none of the labels"):
        score(["a", "c"])


def test_chat_rows_have_labels_too(chat_tokenizer: Any) -> None:
    model = loud_llama()
    rows = [
        (i, {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]})
        for i, (a, b) in enumerate([("c d", "x"), ("e", "y y"), ("f g h", "x")])
    ]
    found = evaluate(model, chat_tokenizer, rows, "likelihood", max_length=MAX_LENGTH)
    for (_, row), scored in zip(rows, found.rows, strict=True):
        pair = prompt_and_completion(row, chat_tokenizer, MAX_LENGTH)
        assert scored.nll == pytest.approx(nll_of(model, *pair), rel=1e-5)
    assert {row.answer for row in found.rows} <= {"x", "y y"}


def test_an_empty_prompt_gives_its_place_to_the_first_token_of_the_completion(tokenizer: Any) -> None:
    model = loud_llama()
    row = (0, {"prompt": "", "completion": "a b"})
    found = evaluate(model, tokenizer, [row], "perplexity", max_length=MAX_LENGTH).rows[0]
    ids = tokenizer("a b")["input_ids"]
    assert found.num_tokens == 2
    assert found.nll == pytest.approx(nll_of(model, ids[:1], [ids[1], 1]), rel=1e-5)
    for metric in ("exact_match", "likelihood"):
        with pytest.raises(DataError, match="row 0: the prompt has no tokens"):
            evaluate(model, tokenizer, [row], metric, max_length=MAX_LENGTH, labels=["a b", "c"])


def test_a_model_that_has_diverged_is_an_error_and_not_a_score(tokenizer: Any) -> None:
    model = loud_llama()
    next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)
    for metric in ("perplexity", "likelihood"):
        with pytest.raises(TrainingDivergedError, match=r"row \d+: .* nan"):
            evaluate(model, tokenizer, mixed_rows(), metric, max_length=MAX_LENGTH)
