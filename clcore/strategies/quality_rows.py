"""What quality control reads of a row: its words or token ids, its prompt, its completion and its place.

Three kinds of rows are understood: examples as tokens, {"prompt", "completion"} or {"messages"} rows, and
plain strings. Everything after this file sees only Item.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clcore.engine.errors import DataError
from clcore.engine.tasks import IGNORE, row_format

Unit = str | int
"""What shingles and n-grams are made of: a word or a punctuation mark of a text, or a token id."""

# Han and Kana have no spaces between words, so each character is a unit.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNIT = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Item:
    """One row as the checks see it. The texts are None when only token ids are known."""

    source: Any
    """The object that was given, unchanged."""
    ref: str
    task: str
    """What stands before the last ':' of ref, or the row's own "task"."""
    sha256: str
    """Over prompt and completion, or over token ids and labels."""
    units: tuple[Unit, ...]
    completion_units: tuple[Unit, ...]
    length: int
    """Tokens of an example; words of a text, without punctuation marks."""
    num_labels: int
    """Tokens that are trained on; 1 for a text, which is counted only once it is tokens."""
    prompt: str | None = None
    completion: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether units are words; if not they are token ids."""
        return self.prompt is not None

    @property
    def is_example(self) -> bool:
        """Whether the row was given as tokens."""
        return isinstance(self.source, Mapping) and "input_ids" in self.source

    @property
    def text(self) -> str:
        """Prompt and completion with a space between; '' when only token ids are known."""
        return f"{(self.prompt or '').strip()} {(self.completion or '').strip()}".strip()


def words(text: str) -> tuple[str, ...]:
    """Split a text into words and punctuation marks; Unicode form (NFKC), case and spaces do not count."""
    return tuple(_UNIT.findall(unicodedata.normalize("NFKC", text).casefold()))


def without_marks(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Leave out punctuation marks and other lone symbols."""
    return tuple(unit for unit in units if isinstance(unit, int) or unit[0].isalnum() or unit[0] == "_")


def ref_of(source: Any, position: int) -> str:
    """Return a row's reference, or '#<position>' for a row without one."""
    given = source.get("ref") if isinstance(source, Mapping) else None
    return str(given or f"#{position}")


def task_of(source: Any, position: int) -> str:
    """Return the task that a row belongs to; '' when nothing says it."""
    given = source.get("task") if isinstance(source, Mapping) else None
    return str(given or ref_of(source, position).rpartition(":")[0])


def read_item(source: Any, position: int, tokenizer: Any = None) -> Item:
    """Read a row of any kind; with a tokenizer an example becomes text.

    Raises DataError that says what is wrong with the row's shape.
    """
    if isinstance(source, Mapping) and "input_ids" in source:
        return _read_example(source, position, tokenizer)
    prompt, completion = ("", source) if isinstance(source, str) else _texts(source)
    prompt_words, completion_words = words(prompt), words(completion)
    units = prompt_words + completion_words
    return Item(
        source=source,
        ref=ref_of(source, position),
        task=task_of(source, position),
        sha256=_digest([prompt, completion]),
        units=units,
        completion_units=completion_words,
        length=len(without_marks(units)),
        num_labels=1,
        prompt=prompt,
        completion=completion,
    )


def _read_example(source: Mapping[str, Any], position: int, tokenizer: Any) -> Item:
    ids_L = torch.as_tensor(source["input_ids"])
    labels_L = torch.as_tensor(source["labels"]) if source.get("labels") is not None else ids_L
    if ids_L.dim() != 1 or labels_L.shape != ids_L.shape:
        raise DataError(
            "input_ids and labels must share a shape (L,), "
            f"got {tuple(ids_L.shape)} and {tuple(labels_L.shape)}"
        )
    ids, labels = ids_L.tolist(), labels_L.tolist()
    labelled = [i for i, label in enumerate(labels) if label != IGNORE]
    start = labelled[0] if labelled else len(ids)
    common: dict[str, Any] = {
        "source": source,
        "ref": ref_of(source, position),
        "task": task_of(source, position),
        "sha256": _digest([ids, labels]),
        "length": len(ids),
        "num_labels": sum(i > 0 for i in labelled),
    }
    if tokenizer is None:
        return Item(units=tuple(ids), completion_units=tuple(ids[start:]), **common)
    prompt = tokenizer.decode(ids[:start], skip_special_tokens=True)
    completion = tokenizer.decode(ids[start:], skip_special_tokens=True)
    spoken = words(completion)
    return Item(
        units=words(prompt) + spoken, completion_units=spoken, prompt=prompt, completion=completion, **common
    )


def _texts(row: Any) -> tuple[str, str]:
    """Return the prompt and the completion of a row; of messages, all but the last and the last."""
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an example, a mapping or a string, got {type(row).__name__}")
    if row_format(row) == "completion":
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str):
                raise DataError(f"{name!r} must be a string, got {type(row[name]).__name__}")
        return row["prompt"], row["completion"]
    messages = row["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("'messages' must be a list with at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise DataError("every message must have a 'content' string")
    if messages[-1].get("role") != "assistant":
        raise DataError(f"the last message must be the assistant's, got role {messages[-1].get('role')!r}")
    return "\n".join(message["content"] for message in messages[:-1]), messages[-1]["content"]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
