"""From rows of text to tokens: prompt/completion and chat messages.

A row is {"prompt": str, "completion": str} or {"messages": [{"role": str, "content": str}, ...]}, whose last
message is the assistant's. Labels cover the completion and the end token only. Shapes: B rows, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor

from clcore.engine.errors import DataError

IGNORE = -100
"""Label of a position that carries no loss."""

DataFormat = Literal["completion", "chat"]


class Example(TypedDict):
    """One row as tokens, shape (L,); labels equal input_ids where the loss counts and IGNORE elsewhere."""

    input_ids: Tensor
    labels: Tensor
    ref: NotRequired[str]
    """Where the row is stored: "<data set>:<row>"."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


def row_format(row: Mapping[str, Any]) -> DataFormat:
    """Say how a row is written. Raises DataError that names the accepted shapes."""
    if "messages" in row:
        return "chat"
    if "prompt" in row and "completion" in row:
        return "completion"
    raise DataError(f"a row needs 'prompt' and 'completion', or 'messages'; got fields {sorted(row)}")


def encode_row(row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int, ref: str = "") -> Example:
    """Turn a row into tokens of at most max_length.

    A long prompt loses tokens from its middle; messages lose their oldest turns after the system turn first;
    the completion is never cut. Raises DataError when the completion alone is longer than max_length.
    """
    prompt, completion = prompt_and_completion(row, tokenizer, max_length)
    ids = torch.tensor(prompt + completion, dtype=torch.long)
    labels = ids.clone()
    labels[: len(prompt)] = IGNORE
    return {"input_ids": ids, "labels": labels, "ref": ref}


def prompt_and_completion(
    row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[int]]:
    """Return the tokens of the prompt and of the completion with its end token."""
    if row_format(row) == "chat":
        prompt, completion = _chat_tokens(row["messages"], tokenizer, max_length)
    else:
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        completion = list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            completion.append(tokenizer.eos_token_id)
    if not completion:
        raise DataError("the completion has no tokens")
    room = max_length - len(completion)
    if room < 1:
        raise DataError(
            f"the completion has {len(completion)} tokens, max_length is {max_length}: no room for a prompt"
        )
    return cut_middle(prompt, room), completion


def cut_middle(tokens: list[int], room: int) -> list[int]:
    """Keep the head and the tail of a list that is longer than room; the head gets the odd token."""
    if len(tokens) <= room:
        return tokens
    tail = room // 2
    return tokens[: room - tail] + tokens[len(tokens) - tail :]


def _chat_tokens(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[int]]:
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError("the last message must be the assistant's: it is what is trained")
    if not tokenizer.chat_template:
        raise DataError("this base model has no chat template; use 'prompt' and 'completion' rows")
    turns = list(messages)
    while True:
        prompt, completion = _render(turns, tokenizer)
        shorter = _without_oldest_turn(turns)
        if len(prompt) + len(completion) <= max_length or shorter is None:
            return prompt, completion
        turns = shorter


def _render(messages: list[Mapping[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    prompt_text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    full_text = tokenizer.apply_chat_template(messages, tokenize=False)
    if not full_text.startswith(prompt_text):
        raise DataError("the chat template does not keep the prompt as a prefix of the conversation")
    completion_text = full_text[len(prompt_text) :]
    if tokenizer.eos_token and tokenizer.eos_token in completion_text:
        # A template may put more, such as a line break, after the end.
        end = completion_text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        completion_text = completion_text[:end]
    prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    completion = tokenizer(completion_text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None and completion[-1:] != [tokenizer.eos_token_id]:
        completion = [*completion, tokenizer.eos_token_id]  # the template marks the end in another way
    return list(prompt), list(completion)


def _without_oldest_turn(messages: list[Mapping[str, str]]) -> list[Mapping[str, str]] | None:
    """Drop the oldest turn after the system message, up to the next user message; None for the last."""
    first = 1 if messages[0].get("role") == "system" else 0
    for i in range(first + 1, len(messages) - 1):
        if messages[i].get("role") == "user":
            return messages[:first] + messages[i:]
    return None


def iter_examples(dataset: Iterable[Any], prefix: str = "") -> Iterator[Example]:
    """Yield examples from what users train on: items with input_ids and optional labels and attention_mask.

    An item may hold one row, shape (L,), or a batch, (B, L); lists and tensors are accepted. Padding, where
    attention_mask is 0, is left out, so that nothing measures it. Without labels every token carries loss.
    Raises DataError for anything else.
    """
    count = 0
    for item in dataset:
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise DataError(f"a data set item must be a mapping with 'input_ids', got {type(item).__name__}")
        ids = torch.as_tensor(item["input_ids"])
        labels = torch.as_tensor(item["labels"]) if item.get("labels") is not None else ids.clone()
        given = item.get("attention_mask")
        mask = torch.ones_like(ids) if given is None else torch.as_tensor(given)
        if ids.dim() not in (1, 2) or labels.shape != ids.shape or mask.shape != ids.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (ids, labels, mask))
            raise DataError(
                f"input_ids, labels and attention_mask must share a shape (L,) or (B, L), got {shapes}"
            )
        columns = [x if x.dim() == 2 else x.unsqueeze(0) for x in (ids, labels, mask != 0)]
        for row_ids, row_labels, is_real in zip(*columns, strict=True):
            ref = item.get("ref") or f"{prefix}:{count}"
            if not bool(is_real.any()):
                raise DataError(f"row {ref!r} holds no token that is not padding")
            yield {"input_ids": row_ids[is_real], "labels": row_labels[is_real], "ref": str(ref)}
            count += 1


def collate(
    examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Pad examples on the right to one batch: input_ids, attention_mask and labels of shape (B, L)."""
    length = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), length)
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, example in enumerate(examples):
        n = len(example["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = example["input_ids"], example["labels"], 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def num_label_tokens(example: Example) -> int:
    """Count the positions that are predicted; the first token of a row never is.

    Raises DataError for a row without labels.
    """
    if "labels" not in example:
        raise DataError(
            f"row {example.get('ref', '')!r} has no labels; iter_examples gives rows their labels"
        )
    return int((example["labels"][1:] != IGNORE).sum())


def derive_seed(*parts: object) -> int:
    """Hash parts to a 63-bit seed: the same on every rank and in every run."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
