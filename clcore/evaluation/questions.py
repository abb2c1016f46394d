"""Rows of a data set as tokens: what a model is asked and what it should answer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from clcore.engine.errors import DataError
from clcore.engine.tasks import Tokenizer, prompt_and_completion, row_format

Rows = Sequence[tuple[int, Mapping[str, Any]]]
"""(number in the data set, row)."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One row as tokens. Neither prompt nor completion is empty."""

    row: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """With its end token; a text has none."""
    reference: str

    @functools.cached_property
    def digest(self) -> str:
        """Name the tokens of the question, 16 hex digits."""
        text = f"{','.join(map(str, self.prompt))};{','.join(map(str, self.completion))}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_questions(rows: Rows, tokenizer: Any, max_length: int) -> list[Question]:
    """Turn prompt and completion, or messages, into questions of at most max_length tokens.

    The reference is what the completion's tokens say, without white space at the ends.
    Raises DataError that names the row for a row that cannot be used or has an empty prompt.
    """
    found = []
    for number, row in rows:
        prompt, completion = _tokens(number, row, tokenizer, max_length)
        if not prompt:
            raise DataError(f"row {number}: the prompt has no tokens")
        found.append(_question(number, prompt, completion, tokenizer))
    return found


def read_texts(rows: Rows, tokenizer: Any, max_length: int) -> list[Question]:
    """Turn rows into questions whose completion is to be predicted, not answered.

    A row may also be {"text": str}: of its first max_length tokens all but the first are predicted. Without a
    prompt the completion's first token takes its place. Raises DataError that names the row.
    """
    found = []
    for number, row in rows:
        prompt: list[int]
        if "text" in row:
            prompt, completion = [], list(tokenizer(row["text"])["input_ids"])[:max_length]
        else:
            prompt, completion = _tokens(number, row, tokenizer, max_length)
        if not prompt:
            prompt, completion = completion[:1], completion[1:]
        if not completion:
            raise DataError(f"row {number}: a text needs at least two tokens: the first is not predicted")
        found.append(_question(number, prompt, completion, tokenizer))
    return found


def label_set(rows: Rows) -> tuple[str, ...]:
    """Return the distinct completions of rows, or last messages, in alphabetical order."""
    return tuple(sorted({_answer_text(number, row) for number, row in rows}))


def read_labelled(
    rows: Rows, tokenizer: Any, max_length: int, labels: Sequence[str]
) -> tuple[list[Question], list[tuple[int, ...]]]:
    """Return questions and the tokens of every label, with the end token.

    A prompt leaves room for the longest label, so that all labels are compared behind the same prompt.
    Raises DataError for fewer than two labels, equal ones, and a row whose completion is not a label.
    """
    if len(set(labels)) < 2 or len(set(labels)) != len(labels):
        raise DataError(f"likelihood needs at least two distinct labels, got {list(labels)}")
    if not rows:
        return [], []
    _answer_text(*rows[0])
    row_0 = rows[0]
    tokens = [
        tuple(_tokens(row_0[0], _with_answer(row_0[1], label), tokenizer, max_length)[1]) for label in labels
    ]
    if len(set(tokens)) != len(tokens):
        raise DataError(f"two of the labels {list(labels)} have the same tokens")
    longest = labels[max(range(len(labels)), key=lambda i: len(tokens[i]))]
    found = []
    for number, row in rows:
        answer = _answer_text(number, row)
        if answer not in labels:
            raise DataError(f"row {number}: {answer!r} is none of the labels {list(labels)}")
        prompt, _ = _tokens(number, _with_answer(row, longest), tokenizer, max_length)
        if not prompt:
            raise DataError(f"row {number}: the prompt has no tokens")
        completion = tokens[list(labels).index(answer)]
        found.append(_question(number, prompt, completion, tokenizer))
    return found, tokens


def longest_answer(rows: Rows, tokenizer: Any, max_length: int) -> int:
    """Return the tokens of the longest completion with its end token.

    Processes that share the rows of a data set pass it as max_new_tokens, so that all use the same.
    """
    return max(len(_tokens(number, row, tokenizer, max_length)[1]) for number, row in rows)


def _question(number: int, prompt: Sequence[int], completion: Sequence[int], tokenizer: Any) -> Question:
    reference = str(tokenizer.decode(list(completion), skip_special_tokens=True)).strip()
    return Question(number, tuple(prompt), tuple(completion), reference)


def _tokens(
    number: int, row: Mapping[str, Any], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[int]]:
    try:
        return prompt_and_completion(row, tokenizer, max_length)
    except DataError as error:
        raise DataError(f"row {number}: {error}") from error


def _answer_text(number: int, row: Mapping[str, Any]) -> str:
    try:
        return str(row["messages"][-1]["content"] if row_format(row) == "chat" else row["completion"])
    except DataError as error:
        raise DataError(f"row {number}: {error}") from error


def _with_answer(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    if row_format(row) == "chat":
        *others, last = row["messages"]
        return {**row, "messages": [*others, {**last, "content": text}]}
    return {**row, "completion": text}
