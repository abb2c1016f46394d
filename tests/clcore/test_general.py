"""General ability: the project's texts, and what is made of their scores."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clcore.engine.errors import DataError
from clcore.evaluation import evaluate_general, general_delta, general_rows, general_sha256, relative_drop
from tests.clcore.eval_models import loud_llama, nll_of
from tests.clcore.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per character."""
    return tiny_tokenizer()


def test_the_projects_texts_are_100_different_ones() -> None:
    texts = [row["text"] for row in general_rows()]
    assert len(texts) == len(set(texts)) == 100
    beginnings = {text[:25] for text in texts}
    assert len(beginnings) >= 95
    assert all(90 <= len(text) <= 200 for text in texts), sorted(len(text) for text in texts)
    assert len(general_sha256()) == 64


def test_its_score_is_the_perplexity_of_all_tokens_that_follow_another(tokenizer: Any) -> None:
    model = loud_llama()
    rows = [(0, {"text": "a b c d"}), (1, {"text": "c c d e f g a b"}), (2, {"text": "f a"})]
    nlls, counts = [], []
    for _, row in rows:
        ids = tokenizer(row["text"])["input_ids"]
        nlls.append(nll_of(model, ids[:1], ids[1:]))
        counts.append(len(ids) - 1)
    for batch_size in (1, 2, 16):
        found = evaluate_general(model, tokenizer, rows, max_length=48, batch_size=batch_size)
        assert [row.nll for row in found.rows] == pytest.approx(nlls, rel=1e-4)
        assert [row.num_tokens for row in found.rows] == counts
        assert found.score == pytest.approx(math.exp(-sum(nlls) / sum(counts)), rel=1e-4)


def test_long_texts_count_their_first_tokens_and_short_ones_are_refused(tokenizer: Any) -> None:
    model = loud_llama()
    cut = evaluate_general(model, tokenizer, [(0, {"text": "a b c d e f g"})], max_length=4)
    assert cut.rows[0].num_tokens == 3
    with pytest.raises(DataError, match="row 7: a text needs at least two tokens"):
        evaluate_general(model, tokenizer, [(7, {"text": "a"})], max_length=4)


def test_delta_and_relative_drop_are_means_over_sets() -> None:
    assert general_delta(0.10, 0.08) == pytest.approx(-0.02)
    assert relative_drop(0.10, 0.08) == pytest.approx(0.2)
    before, after = {"one": 0.10, "two": 0.50}, {"one": 0.08, "two": 0.60}
    assert general_delta(before, after) == pytest.approx((-0.02 + 0.10) / 2)
    assert relative_drop(before, after) == pytest.approx((0.2 - 0.2) / 2)
    with pytest.raises(DataError, match="same sets"):
        general_delta(before, {"one": 0.1})
    with pytest.raises(DataError, match="both be numbers or both be mappings"):
        general_delta(before, 0.1)
    with pytest.raises(DataError, match="positive scores before, got 0"):
        relative_drop(0, 0.1)
