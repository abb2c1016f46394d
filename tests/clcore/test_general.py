"""General ability: the project's own texts, their perplexity, and what is made of it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from clcore.engine.errors import DataError
from clcore.evaluation import evaluate_general, general_delta, general_rows, general_sha256, relative_drop
from tests.clcore.eval_models import MAX_LENGTH, MODELS, loud_llama, nll_of


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_there_are_100_texts_of_a_few_sentences_and_no_two_are_alike() -> None:
    rows = general_rows()
    texts = [row["text"] for row in rows]
    assert len(rows) == 100
    assert all(set(row) == {"text"} for row in rows)
    assert len({" ".join(words(text)) for text in texts}) == 100
    assert len({" ".join(words(text)[:4]) for text in texts}) == 100  # no template
    assert all(80 <= len(text) <= 240 and text == text.strip() for text in texts)
    sets = [set(words(text)) for text in texts]
    overlaps = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[:i]]
    assert max(overlaps) < 0.35
    assert general_sha256() == general_sha256()
    assert re.fullmatch(r"[0-9a-f]{64}", general_sha256())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_score_of_texts_is_that_of_one_row_at_a_time(name: str, batch_size: int, tokenizer: Any) -> None:
    model = MODELS[name]()
    rows = [
        (i, {"text": text}) for i, text in enumerate(["a b c d", "a b", "x y z a b c 1 2 3", "a b c e f"])
    ]
    found = evaluate_general(model, tokenizer, rows, max_length=MAX_LENGTH, batch_size=batch_size)
    tokens = [tokenizer(row["text"])["input_ids"] for _, row in rows]
    nlls = [nll_of(model, ids[:1], ids[1:]) for ids in tokens]
    assert [row.nll for row in found.rows] == pytest.approx(nlls, rel=1e-5)
    assert [row.num_tokens for row in found.rows] == [3, 1, 8, 4]
    assert found.score == pytest.approx(math.exp(-sum(nlls) / 16), rel=1e-5)


def test_texts_are_cut_and_rows_of_all_kinds_may_stand_together(chat_tokenizer: Any) -> None:
    model = loud_llama()
    chat = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
    rows = [(0, {"text": "a b c d e f"}), (1, {"prompt": "a :", "completion": "b"}), (2, chat)]
    found = evaluate_general(model, chat_tokenizer, rows, max_length=12)
    assert [row.num_tokens for row in found.rows] == [5, 2, 2]
    cut = evaluate_general(model, chat_tokenizer, rows[:1], max_length=4).rows[0]
    ids = chat_tokenizer("a b c d")["input_ids"]
    assert cut.num_tokens == 3
    assert cut.nll == pytest.approx(nll_of(model, ids[:1], ids[1:]), rel=1e-5)
    with pytest.raises(DataError, match="row 5: a text needs at least two tokens"):
        evaluate_general(model, chat_tokenizer, [(5, {"text": "a"})], max_length=12)


def test_delta_and_relative_drop_average_over_sets_with_opposite_signs() -> None:
    before, after = {"default": 0.2, "own": 0.04}, {"default": 0.15, "own": 0.05}
    assert general_delta(0.2, 0.15) == pytest.approx(-0.05)
    assert relative_drop(0.2, 0.15) == pytest.approx(0.25)
    assert general_delta(before, after) == pytest.approx((-0.05 + 0.01) / 2)
    assert relative_drop(before, after) == pytest.approx((0.25 - 0.25) / 2)


def test_scores_of_other_sets_and_a_score_of_0_before_are_refused() -> None:
    with pytest.raises(DataError, match="scores of the same sets"):
        general_delta({"a": 0.1}, {"b": 0.1})
    with pytest.raises(DataError, match="both be numbers or both be mappings"):
        general_delta({"a": 0.1}, 0.1)
    with pytest.raises(DataError, match="positive scores before, got 0"):
        relative_drop(0.0, 0.1)
