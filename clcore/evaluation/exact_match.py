"""Exact match: does the model's greedy answer equal the reference?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from clcore.engine.errors import ConfigError
from clcore.engine.tasks import prompt_and_completion


@dataclasses.dataclass(frozen=True)
class Answer:
    """One scored row. score is 1.0 or 0.0; texts are stripped of surrounding white space."""

    row: int
    answer: str
    reference: str
    score: float


def exact_match_answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[tuple[int, Mapping[str, Any]]],
    *,
    max_length: int,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    with_adapter: bool = True,
    on_batch: Callable[[int], None] = lambda done: None,  # noqa: ARG005
) -> list[Answer]:
    """Answer rows greedily and compare with their references, white space at the ends aside.

    rows: (row number, row). Batches hold rows of similar length, padded on the left. max_new_tokens None
    takes the longest reference with its end token: a longer answer cannot match. with_adapter False scores
    the base model under the adapter. Returns answers in the order of rows.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    encoded = [(number, *prompt_and_completion(row, tokenizer, max_length)) for number, row in rows]
    if not encoded:
        return []
    limit = max_new_tokens or max(len(completion) for _, _, completion in encoded)
    by_length = sorted(encoded, key=lambda item: (len(item[1]), item[0]))
    found: dict[int, Answer] = {}
    was_training = model.training
    model.eval()
    bare = nullcontext() if with_adapter else model.disable_adapter()  # type: ignore[operator]
    try:
        with torch.inference_mode(), bare:
            for start in range(0, len(by_length), batch_size):
                chunk = by_length[start : start + batch_size]
                texts = _generate(model, tokenizer, [prompt for _, prompt, _ in chunk], limit)
                for (number, _, completion), text in zip(chunk, texts, strict=True):
                    reference = tokenizer.decode(completion, skip_special_tokens=True).strip()
                    found[number] = Answer(number, text, reference, float(text == reference))
                on_batch(start + len(chunk))
    finally:
        model.train(was_training)
    return [found[number] for number, _ in rows]


def _generate(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], limit: int) -> list[str]:
    device = next(model.parameters()).device
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids = torch.full((len(prompts), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = 1
    out = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=limit,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
