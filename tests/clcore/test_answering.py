"""Greedy answers in batches against model.generate, one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clcore.engine.errors import BackendError
from clcore.evaluation import evaluate
from clcore.evaluation.answering import drafts_from, greedy_answers
from clcore.evaluation.kv_batch import KVBatch, has_plain_cache, shared_prefix
from clcore.evaluation.questions import Question, read_questions
from tests.clcore.eval_models import (
    MAX_LENGTH,
    MODELS,
    count_passes,
    ending_llama,
    generate,
    generate_ids,
    loud_llama,
    loud_mistral,
    mixed_rows,
)


def answers_of(model: nn.Module, tokenizer: Any, rows: Any, **changes: Any) -> list[str]:
    found = evaluate(model, tokenizer, rows, "exact_match", max_length=MAX_LENGTH, **changes)
    return [row.answer for row in found.rows]


def with_references(rows: Any, answers: list[str]) -> Any:
    return [(n, {**row, "completion": a}) for (n, row), a in zip(rows, answers, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("begin", ["a b c d : ", ""], ids=["shared prefix", "none"])
def test_answers_are_those_of_generate_at_any_batch_size_whatever_the_references_say(
    name: str, begin: str, tokenizer: Any
) -> None:
    model, rows = MODELS[name](), mixed_rows(begin=begin)
    plain = generate(model, tokenizer, rows, 7)
    assert len(set(plain)) > 4
    half_right = [answer[:5] + " z z" if i % 2 else answer or "z" for i, answer in enumerate(plain)]
    others = [*plain[1:], plain[0]]
    for references in (None, [answer or "z" for answer in plain], half_right, [a or "z" for a in others]):
        asked = rows if references is None else with_references(rows, references)
        for batch_size in (1, 3, 16):
            found = answers_of(model, tokenizer, asked, batch_size=batch_size, max_new_tokens=7)
            assert found == plain, (references, batch_size)


@pytest.fixture(scope="module")
def ended(tokenizer: Any) -> tuple[nn.Module, Any, list[list[int]]]:
    """A model, rows whose answers end by themselves, and the answers with their end tokens."""
    model, rows = ending_llama(), mixed_rows(24)
    ids = generate_ids(model, tokenizer, rows, 12)
    chosen = [i for i, answer in enumerate(ids) if len(answer) > 1 and answer[-1] == 1]
    chosen = [i for i in chosen if min(ids[i][:-1]) > 2]  # no special tokens, which no reference can hold
    assert len(chosen) > 2
    assert len({len(ids[i]) for i in chosen}) > 1
    return model, [rows[i] for i in chosen], [ids[i] for i in chosen]


def test_an_answer_ends_at_the_end_token_and_leaves_it_out(ended: Any, tokenizer: Any) -> None:
    model, rows, ids = ended
    plain = [tokenizer.decode(answer[:-1]) for answer in ids]
    assert answers_of(model, tokenizer, rows, max_new_tokens=12, batch_size=3) == plain


def test_a_right_answer_costs_one_pass(ended: Any, tokenizer: Any) -> None:
    model, rows, ids = ended
    asked = with_references(rows, [tokenizer.decode(answer[:-1]) for answer in ids])
    passes = count_passes(model)
    found = evaluate(model, tokenizer, asked, "exact_match", max_length=MAX_LENGTH, max_new_tokens=12)
    assert found.score == 1
    assert passes[0] == 1  # what the prompts begin with
    assert sum(passes[1:]) == len(rows)  # prompts with guesses


def test_a_row_that_is_done_leaves_and_all_rows_done_stops_before_the_limit(
    ended: Any, tokenizer: Any
) -> None:
    model, rows, ids = ended
    passes = count_passes(model)
    answers_of(model, tokenizer, with_references(rows, ["z"] * len(rows)), max_new_tokens=60)
    alive = [sum(len(answer) > step for answer in ids) for step in range(max(map(len, ids)))]
    assert passes == [1, *alive]


def test_without_max_new_tokens_the_longest_reference_is_the_limit(tokenizer: Any) -> None:
    model, rows = loud_llama(), mixed_rows()
    asked = with_references(rows, ["z"] * (len(rows) - 1) + ["z z z"])
    assert answers_of(model, tokenizer, asked) == generate(model, tokenizer, rows, 4)  # with the end token


def test_guesses_come_from_the_most_frequent_reference_that_fits() -> None:
    completions = [(5, 6, 7, 1), (5, 6, 8, 1), (5, 6, 8, 1), (9, 1)]
    questions = [Question(i, (2,), completion, "") for i, completion in enumerate(completions)]
    assert drafts_from(questions, 1) == {(5,): (6, 8), (5, 6): (8,)}


def test_without_an_end_token_answers_go_on_to_the_limit(tokenizer: Any) -> None:
    model = loud_llama()
    questions = read_questions(mixed_rows(6), tokenizer, MAX_LENGTH)
    found = greedy_answers(model, questions, limit=9, eos=None, pad=0)
    assert [len(answer) for answer in found] == [9] * 6


def test_what_all_prompts_begin_with_leaves_a_token_to_predict_from() -> None:
    model = loud_llama()
    assert shared_prefix(model, [(3, 4, 5), (3, 4, 5), (3, 4, 5, 6)], 0).tokens == (3, 4)  # type: ignore[union-attr]
    assert shared_prefix(model, [(3, 4), (5, 4)], 0) is None
    assert shared_prefix(model, [(3,), (3, 4)], 0) is None
    assert shared_prefix(model, [(3, 4, 5)], 0) is None


def test_a_sliding_window_shares_and_guesses_nothing() -> None:
    assert has_plain_cache(loud_llama())
    model = loud_mistral()
    assert not has_plain_cache(model)
    assert shared_prefix(model, [(3, 4, 5), (3, 4, 6)], 0) is None


@torch.inference_mode()
def test_forgotten_tokens_leave_no_trace() -> None:
    model = loud_llama().eval()
    straight, winding = KVBatch(model, 2, 0), KVBatch(model, 2, 0)
    straight.feed([[3, 4], [5, 6, 7]], 1)
    winding.feed([[3, 4, 20, 21], [5, 6, 7, 22]], 1)
    winding.forget(0, 2)
    winding.forget(1, 1)
    torch.testing.assert_close(winding.feed([[8], [9]], 1), straight.feed([[8], [9]], 1))
    winding.feed([[10, 11]] * 2, 1)
    winding.crop(2)
    winding.keep([1])
    straight.keep([1])
    torch.testing.assert_close(winding.feed([[12]], 1), straight.feed([[12]], 1))


def test_virtual_tokens_before_every_piece_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    from tests.clcore.tiny import tiny_llama_base

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_llama_base(), config)
    with pytest.raises(BackendError, match="PromptTuningConfig"):
        KVBatch(model, 1, 0)
