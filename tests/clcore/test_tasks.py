"""Rows become tokens: what carries loss, and what is cut when a row is too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clcore.engine.errors import DataError
from clcore.engine.tasks import (
    IGNORE,
    collate,
    cut_middle,
    derive_seed,
    encode_row,
    iter_examples,
    num_label_tokens,
)
from tests.clcore.tiny import WORDS


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_only_the_completion_and_the_end_token_carry_loss(tokenizer: Any) -> None:
    example = encode_row({"prompt": "a b :", "completion": "c d"}, tokenizer, 16, "set:0")
    assert example["input_ids"].tolist() == ids("a b : c d <eos>")
    assert example["labels"].tolist() == [IGNORE] * 3 + ids("c d <eos>")
    assert example["ref"] == "set:0"
    assert num_label_tokens(example) == 3


def test_the_first_token_of_a_row_is_never_counted_as_predicted(tokenizer: Any) -> None:
    assert num_label_tokens(encode_row({"prompt": "", "completion": "c d"}, tokenizer, 16)) == 2


def test_a_long_prompt_loses_its_middle_and_the_head_keeps_the_odd_token(tokenizer: Any) -> None:
    row = {"prompt": "a b c d e f g", "completion": "z"}
    # 2 tokens of completion leave room for 5 of 7: 3 from the head, 2 from the tail
    assert encode_row(row, tokenizer, 7)["input_ids"].tolist() == ids("a b c f g z <eos>")
    assert cut_middle([1, 2, 3, 4], 1) == [1]
    assert cut_middle([1, 2, 3, 4], 4) == [1, 2, 3, 4]


def test_a_completion_is_never_cut_and_the_error_names_both_numbers(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"completion has 4 tokens, max_length is 4"):
        encode_row({"prompt": "a", "completion": "b c d"}, tokenizer, 4)
    assert encode_row({"prompt": "a", "completion": "b c d"}, tokenizer, 5)["input_ids"].tolist() == ids(
        "a b c d <eos>"
    )


def test_messages_follow_the_chat_template_and_train_the_last_answer_only(chat_tokenizer: Any) -> None:
    row = {"messages": [turn("user", "x"), turn("assistant", "y"), turn("user", "b"), turn("assistant", "c")]}
    example = encode_row(row, chat_tokenizer, 64)
    assert example["input_ids"].tolist() == ids("u : x <eos> a : y <eos> u : b <eos> a : c <eos>")
    assert example["labels"].tolist() == [IGNORE] * 14 + ids("c <eos>")


def test_the_oldest_turns_go_first_and_the_system_turn_stays(chat_tokenizer: Any) -> None:
    talk = [turn("system", "s"), turn("user", "x"), turn("assistant", "y"), turn("user", "b")]
    row = {"messages": [*talk, turn("assistant", "c")]}
    whole = encode_row(row, chat_tokenizer, 20)["input_ids"].tolist()
    assert whole == ids("s : s <eos> u : x <eos> a : y <eos> u : b <eos> a : c <eos>")
    cut = encode_row(row, chat_tokenizer, 19)["input_ids"].tolist()
    assert cut == ids("s : s <eos> u : b <eos> a : c <eos>")
    last_turn_cut = encode_row(row, chat_tokenizer, 8)["input_ids"].tolist()
    assert last_turn_cut == ids("s : s <eos> a : c <eos>")[:3] + ids("<eos> a : c <eos>")


def test_a_template_that_rewrites_the_prompt_is_refused(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="prefix"):
        encode_row({"messages": [turn("user", "a"), turn("assistant", "b")]}, chat_tokenizer, 64)


def test_messages_need_a_chat_template_and_an_assistant_at_the_end(
    tokenizer: Any, chat_tokenizer: Any
) -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode_row({"messages": [turn("user", "a"), turn("assistant", "b")]}, tokenizer, 64)
    with pytest.raises(DataError, match="last message must be the assistant's"):
        encode_row({"messages": [turn("user", "a")]}, chat_tokenizer, 64)
    with pytest.raises(DataError, match="last message must be the assistant's"):
        encode_row({"messages": []}, chat_tokenizer, 64)


def test_a_row_of_neither_format_is_refused_with_its_fields(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"needs 'prompt' and 'completion', or 'messages'.*\['text'\]"):
        encode_row({"text": "a"}, tokenizer, 64)


def test_data_set_items_may_be_rows_or_batches_as_lists_or_tensors() -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "attention_mask": [[1, 1, 0], [1, 1, 1]]}
    row = {"input_ids": [1, 2], "labels": [IGNORE, 2], "ref": "set:7"}
    found = list(iter_examples([batch, row], "task"))
    assert [example["input_ids"].tolist() for example in found] == [[5, 6], [7, 8, 9], [1, 2]]
    assert [example["labels"].tolist() for example in found] == [[5, 6], [7, 8, 9], [IGNORE, 2]]
    assert [example["ref"] for example in found] == ["task:0", "task:1", "set:7"]


def test_padding_on_either_side_is_left_out() -> None:
    left = {"input_ids": [0, 0, 5, 6], "labels": [IGNORE, IGNORE, IGNORE, 6], "attention_mask": [0, 0, 1, 1]}
    right = {"input_ids": [5, 6, 0], "labels": [IGNORE, 6, IGNORE], "attention_mask": [1, 1, 0]}
    for example in iter_examples([left, right]):
        assert (example["input_ids"].tolist(), example["labels"].tolist()) == ([5, 6], [IGNORE, 6])


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("text", "got str"),
        ({"labels": [1]}, "input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "share a shape"),
        ({"input_ids": 3}, "share a shape"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "share a shape"),
        (
            {"input_ids": [1, 2], "attention_mask": [0, 0], "ref": "set:3"},
            "row 'set:3' holds no token that is not padding",
        ),
        ({"input_ids": []}, "row ':0' holds no token that is not padding"),
    ],
)
def test_a_bad_data_set_item_is_refused(item: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        list(iter_examples([item]))


def test_collate_pads_on_the_right_without_loss_or_attention() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(list(iter_examples(rows)), pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [8, IGNORE, IGNORE]]


def test_a_derived_seed_is_fixed_and_its_parts_do_not_run_together() -> None:
    assert derive_seed(0, "task", 1) == derive_seed(0, "task", 1)
    assert (
        len({derive_seed("a", "bc"), derive_seed("ab", "c"), derive_seed("abc"), derive_seed("a", "c")}) == 4
    )
    assert all(0 <= derive_seed(i) < 2**63 for i in range(50))
